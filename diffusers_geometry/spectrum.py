"""Singular values of a Jacobian: dense, by block Golub-Kahan, or by the randomised range finder.

Dense: the matrix by automatic differentiation, then its singular values in float64. Exact; min(m, n) products.

Golub-Kahan (Golub, Luk and Overton, 1981, "A block Lanczos method for computing the singular values"): orthonormal bases U, V of
the block Krylov space of JᵀJ, fully reorthogonalised, so that J V = U B, and the largest singular values theta of the small B with
u = U p, v = V q approach those of J. J v = theta u holds by construction; what is left of Jᵀu - theta v is the residual r:

    some singular value of J lies within r of theta          (always; the bound)
    |s - theta| <= r² / (theta - largest unwanted value)     (when the wanted values are found; the estimate)

A value that occurs more often than there were starting directions cannot show all its copies in a Krylov space: as soon as all
copies in sight are as many as the starting directions, or the space closes, fresh directions are added.

Randomised (as arXiv:2408.08307 projects, after Halko, Martinsson and Tropp, 2011): Q = orth(J Omega), values of QᵀJ. They lie below
those of J by at most |(I - QQᵀ)J|, which is bounded from fresh probes (their equation 4.3).

Methods that need function values only are in :mod:`.function_values`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .difference import require_finite
from .estimate import Estimate, jackknife_sem
from .jacobian import Jacobian

CERTIFYING_PROBES = 5  # of the randomised bound, which fails with probability 10^-5


@dataclass(frozen=True)
class Spectrum:
    """Singular values of an m x n Jacobian and how they were obtained.

    Attributes:
        singular_values: Descending, float64 on the CPU, shape (k,).
        shape: (m, n).
        method: "dense", "golub_kahan", "randomized", "perturbation" or "central_difference".
        products: Products spent; one function value (perturbation) or one central difference counts as one.
        complete: Whether these are all min(m, n) values of J itself.
        restricted: Whether these are values of J restricted to random directions, which say little of each one of J's.
        bounds: Largest error that is not statistical of each value, shape (k,); None for zero.
        errors: Estimate of that error, at most ``bounds``, shape (k,); None where it is the bound.
        converged: Whether each value met the method's tolerance, shape (k,); None for all.
        eigenvalues: Of the symmetric part, descending, shape (n,), for a square matrix in hand; else None.
        asymmetry: |J - Jᵀ|_F / |J + Jᵀ|_F for a square matrix in hand; else None.
        trace: tr J of a square J, else None.
        replicates: Singular values with one group of random samples left out, shape (groups, k); None if not random.
        step: The difference step h, for central differences.
        samples: Random samples N that the values come from (perturbation), else None.
        left: Left singular vectors u of the non-zero values as columns, shape (m, k), where asked for; J v = s u in sign too.
        right: Right singular vectors v, shape (n, k).
        details: What the method did: block size, why it stopped.
    """

    singular_values: Tensor
    shape: tuple[int, int]
    method: str
    products: int
    complete: bool = True
    restricted: bool = False
    bounds: Tensor | None = None
    errors: Tensor | None = None
    converged: Tensor | None = None
    eigenvalues: Tensor | None = None
    asymmetry: float | None = None
    trace: Estimate | None = None
    replicates: Tensor | None = None
    step: float | None = None
    samples: int | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def estimate(self, function: Callable[[Tensor], float]) -> Estimate:
        """A functional of the singular values *in hand* with what is known of its error.

        The standard error comes from the jackknife replicates (0 where nothing is random); the bias from shifting all values
        up and down by ``errors``. None stands for not known: the sem of a restriction to random directions, the bias of that
        and of the perturbation method, whose Marchenko-Pastur spread is not corrected.
        """
        values, sem = self.singular_values, 0.0
        value = function(values)
        if self.replicates is not None:
            sem, bias = jackknife_sem([function(r) for r in self.replicates]), None
        elif self.restricted:
            sem, bias = None, None
        else:
            bias = self._largest_change(function, value)
        converged = bias is not None and (self.converged is None or bool(self.converged.all()))
        return Estimate(value, sem, bias, converged, self.products)

    def _largest_change(self, function: Callable[[Tensor], float], value: float) -> float:
        shift = self.bounds if self.errors is None else self.errors
        if shift is None or not shift.any():
            return 0.0
        shifted = (self.singular_values + shift, (self.singular_values - shift).clamp_min(0))
        return max(abs(function(values.sort(descending=True).values) - value) for values in shifted)

    @property
    def bound(self) -> float:
        """The largest of ``bounds``; 0 where there is none."""
        return 0.0 if self.bounds is None else self.bounds.max().item()

    @property
    def spread(self) -> float:
        """Relative half-width sqrt(k/N) over which N samples spread a k-fold value, k those above half the largest."""
        if self.samples is None:
            return 0.0
        return math.sqrt(int((self.singular_values > self.singular_values.max() / 2).sum()) / self.samples)

    @property
    def singular_value_sems(self) -> Tensor:
        """Standard error of every singular value, shape (k,); zeros where nothing is random."""
        if self.replicates is None:
            return torch.zeros_like(self.singular_values)
        groups = len(self.replicates)
        return self.replicates.var(dim=0, correction=0).mul(groups - 1).sqrt()


def matrix_spectrum(matrix: Tensor, *, method: str, products: int, bound: float = 0.0, step: float | None = None) -> Spectrum:
    """The spectrum of a matrix in hand, shape (m, n), in float64; ``bound`` is the error of its spectral norm."""
    matrix = require_finite(matrix.detach().cpu().double(), "the Jacobian")
    square = matrix.shape[0] == matrix.shape[1]
    eigenvalues = asymmetry = trace = None
    if square:
        eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)
        even, odd = (matrix + matrix.T).norm().item(), (matrix - matrix.T).norm().item()
        asymmetry = odd / even if even > 0 else (math.inf if odd > 0 else 0.0)
        trace = Estimate(matrix.trace().item(), bias=bound * math.sqrt(len(matrix)), products=products)
    values = torch.linalg.svdvals(matrix)
    return Spectrum(
        values,
        tuple(matrix.shape),
        method,
        products,
        bounds=torch.full_like(values, bound) if bound else None,
        eigenvalues=eigenvalues,
        asymmetry=asymmetry,
        trace=trace,
        step=step,
    )


def dense_spectrum(jacobian: Jacobian) -> Spectrum:
    """All singular values from the dense Jacobian; exact for an automatic derivative; min(m, n) products."""
    before = jacobian.products
    matrix = jacobian.dense()
    bound = jacobian.rounding(torch.linalg.matrix_norm(matrix.cpu().double(), 2).item())
    return matrix_spectrum(matrix, method="dense", products=jacobian.products - before, bound=bound, step=jacobian.step)


def golub_kahan_memory(shape: tuple[int, int], products: int, block_size: int = 4) -> int:
    """Bytes that the two bases of :func:`golub_kahan_spectrum` take (float64, on the CPU)."""
    columns = min(products // 2 + 2 * block_size, min(shape))
    return 8 * columns * (sum(shape) + 2 * columns)


def golub_kahan_spectrum(
    jacobian: Jacobian,
    num_singular_values: int,
    tol: float = 1e-3,
    max_products: int | None = None,
    *,
    block_size: int = 4,
    generator: torch.Generator | None = None,
    vectors: bool = False,
) -> Spectrum:
    """The largest singular values, by block Golub-Kahan with full reorthogonalisation.

    Args:
        jacobian: Products with J and Jᵀ.
        num_singular_values: k, at most min(m, n).
        tol: A value has converged when min(r, r² / gap to the unwanted values) <= tol theta.
        max_products: Budget; by default as many as it takes (2 min(m, n) give everything).
        block_size: Directions advanced together. Small blocks take fewer products, large ones share forward passes.
        generator: Starting directions; a fixed seed by default.
        vectors: Keep the singular vectors.

    Returns:
        k values with bounds, estimated errors, converged flags; ``details["stopped"]`` is "converged", "budget" or
        "exhausted" (the Krylov space and fresh directions have nothing more: the remaining values are zero).

    Raises:
        ValueError: k, tol, block size or budget out of range.
        TypeError: a black box that was not stated to be symmetric.

    References:
        A block Lanczos method for computing the singular values (Golub, Luk, Overton, 1981), ACM TOMS 7
    """
    limit = min(jacobian.shape)
    if not 1 <= num_singular_values <= limit:
        raise ValueError(f"num_singular_values={num_singular_values}. Expected 1 <= num_singular_values <= {limit}.")
    if not 0 < tol < 1 or not block_size >= 1:
        raise ValueError(f"tol={tol}, block_size={block_size}. Expected 0 < tol < 1 and block_size >= 1.")
    block_size = min(block_size, limit)
    budget = 4 * limit if max_products is None else max_products
    least = 2 * max(block_size, num_singular_values)
    if budget < least:
        raise ValueError(
            f"max_products={budget}. Expected at least {least}: two for each of {num_singular_values} singular values and for each "
            f"direction of a block of {block_size}."
        )
    krylov = _Krylov(jacobian, generator or torch.Generator().manual_seed(0))
    krylov.add_fresh(block_size)
    while True:
        krylov.advance()
        ritz = krylov.ritz(num_singular_values)
        hidden = _may_hide_copies(ritz, num_singular_values, krylov.starts, tol)
        stopped = None
        if krylov.is_full or krylov.is_exhausted:
            stopped = "exhausted"
        elif len(ritz.values) >= num_singular_values and ritz.converged(tol)[:num_singular_values].all() and not hidden:
            stopped = "converged"
        else:
            if hidden or not krylov.next_width:
                krylov.add_fresh(block_size)
            if krylov.products + 2 * krylov.next_width > budget:
                stopped = "budget"
        if stopped:
            return krylov.spectrum(ritz, num_singular_values, tol, stopped, vectors, block_size)


class _Krylov:
    """Bases U, V with J V = U B and Jᵀ U = V D + next; everything in float64 on the CPU, one column a direction."""

    def __init__(self, jacobian: Jacobian, generator: torch.Generator) -> None:
        self.jacobian, self.generator = jacobian, generator
        rows, columns = jacobian.shape
        double = {"dtype": torch.float64}
        self.left, self.right = torch.empty(rows, 0, **double), torch.empty(columns, 0, **double)
        self.forward, self.reverse = torch.empty(0, 0, **double), torch.empty(0, 0, **double)  # B, D
        self._next, self._remainder = torch.empty(columns, 0, **double), torch.empty(0, 0, **double)
        self._spent_before = jacobian.products
        self.scale, self.starts, self.is_exhausted, self._next_is_fresh = 0.0, 0, False, False

    @property
    def products(self) -> int:
        return self.jacobian.products - self._spent_before

    @property
    def next_width(self) -> int:
        return self._next.shape[1]

    @property
    def is_full(self) -> bool:
        left_full = self.left.shape[1] == len(self.left) and not self.next_width
        return left_full or self.right.shape[1] == len(self.right)

    @property
    def noise(self) -> float:
        """Error of a product of norm ``scale``, below which a direction is rounding."""
        return 10 * torch.finfo(self.jacobian.x.dtype).eps * (self.scale + self.jacobian.cancellation) + self.jacobian.step_error

    def add_fresh(self, count: int) -> None:
        """Adds random directions, orthogonal to all others, to the next block."""
        known = torch.cat([self.right, self._next], dim=1)
        count = min(count, len(self.right) - known.shape[1])
        gaussian = torch.randn(len(self.right), count, generator=self.generator, dtype=torch.float64)
        fresh = _orthogonal(gaussian, known, 0.0)[0]
        self._next_is_fresh = not self.next_width
        self._next, self.starts = torch.cat([self._next, fresh], dim=1), self.starts + fresh.shape[1]

    def advance(self) -> None:
        """One forward product with every direction of the next block, one reverse product with every new left direction."""
        before, only_fresh = self.left.shape[1], self._next_is_fresh
        remainder, found = self._remainder, self._next.shape[1]
        self.right, self._next_is_fresh = torch.cat([self.right, self._next], dim=1), False
        images = self._product(self.jacobian.jvp, self._next, self.jacobian.x.shape)
        self.scale = max(self.scale, images.norm(dim=0).max().item())
        new, coefficients, rest = _orthogonal(images, self.left, self.noise)
        # Directions that came from the last reverse products are now part of V: the rows of D that were their remainder.
        rows = torch.zeros(found, before, dtype=torch.float64)
        rows[: len(remainder), before - remainder.shape[1] :] = remainder
        self.reverse = torch.cat([self.reverse, rows])
        self.forward = _extended(self.forward, torch.cat([coefficients, rest]))
        self.left = torch.cat([self.left, new], dim=1)
        self.is_exhausted = only_fresh and not new.shape[1]
        pulled = self._product(self.jacobian.vjp, new, self.jacobian.value.shape)
        self._next, coefficients, self._remainder = _orthogonal(pulled, self.right, self.noise)
        self.reverse = torch.cat([self.reverse, coefficients], dim=1)

    def _product(self, product: Callable[[Tensor], Tensor], columns: Tensor, shape: torch.Size) -> Tensor:
        if not columns.shape[1]:
            return torch.empty(len(self.right if product == self.jacobian.vjp else self.left), 0, dtype=torch.float64)
        stack = columns.T.reshape(-1, *shape).to(self.jacobian.x)
        return product(stack).flatten(1).cpu().double().T

    def ritz(self, wanted: int) -> _Ritz:
        """Singular values of B and their residuals."""
        p, values, q = torch.linalg.svd(self.forward, full_matrices=False)
        inside = self.reverse @ p - q.T * values
        outside = self._remainder @ p[p.shape[0] - self._remainder.shape[1] :]
        residuals = (inside.square().sum(dim=0) + outside.square().sum(dim=0)).sqrt() + self.noise
        unwanted = values[wanted].item() if len(values) > wanted else 0.0
        return _Ritz(values, residuals, unwanted, self.noise, p, q.T)

    def spectrum(self, ritz: _Ritz, wanted: int, tol: float, stopped: str, vectors: bool, block_size: int) -> Spectrum:
        """The result. Values that the bases do not show are zero: exactly so when exhausted, else up to the last one shown."""
        shape, missing = self.jacobian.shape, max(0, wanted - len(ritz.values))
        padding = torch.zeros(missing, dtype=torch.float64)
        unseen = ritz.noise if stopped == "exhausted" else max([self.scale, *ritz.values[-1:].tolist()])
        values, errors, bounds = (
            torch.cat([column[:wanted], padding + extra])
            for column, extra in ((ritz.values, 0.0), (ritz.errors, unseen), (ritz.residuals, unseen))
        )
        converged = torch.cat([ritz.converged(tol)[:wanted], padding > 0])
        return Spectrum(
            values, shape, "golub_kahan", self.products, complete=len(values) == min(shape),
            bounds=bounds, errors=errors, converged=converged if stopped != "exhausted" else torch.ones_like(converged),
            left=self.left @ ritz.left[:, :wanted] if vectors else None,
            right=self.right @ ritz.right[:, :wanted] if vectors else None,
            details={"block_size": block_size, "starts": self.starts, "stopped": stopped, "tol": tol, "step": self.jacobian.step},
        )  # fmt: skip


@dataclass(frozen=True)
class _Ritz:
    """Singular values of the projected map, with residuals and coefficients of their vectors as columns."""

    values: Tensor
    residuals: Tensor
    unwanted: float
    noise: float
    left: Tensor
    right: Tensor

    @property
    def errors(self) -> Tensor:
        gaps = (self.values - self.unwanted).clamp_min(torch.finfo(torch.float64).tiny)
        return torch.minimum(self.residuals, self.residuals.square() / gaps + self.noise)

    def converged(self, tol: float) -> Tensor:
        return self.errors <= torch.clamp(tol * self.values, min=2 * self.noise)


def _may_hide_copies(ritz: _Ritz, wanted: int, starts: int, tol: float) -> bool:
    """Whether some wanted values agree within tolerance and are as many as the starting directions can show."""
    values = ritz.values[: wanted + 1].tolist()
    if len(values) < starts or not ritz.converged(tol)[: len(values) - 1].all():
        return False
    for first in range(len(values)):
        last = first
        while last + 1 < len(values) and values[first] - values[last + 1] <= 2 * tol * values[first]:
            last += 1
        if last - first + 1 >= starts and last + 1 < min(wanted, len(values)):
            return True
    return False


def _orthogonal(columns: Tensor, basis: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Splits columns = basis C + new R: (new with orthonormal columns, C, R); directions below ``noise`` are left out."""
    coefficients = basis.T @ columns
    rest = columns - basis @ coefficients
    again = basis.T @ rest
    rest, coefficients = rest - basis @ again, coefficients + again
    if not rest.shape[1]:
        return rest, coefficients, rest.new_empty(0, 0)
    u, s, _ = torch.linalg.svd(rest, full_matrices=False)
    kept = s > max(noise, 1e-14 * columns.norm().item())
    new = u[:, kept]
    new = torch.linalg.qr(new - basis @ (basis.T @ new))[0] if new.shape[1] else new
    return new, coefficients, new.T @ rest


