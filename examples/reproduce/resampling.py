"""Rank statistics with bootstrap intervals: Spearman's correlation, the area under a ROC curve, differences of means.

All take many resamples at once, along the last axis, so that scipy draws them in bulk. Intervals are of percentiles: they stay
within the range of a statistic that has one, and exist for an area of exactly one, where the corrected kinds do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, rankdata

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A statistic with its 95 % bootstrap interval and standard error."""

    value: float
    low: float
    high: float
    sem: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def unsigned(self) -> str:
        """The same for what has no sign."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def is_nonzero(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def interval(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray, paired: bool = True, resamples: int = RESAMPLES
) -> Interval:
    """The statistic of ``samples`` with its interval.

    Args:
        statistic: (*samples, axis=-1) -> array without that axis.
        samples: Each (n,); with ``paired`` their elements are drawn together, as they belong to the same image.
        paired: Whether they do; else each sample is drawn alone.
        resamples: Bootstrap draws.
    """
    options = {"n_resamples": resamples, "method": "percentile", "vectorized": True, "rng": np.random.default_rng(0)}
    found = bootstrap(samples, statistic, paired=paired, batch=200, **options)
    low, high = found.confidence_interval
    return Interval(float(statistic(*samples, axis=-1)), float(low), float(high), float(found.standard_error))


def spearman(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    """Rank correlation along an axis; 0 where one does not vary."""
    ranks = [rankdata(values, axis=axis) for values in (first, second)]
    centred = [r - r.mean(axis=axis, keepdims=True) for r in ranks]
    norms = np.sqrt(np.prod([(c**2).sum(axis=axis) for c in centred], axis=0))
    return (centred[0] * centred[1]).sum(axis=axis) / np.where(norms > 0, norms, 1)


def auroc(negative: np.ndarray, positive: np.ndarray, axis: int = -1) -> np.ndarray:
    """P(a positive scores above a negative), ties half: the Mann-Whitney statistic over the number of pairs."""
    count = positive.shape[axis]
    ranks = rankdata(np.concatenate([positive, negative], axis=axis), axis=axis)
    above = ranks.take(range(count), axis=axis).sum(axis=axis) - count * (count + 1) / 2
    return above / (count * negative.shape[axis])


def mean_difference(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the first less that of the second, in standard deviations of the second."""
    return (first.mean(axis=axis) - second.mean(axis=axis)) / second.std(axis=axis, ddof=1)


def spread_ratio(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    """Standard deviation of the first over that of the second."""
    return first.std(axis=axis, ddof=1) / second.std(axis=axis, ddof=1)
