"""Functions of all singular values of a Jacobian from random products: log-determinant, entropy, spectral density.

One probe's Golub-Kahan bidiagonal of J holds a Gauss quadrature of the spectrum of JᵀJ as that probe weighs
it: Σ_i f(s_i) = n E Σ_j weight_j f(node_j). It gives 1/2 log det(JᵀJ + eps²) (the regularised psi), the entropy nu and the density.
Its standard error over probes does not contain the bias of a short quadrature. The same probes at half and at a quarter of the
steps say it: the last change, enlarged where the changes fall slowly (Aitken's sum of a geometric rest).

Where the budget reaches the dimension every sum is exact, with sem = 0. Of few probes, and of sums that one large value dominates,
the standard error itself is unsure: it is enlarged as Student's t is, not for skewness.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .estimate import Estimate, jackknife_sem
from .jacobian import Jacobian
from .stochastic import mean_estimate, rademacher, small_sample

STILL_FALLING = 1.5  # ratio of the smallest nodes at half and at all the steps, above which the lower end is not resolved
LARGEST_REST = 3.0  # in units of the last change, what a slowly converging quadrature is taken to miss


@dataclass(frozen=True)
class Quadrature:
    """Sums over the singular values of an m x n Jacobian, from Lanczos quadrature; made by :func:`lanczos_quadrature`.

    The sums run over the n eigenvalues s² of JᵀJ.

    Attributes:
        levels: (nodes, weights) at all, half and a quarter of the steps, each of shape (probes, steps of the level): singular
            values, and weights that add up to n for each probe. One row of all n values when exact.
        size: n.
        exact: Whether the budget reached the dimension.
        products: Products spent.
        rounding: Error of every node from rounding and differences.
    """

    levels: tuple[tuple[Tensor, Tensor], ...]
    size: int
    exact: bool
    products: int
    rounding: float = 0.0

    def sums(self, function: Callable[[Tensor], Tensor], level: int = 0, shift: float = 0.0) -> Tensor:
        """Σ_i f(s_i) by each probe, shape (probes,), all s_i moved by ``shift`` and kept from falling below zero."""
        nodes, weights = self.levels[level]
        return (weights * function((nodes + shift).clamp_min(0))).sum(dim=1)

    def _rounding_bias(self, function: Callable[[Tensor], Tensor]) -> float:
        """What rounding of the nodes may do to the mean of the sums."""
        means = [self.sums(function, shift=shift).mean().item() for shift in (0.0, self.rounding, -self.rounding)]
        return max(abs(mean - means[0]) for mean in means)

    @staticmethod
    def _bias(full: float, half: float, quarter: float) -> float:
        """What is left of a sequence at m, m/2, m/4 steps: its last change c, times 1 / (r - 1) for changes that fall by r."""
        change, before = full - half, half - quarter
        ratio = abs(before / change) if change else math.inf
        return -change * min(LARGEST_REST, max(1.0, 1 / (ratio - 1) if ratio > 1 else LARGEST_REST))

    def total(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Σ_i f(s_i) over the n singular values."""
        samples, rounding = self.sums(function), self._rounding_bias(function)
        if self.exact:
            return Estimate(samples[0].item(), bias=rounding, products=self.products)
        bias = self._bias(*(self.sums(function, level).mean().item() for level in range(3)))
        result = mean_estimate(samples, self.products)
        bias = math.copysign(abs(bias) + rounding, bias)
        return Estimate(result.value, result.sem, bias, abs(bias) < result.sem / 2, self.products)

    def log_volume(self, epsilon: float) -> Estimate:
        """Regularised psi, 1/2 log det(JᵀJ + epsilon²) = Σ 1/2 log(s² + epsilon²), in nats.

        A rank-deficient J adds (n - rank) log epsilon, so the number is stated with its epsilon, and compared at equal ones.

        Raises:
            ValueError: ``epsilon`` is not positive.
        """
        if not epsilon > 0:
            raise ValueError(f"epsilon={epsilon}. Expected epsilon > 0.")
        found = self.total(lambda s: 0.5 * torch.log(s.square() + epsilon**2))
        if self.exact:
            return found
        bias = math.copysign(abs(found.bias) + self._unresolved_tail(epsilon), found.bias)
        return replace(found, bias=bias, converged=abs(bias) < found.sem / 2)

    def _unresolved_tail(self, epsilon: float) -> float:
        """How much the smallest node's weight would take off the log-volume at s = 0, where that node still falls with the steps.

        A logarithm that reaches far below the smallest node converges too slowly for its last changes to show it.
        """
        (nodes, weights), (coarser, _) = self.levels[:2]
        place = torch.where(weights > 0, nodes, torch.inf).argmin(dim=1, keepdim=True)
        smallest, weight = nodes.gather(1, place)[:, 0], weights.gather(1, place)[:, 0]
        falling = smallest < coarser.min(dim=1).values / STILL_FALLING
        return (weight * 0.5 * torch.log1p(smallest.square() / epsilon**2) * falling).mean().item()

    def local_rank(self) -> Estimate:
        """nu = exp(-Σ p_i log p_i), p_i = s_i / Σ s; its standard error by the jackknife over probes."""

        def entropy_term(s: Tensor) -> Tensor:
            return s * s.clamp_min(torch.finfo(s.dtype).tiny).log()

        def nu(first: Tensor, second: Tensor) -> float:
            total = first.mean().item()
            return math.exp(math.log(total) - second.mean().item() / total) if total > 0 else 0.0

        sums, terms = self.sums(lambda s: s), self.sums(entropy_term)
        value = nu(sums, terms)
        if self.exact:
            shifts = (self.rounding, -self.rounding)
            moved = [nu(self.sums(lambda s: s, 0, d), self.sums(entropy_term, 0, d)) for d in shifts]
            return Estimate(value, bias=max(abs(m - value) for m in moved), products=self.products)
        coarser = (nu(self.sums(lambda s: s, level), self.sums(entropy_term, level)) for level in (1, 2))
        bias = self._bias(value, *coarser)
        others = ~torch.eye(len(sums), dtype=torch.bool)
        sem = jackknife_sem([nu(sums[keep], terms[keep]) for keep in others]) * small_sample(len(sums))
        return Estimate(value, sem, bias, abs(bias) < sem / 2, self.products)

    def density(self, points: Tensor, width: float) -> list[Estimate]:
        """Density of singular values at ``points``, smoothed by a Gaussian of standard deviation ``width``; integrates to 1."""
        if not width > 0:
            raise ValueError(f"width={width}. Expected width > 0.")
        norm = self.size * width * math.sqrt(2 * math.pi)
        return [self.total(lambda s, p=p: torch.exp(-0.5 * ((s - p) / width) ** 2) / norm) for p in points.tolist()]


