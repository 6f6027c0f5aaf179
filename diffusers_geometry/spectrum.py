"""Singular values of a Jacobian: dense, or by the two algorithms of arXiv:2410.05898 that need only function values.

Dense: the matrix by automatic differentiation, then its singular values in float64. Exact; min(m, n) products.

Algorithm 1 (perturbation): columns f(x + sigma xi_i), xi_i ~ N(0, I), i = 1..N, centred and divided by sigma sqrt(N). For an
affine f with matrix J the columns are J xi_i / sqrt(N), so values compare with the dense ones, with a Marchenko-Pastur spread:
a k-fold value s becomes the range s (1 ± sqrt(k/N)). Uncentred columns contain the mean of f as a spurious extra direction.

Algorithm 2 (central differences): columns (f(x + h v_i) - f(x - h v_i)) / 2h along orthonormal v_i. With fewer than n
directions these are the values of J V, which interlace those of J from below. The error of a column is about
noise/(sqrt(2) h) + h² M3/6: rounding noise is measured from a difference table (Moré and Wild, 2011, "Estimating
computational noise") and the curvature term from halving h, and h is chosen where their sum is least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .jacobian import BatchedMap, Jacobian, require_finite
from .stochastic import Estimate, jackknife_sem

JACKKNIFE_GROUPS = 10


@dataclass(frozen=True)
class Spectrum:
    """Singular values of an m x n Jacobian and how they were obtained.

    Attributes:
        singular_values: Descending, float64 on the CPU, shape (k,).
        shape: (m, n).
        method: "dense", "perturbation" or "central_difference".
        products: Products spent; one function value (perturbation) or one central difference counts as one.
        complete: Whether these are all min(m, n) values of J itself.
        eigenvalues: Of the symmetric part, descending, shape (n,), for a square matrix in hand; else None.
        asymmetry: |J - Jᵀ|_F / |J + Jᵀ|_F for a square matrix in hand; else None.
        trace: tr J of a square J, else None.
        replicates: Singular values with one group of random samples left out, shape (groups, k); None if not random.
        bound: Estimated largest error of a singular value that is not statistical; 0 for dense.
        step: The difference step h, for central differences.
    """

    singular_values: Tensor
    shape: tuple[int, int]
    method: str
    products: int
    complete: bool = True
    eigenvalues: Tensor | None = None
    asymmetry: float | None = None
    trace: Estimate | None = None
    replicates: Tensor | None = None
    bound: float = 0.0
    step: float | None = None

    def estimate(self, function: Callable[[Tensor], float]) -> Estimate:
        """A functional of the singular values with what is known of its error.

        The standard error comes from the jackknife replicates (0 for a matrix in hand, None for a restriction to random
        directions); the bias from shifting all values by ± ``bound`` (None for the perturbation method, whose
        Marchenko-Pastur spread is not corrected).
        """
        values = self.singular_values
        value, sem, bias = function(values), 0.0, 0.0
        if self.replicates is not None:
            sem, bias = jackknife_sem([function(r) for r in self.replicates]), None
        elif self.bound > 0:
            shifted = (function(values + self.bound), function((values - self.bound).clamp_min(0)))
            bias = max(abs(s - value) for s in shifted)
        if not self.complete:
            sem = None if self.replicates is None else sem
            bias = None
        return Estimate(value, sem, bias, converged=self.complete and bias is not None, products=self.products)

    @property
    def singular_value_sems(self) -> Tensor:
        """Standard error of every singular value, shape (k,); zeros where nothing is random."""
        if self.replicates is None:
            return torch.zeros_like(self.singular_values)
        groups = len(self.replicates)
        return self.replicates.var(dim=0, correction=0).mul(groups - 1).sqrt()


def matrix_spectrum(matrix: Tensor, *, method: str, products: int, bound: float = 0.0, step: float | None = None) -> Spectrum:
    """The spectrum of a matrix in hand, shape (m, n), in float64."""
    matrix = require_finite(matrix.detach().cpu().double(), "the Jacobian")
    square = matrix.shape[0] == matrix.shape[1]
    eigenvalues = asymmetry = trace = None
    if square:
        eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)
        even, odd = (matrix + matrix.T).norm().item(), (matrix - matrix.T).norm().item()
        asymmetry = odd / even if even > 0 else (math.inf if odd > 0 else 0.0)
        trace = Estimate(matrix.trace().item(), bias=bound * math.sqrt(len(matrix)), products=products)
    return Spectrum(
        torch.linalg.svdvals(matrix),
        tuple(matrix.shape),
        method,
        products,
        eigenvalues=eigenvalues,
        asymmetry=asymmetry,
        trace=trace,
        bound=bound,
        step=step,
    )


def dense_spectrum(jacobian: Jacobian) -> Spectrum:
    """All singular values from the dense Jacobian; exact, min(m, n) products."""
    before = jacobian.products
    matrix = jacobian.dense()
    return matrix_spectrum(matrix, method="dense", products=jacobian.products - before)


def evaluate(fn: BatchedMap, points: Tensor, chunk_size: int) -> Tensor:
    """``fn`` on a stack (K, *dims) in chunks, without gradients, flat and finite: (K, out)."""
    with torch.no_grad():
        values = torch.cat([fn(chunk).flatten(1) for chunk in points.split(chunk_size)])
    return require_finite(values, "the function")


def perturbation_columns(
    fn: BatchedMap,
    x: Tensor,
    sigma: float,
    *,
    num_samples: int,
    generator: torch.Generator,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1's columns as rows, f(x + sigma xi_i) / sigma (N, out), and the xi_i, (N, n)."""
    if num_samples < 2 or not sigma > 0:
        raise ValueError(f"num_samples={num_samples}, sigma={sigma}. Expected num_samples >= 2 and sigma > 0.")
    xi = torch.randn(num_samples, *x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    return evaluate(fn, x + sigma * xi, chunk_size) / sigma, xi.flatten(1)


def perturbation_spectrum(columns: Tensor, xi: Tensor, *, centred: bool = True) -> Spectrum:
    """Algorithm 1: singular values of [f(x + sigma xi_i) / sigma]_i / sqrt(N).

    Args:
        columns: f(x + sigma xi_i) / sigma, one a row, shape (N, m), from :func:`perturbation_columns`.
        xi: The perturbations, shape (N, n).
        centred: Subtract the mean column (the published algorithm does not; see the module docstring).

    Returns:
        Values with jackknife replicates over groups of samples; the trace, for a square map, by Stein's identity
        E[xi · f(x + sigma xi)] / sigma = E[tr J].
    """
    columns, xi = columns.cpu().double(), xi.cpu().double()
    count, outputs = columns.shape
    groups = torch.arange(count) % min(JACKKNIFE_GROUPS, count)
    kept = min(count - int((groups == 0).sum()) - int(centred), outputs, xi.shape[1])
    replicates = torch.stack([_column_values(columns[groups != g], centred)[:kept] for g in groups.unique()])
    trace = None
    if outputs == xi.shape[1]:
        products = (xi * (columns - columns.mean(dim=0))).sum(dim=1) * count / (count - 1)
        trace = Estimate(products.mean().item(), (products.std() / math.sqrt(count)).item(), 0.0, products=count)
    return Spectrum(
        _column_values(columns, centred)[:kept],
        (outputs, xi.shape[1]),
        "perturbation",
        count,
        complete=kept == min(outputs, xi.shape[1]),
        trace=trace,
        replicates=replicates,
    )


def _column_values(columns: Tensor, centred: bool) -> Tensor:
    """Singular values of the rows' matrix over sqrt(N), by its smaller Gram matrix where N is much the larger side."""
    if centred:
        columns = columns - columns.mean(dim=0)
    columns = columns / math.sqrt(len(columns))
    if len(columns) < 2 * columns.shape[1]:
        return torch.linalg.svdvals(columns)
    return torch.linalg.eigvalsh(columns.T @ columns).flip(0).clamp_min(0).sqrt()


def orthonormal_directions(shape: torch.Size, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """``count`` orthonormal directions (count, *shape): the unit vectors when they are all of them, else random."""
    size = math.prod(shape)
    if not 1 <= count <= size:
        raise ValueError(f"num_directions={count}. Expected 1 <= num_directions <= {size}, the input dimension.")
    if count == size:
        basis = torch.eye(size)
    else:
        gaussian = torch.randn(size, count, generator=generator, dtype=torch.float64, device=generator.device)
        basis = torch.linalg.qr(gaussian.cpu())[0].T
    return basis.to(like).reshape(count, *shape)


def central_difference_columns(
    fn: BatchedMap, x: Tensor, directions: Tensor, step: float, *, chunk_size: int = 32
) -> tuple[Tensor, Tensor]:
    """(f(x + h v) - f(x - h v)) / 2h as rows (K, out), and the directions (K, n) that floating point really took."""
    ahead, behind = x + step * directions, x - step * directions
    values = evaluate(fn, torch.stack([ahead, behind], dim=1).flatten(0, 1), chunk_size)
    realised = (ahead - behind).flatten(1) / (2 * step)
    return (values[0::2] - values[1::2]) / (2 * step), realised


def central_difference_spectrum(columns: Tensor, directions: Tensor, *, step: float, error: float = 0.0) -> Spectrum:
    """Algorithm 2: singular values of J V from columns J v_i.

    Args:
        columns: J v_i, one a row, shape (K, m), from :func:`central_difference_columns`.
        directions: The v_i, shape (K, n), orthonormal up to rounding.
        step: The step h.
        error: Estimated error of one column, from :func:`choose_step`.
    """
    columns, directions = columns.cpu().double(), directions.cpu().double()
    count, size = directions.shape
    bound = error * math.sqrt(count)
    if count == size:
        matrix = torch.linalg.solve(directions, columns).T
        return matrix_spectrum(matrix, method="central_difference", products=count, bound=bound, step=step)
    values, shape = torch.linalg.svdvals(columns), (columns.shape[1], size)
    return Spectrum(values, shape, "central_difference", count, complete=False, bound=bound, step=step)


def choose_step(
    fn: BatchedMap, x: Tensor, *, scale: float, generator: torch.Generator, num_directions: int = 2
) -> tuple[float, float]:
    """The difference step h and the estimated error |column - J v| it leaves.

    A ladder of steps, from the formula (3u)^(1/3) ``scale`` of the dtype's rounding unit u to 0.1 max(1, ``scale``), is
    tried along random directions; every rung's error is its rounding error plus what halving the step changes beyond it.

    Args:
        fn: The map on a stack, (K, *dims) -> (K, *out).
        x: The point, shape (*dims).
        scale: Length in x on which J changes; the noise sigma_t for a denoiser.
        generator: Random directions.
        num_directions: Directions averaged.
    """
    low, high = (3 * torch.finfo(x.dtype).eps / 2) ** (1 / 3) * scale, 0.1 * max(1.0, scale)
    ladder = torch.logspace(math.log2(low / 2), math.log2(high), max(3, math.ceil(math.log2(high / low)) + 2), base=2.0)
    ladder = ladder.tolist()
    errors = torch.zeros(len(ladder) - 1, dtype=torch.float64)
    for _ in range(num_directions):
        direction = orthonormal_directions(x.shape, 1, x, generator)
        noise = _rounding_noise(fn, x, direction, spacing=low / 4)
        columns = [central_difference_columns(fn, x, direction, h)[0].double() for h in ladder]
        rounding = [noise / (math.sqrt(2) * h) for h in ladder]
        for i in range(1, len(ladder)):
            change = (columns[i] - columns[i - 1]).norm().item()
            halving = (ladder[i] / ladder[i - 1]) ** 2
            curvature = max(0.0, change - rounding[i] - rounding[i - 1]) * halving / (halving - 1)
            errors[i - 1] += (rounding[i] + curvature) / num_directions
    best = int(errors.argmin())
    return ladder[best + 1], errors[best].item()


def _rounding_noise(fn: BatchedMap, x: Tensor, direction: Tensor, *, spacing: float, points: int = 8) -> float:
    """Norm of the rounding noise in f, from the higher differences of f on a short line (Moré and Wild, 2011, eq. 2.3)."""
    offsets = torch.arange(points, dtype=x.dtype, device=x.device).reshape(-1, *[1] * x.ndim)
    differences = evaluate(fn, x + spacing * offsets * direction, points).double()
    levels = []
    for order in range(1, points - 1):
        differences = differences[1:] - differences[:-1]
        variance = differences.square().sum(dim=1).mean().item() / math.comb(2 * order, order)
        if order >= 3:
            levels.append(math.sqrt(variance))
    return min(levels)
