"""Singular values of a Jacobian: dense, or by the randomised range finder.

Dense: the matrix by automatic differentiation, then its singular values in float64. Exact; min(m, n) products.

Randomised (as arXiv:2408.08307 projects, after Halko, Martinsson and Tropp, 2011): Q = orth(J Omega), values of QᵀJ. They lie below
those of J by at most |(I - QQᵀ)J|, which is bounded from fresh probes (their equation 4.3).

Block Golub-Kahan, for the largest values at any size, is in :mod:`.golub_kahan`; methods that need function values only are in
:mod:`.function_values`.
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

NUM_OVERSAMPLES = 8
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
        floor: Rounding, below which a value is no different from zero.
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
    floor: float = 0.0
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


def matrix_spectrum(
    matrix: Tensor, *, method: str, products: int, bound: float | Callable[[float], float] = 0.0, step: float | None = None
) -> Spectrum:
    """The spectrum of a matrix in hand, shape (m, n), in float64.

    Args:
        matrix: The matrix.
        method: How its entries were obtained.
        products: What they cost.
        bound: Spectral norm of the error of the matrix, or a function that gives it for the largest singular value.
        step: The difference step.
    """
    matrix = require_finite(matrix.detach().cpu().double(), "the Jacobian")
    values = torch.linalg.svdvals(matrix)
    bound = bound(values[0].item()) if callable(bound) else bound
    square = matrix.shape[0] == matrix.shape[1]
    eigenvalues = asymmetry = trace = None
    if square:
        eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)
        even, odd = (matrix + matrix.T).norm().item(), (matrix - matrix.T).norm().item()
        asymmetry = odd / even if even > 0 else (math.inf if odd > 0 else 0.0)
        trace = Estimate(matrix.trace().item(), bias=bound * math.sqrt(len(matrix)), products=products)
    return Spectrum(
        values,
        tuple(matrix.shape),
        method,
        products,
        bounds=torch.full_like(values, bound) if bound else None,
        floor=bound,
        eigenvalues=eigenvalues,
        asymmetry=asymmetry,
        trace=trace,
        step=step,
    )


def dense_spectrum(jacobian: Jacobian) -> Spectrum:
    """All singular values from the dense Jacobian; exact for an automatic derivative; min(m, n) products."""
    before = jacobian.products
    matrix = jacobian.dense()
    products = jacobian.products - before
    return matrix_spectrum(matrix, method="dense", products=products, bound=jacobian.rounding, step=jacobian.step)


def randomized_spectrum(
    jacobian: Jacobian,
    num_singular_values: int,
    *,
    num_oversamples: int = NUM_OVERSAMPLES,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """The largest singular values of QᵀJ, Q = orth(J Omega): 2 (k + p) products and 5 more that bound the bias.

    Exact when k + p reaches the rank; else every value is too small, by at most ``bounds`` (with probability 1 - 10^-5).

    Args:
        jacobian: Products with J and Jᵀ.
        num_singular_values: k, at most min(m, n).
        num_oversamples: p.
        tol: Relative bound at which a value counts as converged.
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
    rounding = jacobian.rounding(values[0].item())
    bounds = torch.full_like(values, bound + rounding)
    return Spectrum(
        values,
        jacobian.shape,
        "randomized",
        jacobian.products - before,
        complete=len(values) == limit,
        bounds=bounds,
        floor=rounding,
        converged=bounds <= tol * values,
        details={"num_singular_values": num_singular_values, "num_oversamples": num_oversamples, "bias": -bound},
    )
