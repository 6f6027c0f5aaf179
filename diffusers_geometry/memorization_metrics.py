"""How well a score separates memorised prompts from others: ROC, AUROC, the true positive rate at a small false positive rate.

AUROC is the probability that a positive scores higher than a negative, ties counting one half (Mann and Whitney). The true positive
rate at a false positive rate f is that of the lowest threshold whose false positives are at most a share f of the negatives: with n
negatives no rate below 1/n but 0 can be seen, so at f = 0.01 and n < 100 it is the rate of positives above every negative.

Error bars resample prompts, positives and negatives apart: the seeds of one prompt share their fate and are no sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

BOOTSTRAP_DRAWS = 1000
FALSE_POSITIVE_RATE = 0.01


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def auroc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """P(positive > negative) + P(equal) / 2, from scores (p,) and (n,)."""
    _require_both(positives, negatives)
    ranks = rankdata(np.concatenate([positives, negatives]))
    count = len(positives)
    return float((ranks[:count].sum() - count * (count + 1) / 2) / (count * len(negatives)))


def tpr_at_fpr(positives: np.ndarray, negatives: np.ndarray, rate: float = FALSE_POSITIVE_RATE) -> float:
    """Share of positives strictly above the threshold that at most a share ``rate`` of the negatives exceeds."""
    return float((np.asarray(positives) > threshold_at_fpr(negatives, rate)).mean())


def threshold_at_fpr(negatives: np.ndarray, rate: float = FALSE_POSITIVE_RATE) -> float:
    """The smallest of the negatives' scores that at most a share ``rate`` of them exceeds."""
    _require_both(negatives, negatives)
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate}. Expected 0 <= rate < 1, a share of the negatives.")
    ordered = np.sort(np.asarray(negatives, dtype=np.float64))
    # A tiny slack: 0.29 * 100 is 28.999999999999996, and 29 of 100 are a share of 0.29.
    return float(ordered[len(ordered) - 1 - int(rate * len(ordered) * (1 + 1e-12))])


def roc(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(false, true) positive rates as the threshold falls through every distinct score, both from 0 to 1."""
    _require_both(positives, negatives)
    thresholds = np.unique(np.concatenate([positives, negatives]))[::-1]
    rates = [1 - np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores) for scores in (negatives, positives)]
    return tuple(np.concatenate([[0.0], rate]) for rate in rates)


def bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    positives: np.ndarray,
    negatives: np.ndarray,
    *,
    seed: int = 0,
    draws: int = BOOTSTRAP_DRAWS,
) -> Interval:
    """A statistic of two samples with its 95 % percentile interval, positives and negatives resampled apart.

    Perfect separation has the interval [1, 1] by construction; the interval then says nothing, and the number of positives does.

    References:
        An Introduction to the Bootstrap (Efron and Tibshirani, 1993), chapter 13
    """
    positives, negatives, rng = np.asarray(positives), np.asarray(negatives), np.random.default_rng(seed)
    found = [statistic(rng.choice(positives, len(positives)), rng.choice(negatives, len(negatives))) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(statistic(positives, negatives), float(low), float(high))


def _require_both(positives: np.ndarray, negatives: np.ndarray) -> None:
    for name, scores in (("positives", positives), ("negatives", negatives)):
        if np.ndim(scores) != 1 or not len(scores) or not np.isfinite(scores).all():
            raise ValueError(f"{name} have shape {np.shape(scores)}. Expected (n,), n >= 1, all finite.")