def lanczos_quadrature(
    jacobian: Jacobian, *, num_probes: int = 16, num_steps: int = 30, generator: torch.Generator | None = None
) -> Quadrature:
    """Quadratures of the spectrum of JᵀJ seen by random probes: 2 num_probes num_steps products (2 a step and probe).

    When that budget reaches the dimension, the dense Jacobian is taken instead and every sum is exact.

    Args:
        jacobian: Products with J and Jᵀ.
        num_probes: Rademacher probes; errors fall with its square root. Of fewer than about 8 the standard error itself is unsure.
        num_steps: Lanczos steps, fully reorthogonalised; the bias falls with these.
        generator: The probes; a fixed seed by default.

    Raises:
        ValueError: fewer than 4 probes or 4 steps.

    References:
        Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature (Ubaru, Chen, Saad, 2017)
    """
    if num_probes < 4 or num_steps < 4:
        raise ValueError(f"num_probes={num_probes}, num_steps={num_steps}. Expected at least 4 of both.")
    columns = jacobian.shape[1]
    if 2 * num_probes * num_steps >= jacobian.dense_products:
        values = torch.linalg.svdvals(jacobian.dense().cpu().double())
        nodes = torch.cat([values, values.new_zeros(columns - len(values))])[None]
        rounding = jacobian.rounding(values[0].item())
        return Quadrature(((nodes, torch.ones_like(nodes)),), columns, True, jacobian.dense_products, rounding)
    probes = rademacher(num_probes, jacobian.x.shape, jacobian.x, generator or torch.Generator().manual_seed(0))
    before = jacobian.products
    bidiagonal = _bidiagonals(jacobian, probes.flatten(1).cpu().double() / math.sqrt(columns), num_steps)
    levels = tuple(_gauss(bidiagonal[:, :k, :k], columns) for k in (num_steps, num_steps // 2, num_steps // 4))
    rounding = jacobian.rounding(levels[0][0].max().item())
    return Quadrature(levels, columns, False, jacobian.products - before, rounding)


def _gauss(bidiagonal: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the quadrature of each probe, (probes, k)."""
    _, nodes, right = torch.linalg.svd(bidiagonal)
    return nodes, size * right[..., 0].square()


def _bidiagonals(jacobian: Jacobian, start: Tensor, steps: int) -> Tensor:
    """Golub-Kahan bidiagonals of all probes side by side, (probes, steps, steps); ``start`` holds unit vectors (probes, n)."""
    probes, x = len(start), jacobian.x
    result = torch.zeros(probes, steps, steps, dtype=torch.float64)
    right, left = start[:, None], start.new_empty(probes, 0, jacobian.shape[0])
    beta = torch.zeros(probes, dtype=torch.float64)
    scale = torch.zeros(probes, dtype=torch.float64)
    for j in range(steps):
        image = jacobian.jvp(right[:, -1].reshape(probes, *x.shape).to(x)).flatten(1).cpu().double()
        if j:
            image = image - beta[:, None] * left[:, -1]
        image, alpha, scale = _normalised(image, left, scale, x.dtype)
        left = torch.cat([left, image[:, None]], dim=1)
        result[:, j, j] = alpha
        if j + 1 == steps:
            break
        pulled = jacobian.vjp(image.reshape(probes, *jacobian.value.shape).to(x)).flatten(1).cpu().double()
        pulled, beta, scale = _normalised(pulled - alpha[:, None] * right[:, -1], right, scale, x.dtype)
        right = torch.cat([right, pulled[:, None]], dim=1)
        result[:, j, j + 1] = beta
    return result


def _normalised(vectors: Tensor, basis: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (probes, n) orthogonal to each probe's basis (probes, k, n), at unit length, and their lengths.

    A length below rounding ends that probe's recursion: the vector becomes zero, and so does all that follows.
    """
    for _ in range(2):
        vectors = vectors - torch.einsum("pk,pkn->pn", torch.einsum("pkn,pn->pk", basis, vectors), basis)
    lengths = vectors.norm(dim=1)
    scale = torch.maximum(scale, lengths)
    ended = lengths <= 10 * torch.finfo(dtype).eps * scale
    lengths = torch.where(ended, torch.zeros_like(lengths), lengths)
    return torch.where(ended[:, None], 0.0, vectors / lengths.clamp_min(torch.finfo(vectors.dtype).tiny)[:, None]), lengths, scale
