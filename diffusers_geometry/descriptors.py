"""Descriptors of a Jacobian A with singular values s_1 >= s_2 >= ... (arXiv:2408.08307).

    local scaling  psi = Σ log s_i over the counted values: the log volume change, in nats
    local rank     nu  = exp(-Σ p_i log p_i), p_i = s_i / Σ s: how many directions the map keeps, scale free

psi(cA) = psi(A) + R log c with R the counted number of values, so psi is compared at equal R only; the threshold is relative to
s_1, an absolute one would break that law. nu takes s, not s².
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .spectrum import Spectrum
from .estimate import Estimate


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
        spectrum: Singular values s, shape (k,).
        relative_threshold: Counts s_i > relative_threshold s_1.
        rank: Counts the R largest instead, for comparing samples.

    Returns:
        psi with its counted rank; psi = 0 with rank 0 for a zero map.

    Raises:
        ValueError: threshold outside [0, 1), or fewer than ``rank`` positive values.
    """
    if not 0 <= relative_threshold < 1:
        raise ValueError(f"relative_threshold={relative_threshold}. Expected 0 <= relative_threshold < 1.")
    positive = int((spectrum.singular_values > 0).sum())
    if rank is not None and not 1 <= rank <= positive:
        raise ValueError(f"rank={rank}. Expected 1 <= rank <= {positive}, the positive singular values in hand.")

    def counted(values: Tensor) -> Tensor:
        return values[values > relative_threshold * values.max()] if rank is None else values[:rank]

    def psi(values: Tensor) -> float:
        kept = counted(values)
        return kept.clamp_min(math.ulp(0.0)).log().sum().item() if kept.numel() else 0.0

    result = spectrum.estimate(psi)
    count = counted(spectrum.singular_values).numel()
    return LocalScaling(result.value, result.sem, result.bias, result.converged, result.products, rank=count)


def local_rank(spectrum: Spectrum) -> Estimate:
    """Local rank nu = exp(-Σ p_i log p_i), p_i = s_i / Σ s; 0 for a zero map, else in [1, number of values].

    References:
        What Secrets Do Your Manifolds Hold? (Humayun et al., 2025), https://arxiv.org/abs/2408.08307, Definition 2

    Args:
        spectrum: Singular values s, shape (k,), in any unit: nu is scale free.
    """

    def nu(values: Tensor) -> float:
        positive = values[values > 0]
        if not positive.numel():
            return 0.0
        shares = positive / positive.sum()
        return math.exp(-(shares * shares.log()).sum().item())

    return spectrum.estimate(nu)
