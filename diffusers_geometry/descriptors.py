"""Descriptors of a Jacobian A with singular values s_1 >= s_2 >= ... (arXiv:2408.08307).

    local scaling  psi = Σ log s_i over the counted values: the log volume change, in nats
    local rank     nu  = exp(-Σ p_i log p_i), p_i = s_i / Σ s: how many directions the map keeps, scale free

psi(cA) = psi(A) + R log c with R the counted number of values, so psi is compared at equal R only; the threshold is relative to
s_1, an absolute one would break that law. nu takes s, not s².

psi is also read from a random projection WA of the outputs, k probes w as rows (the paper's way for large decoders). For k >= R =
rank(A) its expectation is known exactly whatever A is, through the log-determinant of a Wishart matrix:

    Gaussian w ~ N(0, I):   E psi(WA) - psi(A) = 1/2 Σ_{i<R} [digamma((k-i)/2) + log 2]
    orthonormal rows:       E psi(WA) - psi(A) = 1/2 Σ_{i<R} [digamma((k-i)/2) - digamma((m-i)/2)]

and so is its variance, 1/4 Σ of the trigamma functions. Subtracting the first makes estimates with different k agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .estimate import Estimate
from .jacobian import Jacobian
from .spectrum import Spectrum


@dataclass(frozen=True)
class LocalScaling(Estimate):
    """psi as an :class:`Estimate`, in nats, with the number of singular values it sums.

    Attributes:
        rank: Counted values R.
    """

    rank: int = 0

    @property
    def per_direction(self) -> float:
        """psi / R, nats per counted direction; 0 when none is."""
        return self.value / self.rank if self.rank else 0.0


def local_scaling(spectrum: Spectrum, relative_threshold: float = 1e-3, rank: int | None = None) -> LocalScaling:
    """Local scaling psi = Σ log s_i, in nats.

    References:
        What Secrets Do Your Manifolds Hold? (Humayun et al., 2025), https://arxiv.org/abs/2408.08307, Definition 1

    Args:
        spectrum: Singular values s, shape (k,). Of an incomplete spectrum psi is that of the values in hand, and not converged
            when all of them count.
        relative_threshold: Counts s_i > relative_threshold s_1 that stand above rounding (and the error of differences).
        rank: Counts the R largest instead, for comparing samples.

    Returns:
        psi with its counted rank. A zero map has psi = 0 with rank 0 (a sum of nothing), and minus infinity at a given rank.

    Raises:
        ValueError: threshold outside [0, 1), or fewer than ``rank`` values in hand.
    """
    if not 0 <= relative_threshold < 1:
        raise ValueError(f"relative_threshold={relative_threshold}. Expected 0 <= relative_threshold < 1.")
    in_hand = len(spectrum.singular_values)
    if rank is not None and not 1 <= rank <= in_hand:
        raise ValueError(f"rank={rank}. Expected 1 <= rank <= {in_hand}, the singular values in hand.")
    smallest = max(spectrum.floor, relative_threshold * spectrum.singular_values.max().item())
    count = int((spectrum.singular_values > smallest).sum())
    count = count if rank is None else rank

    def psi(values: Tensor) -> float:
        return values[:count].log().sum().item() if count else 0.0

    result = spectrum.estimate(psi)
    # All values in hand count: of an incomplete spectrum there may be more above the threshold.
    cut = spectrum.complete or rank is not None or count < len(spectrum.singular_values)
    return LocalScaling(result.value, result.sem, result.bias, result.converged and cut, result.products, rank=count)


def local_rank(spectrum: Spectrum) -> Estimate:
    """Local rank nu = exp(-Σ p_i log p_i), p_i = s_i / Σ s; 0 for a zero map, else in [1, number of values].

    Values that do not stand above rounding are taken for zero.

    References:
        What Secrets Do Your Manifolds Hold? (Humayun et al., 2025), https://arxiv.org/abs/2408.08307, Definition 2

    Args:
        spectrum: Singular values s, shape (k,), in any unit: nu is scale free. Of an incomplete spectrum nu is that of the values
            in hand, which is too small by an unknown bias; Lanczos quadrature has it without the spectrum.
    """
    present = spectrum.singular_values > spectrum.floor

    def nu(values: Tensor) -> float:
        positive = values[present[: len(values)] & (values > 0)]
        if not positive.numel():
            return 0.0
        shares = positive / positive.sum()
        return math.exp(-(shares * shares.log()).sum().item())

    result = spectrum.estimate(nu)
    return result if spectrum.complete else replace(result, bias=None, converged=False)


def projected_local_scaling(
    jacobian: Jacobian,
    num_products: int,
    rank: int,
    *,
    projection: Literal["gaussian", "orthonormal"] = "orthonormal",
    generator: torch.Generator | None = None,
) -> LocalScaling:
    """psi of a Jacobian of known rank from ``num_products`` reverse products, corrected for the projection.

    Args:
        jacobian: Of shape (m, n).
        num_products: Probes k, from ``rank`` to m; at least twice the rank for a small error. k = m is exact.
        rank: R, the number of singular values that psi counts. The rest must be zero: this is not a top-R estimate.
        projection: "gaussian", or "orthonormal" rows (smaller error).
        generator: The probes; a fixed seed by default.

    Returns:
        psi in nats with its exact standard error, which the theory gives for any Jacobian.

    Raises:
        ValueError: fewer probes than the rank, or more than outputs.

    References:
        What Secrets Do Your Manifolds Hold? (Humayun et al., 2025), https://arxiv.org/abs/2408.08307, section 2
    """
    outputs = jacobian.shape[0]
    if projection not in ("gaussian", "orthonormal") or not 1 <= rank <= min(num_products, jacobian.shape[1]):
        raise ValueError(
            f"num_products={num_products}, rank={rank}, projection={projection!r}. Expected 'gaussian' or 'orthonormal' and "
            f"1 <= rank <= num_products <= {outputs}, rank <= {jacobian.shape[1]}: fewer probes than the rank lose directions."
        )
    if num_products > outputs:
        raise ValueError(f"num_products={num_products}. Expected at most {outputs}, the outputs.")
    generator = generator or torch.Generator().manual_seed(0)
    probes = torch.randn(outputs, num_products, generator=generator, dtype=torch.float64)
    if projection == "orthonormal" or num_products == outputs:
        probes, projection = torch.linalg.qr(probes)[0], "orthonormal"
    rows = jacobian.vjp(probes.T.reshape(num_products, *jacobian.value.shape).to(jacobian.x)).flatten(1).cpu().double()
    values = torch.linalg.svdvals(rows)[:rank]
    rounding = jacobian.rounding(values[0].item())
    if not values[-1] > rounding:
        raise ValueError(
            f"rank={rank}, but only {int((values > rounding).sum())} singular values of the projection stand above rounding. "
            "Expected the rank of the Jacobian."
        )
    shape = torch.arange(rank, dtype=torch.float64)
    shift, variance = _log_moments((num_products - shape) / 2)
    if projection == "orthonormal":
        outer_shift, outer_variance = _log_moments((outputs - shape) / 2)
        shift, variance = shift - outer_shift, max(0.0, variance - outer_variance)
    else:
        shift += rank * math.log(2) / 2
    sem = math.sqrt(variance) if num_products < outputs else 0.0
    return LocalScaling(values.log().sum().item() - shift, sem, products=num_products, rank=rank)


def _log_moments(half_degrees: Tensor) -> tuple[float, float]:
    """Mean (without log 2) and variance of 1/2 log of a product of chi-squared variables with these halved degrees."""
    return 0.5 * torch.digamma(half_degrees).sum().item(), 0.25 * torch.polygamma(1, half_degrees).sum().item()