def _extended(matrix: Tensor, columns: Tensor) -> Tensor:
    """``matrix`` with zero rows for the new left directions and the given columns."""
    rows = torch.cat([matrix, matrix.new_zeros(len(columns) - len(matrix), matrix.shape[1])])
    return torch.cat([rows, columns], dim=1)


def randomized_spectrum(
    jacobian: Jacobian, num_singular_values: int, *, num_oversamples: int = 8, generator: torch.Generator | None = None
) -> Spectrum:
    """The largest singular values of QᵀJ, Q = orth(J Omega): 2 (k + p) products and 5 more that bound the bias.

    Exact when k + p reaches the rank; else every value is too small, by at most ``bounds`` (with probability 1 - 10^-5).

    Args:
        jacobian: Products with J and Jᵀ.
        num_singular_values: k, at most min(m, n).
        num_oversamples: p.
        generator: The random Omega; a fixed seed by default.

    References:
        What Secrets Do Your Manifolds Hold? (Humayun et al., 2025), https://arxiv.org/abs/2408.08307
    """
    limit = min(jacobian.shape)
    if not 1 <= num_singular_values <= limit or num_oversamples < 0:
        raise ValueError(
            f"num_singular_values={num_singular_values}, num_oversamples={num_oversamples}. Expected 1 <= num_singular_values "
            f"<= {limit} and num_oversamples >= 0."
        )
    generator, before = generator or torch.Generator().manual_seed(0), jacobian.products
    count = min(num_singular_values + num_oversamples, limit)
    x = jacobian.x
    probes = torch.randn(count + CERTIFYING_PROBES, *x.shape, generator=generator, dtype=x.dtype).to(x.device)
    images = jacobian.jvp(probes).flatten(1).cpu().double().T
    basis = torch.linalg.qr(images[:, :count])[0]
    rows = jacobian.vjp(basis.T.reshape(count, *jacobian.value.shape).to(x)).flatten(1).cpu().double()
    values = torch.linalg.svdvals(rows)[:num_singular_values]
    missed = images[:, count:] - basis @ (basis.T @ images[:, count:])
    bound = 10 * math.sqrt(2 / math.pi) * missed.norm(dim=0).max().item()
    bounds = torch.full_like(values, bound + jacobian.rounding(values[0].item()))
    return Spectrum(
        values, jacobian.shape, "randomized", jacobian.products - before, complete=len(values) == limit, bounds=bounds,
        converged=bounds <= 1e-3 * values, details={"k": num_singular_values, "num_oversamples": num_oversamples, "bias": -bound},
    )  # fmt: skip
