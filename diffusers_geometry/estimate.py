"""Numbers with their error: every random or approximated quantity is an :class:`Estimate`."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A number and what is known of its error.

    Attributes:
        value: The number.
        sem: Standard error of the mean of its random part; 0 for exact numbers, None where it is not known.
        bias: Estimate or bound of the systematic part in the same unit, value minus truth where its sign is known; None where it
            is not known.
        converged: Whether the method met its own tolerance; exact numbers have.
        products: Jacobian products spent on it.
    """

    value: float
    sem: float | None = 0.0
    bias: float | None = 0.0
    converged: bool = True
    products: int = 0

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        if self.sem is None:
            return f"{self.value:.6g} (error unknown)"
        return f"{self.value:.6g}" if self.sem == 0 else f"{self.value:.6g} ± {self.sem:.2g}"


def jackknife_sem(replicates: list[float]) -> float:
    """Standard error from delete-a-group jackknife replicates: sqrt((G - 1)/G Σ (value_g - mean)^2).

    References:
        The Jackknife, the Bootstrap and Other Resampling Plans (Efron, 1982), chapter 3.
    """
    groups = len(replicates)
    if groups < 2:
        raise ValueError(f"{groups} jackknife replicates. Expected at least 2.")
    mean = math.fsum(replicates) / groups
    return math.sqrt((groups - 1) / groups * math.fsum((r - mean) ** 2 for r in replicates))
