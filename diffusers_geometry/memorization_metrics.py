"""How well a score separates memorised prompts from others: ROC, AUROC, the true positive rate at a small false positive rate.

AUROC is the probability that a positive scores higher than a negative, ties counting one half (Mann and Whitney). The true positive
rate at a false positive rate f is that of the lowest threshold whose false positives are at most a share f of the negatives: with n
negatives no rate below 1/n but 0 can be seen, so at f = 0.01 and n < 100 it is the rate of positives above every negative.

Error bars resample prompts, positives and negatives apart: the seeds of one prompt share their fate and are no sample. Resampling
never shows a case that was not seen: where every positive lies above every negative it gives [1, 1], however few they are. So each
interval is joined with one that follows from the counts:

    AUROC               every A that lies within 1.96 standard errors of the one that was seen, the standard error taken at A. Its
                        square for p positives and n negatives is, with Q = A / (2 - A) and R = 2 A² / (1 + A),
                        [A (1 - A) + (p - 1) (Q - A²) + (n - 1) (R - A²)] / (p n)        Hanley and McNeil 1982; Newcombe 2006
                        of exponential scores, or what p and n exchanged give, of scores skewed the other way, if that is larger
    true positive rate  Clopper and Pearson's of so many hits, exact for a given threshold

"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, rankdata

BOOTSTRAP_DRAWS = 1000
LEVEL = 0.95
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

    Perfect separation has the interval [1, 1] by construction: see :func:`auroc_interval` and :func:`tpr_interval`.

    References:
        An Introduction to the Bootstrap (Efron and Tibshirani, 1993), chapter 13
    """
    positives, negatives, rng = np.asarray(positives), np.asarray(negatives), np.random.default_rng(seed)
    found = [statistic(rng.choice(positives, len(positives)), rng.choice(negatives, len(negatives))) for _ in range(draws)]
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(statistic(positives, negatives), float(low), float(high))


def auroc_interval(positives: np.ndarray, negatives: np.ndarray, *, seed: int = 0, draws: int = BOOTSTRAP_DRAWS) -> Interval:
    """:func:`auroc` with its 95 % interval: the bootstrap's, joined with the one that the counts give.

    Exponential scores have a variance near that of most shapes. Where a share of the positives hides below the negatives, the
    interval of the true positive rate tells more.

    References:
        Confidence intervals for an effect size measure based on the Mann-Whitney statistic, part 2 (Newcombe, Statistics in
        Medicine 25, 2006), whose method 5 takes the mean of both counts where this takes each
        The meaning and use of the area under a ROC curve (Hanley and McNeil, Radiology 143, 1982)
    """
    found = bootstrap(auroc, positives, negatives, seed=seed, draws=draws)
    return _joined(found, *_counted_auroc(found.value, len(positives), len(negatives)))


def tpr_interval(
    positives: np.ndarray,
    negatives: np.ndarray,
    rate: float = FALSE_POSITIVE_RATE,
    *,
    seed: int = 0,
    draws: int = BOOTSTRAP_DRAWS,
) -> Interval:
    """:func:`tpr_at_fpr` with its 95 % interval: the bootstrap's, which moves the threshold, joined with the exact one of the hits.

    References:
        The use of confidence or fiducial limits illustrated in the case of the binomial (Clopper and Pearson, Biometrika 26, 1934)
    """
    found = bootstrap(lambda p, n: tpr_at_fpr(p, n, rate), positives, negatives, seed=seed, draws=draws)
    exact = binomtest(round(found.value * len(positives)), len(positives)).proportion_ci(LEVEL, method="exact")
    return _joined(found, exact.low, exact.high)


def _counted_auroc(seen: float, positives: int, negatives: int) -> tuple[float, float]:
    """Ends of the AUROCs from which ``seen`` is no further than their own standard error allows."""

    def excess(area: float) -> float:
        """Squared distance of A from what was seen, less what is allowed."""
        one, two = area * (1 - area) ** 2 / (2 - area), area**2 * (1 - area) / (1 + area)  # Q - A², R - A²
        p, n = positives - 1, negatives - 1
        variance = (area * (1 - area) + max(p * one + n * two, n * one + p * two)) / (positives * negatives)
        return (seen - area) ** 2 - norm.ppf((1 + LEVEL) / 2) ** 2 * variance

    edge = 1e-12  # the variance is zero at 0 and 1, where excess has another root if that was seen
    low = brentq(excess, 0.0, max(seen - edge, edge)) if seen > edge else 0.0
    high = brentq(excess, min(seen + edge, 1 - edge), 1.0) if seen < 1 - edge else 1.0
    return low, high


def _joined(found: Interval, low: float, high: float) -> Interval:
    return Interval(found.value, min(found.low, float(low)), max(found.high, float(high)))


def _require_both(positives: np.ndarray, negatives: np.ndarray) -> None:
    for name, scores in (("positives", positives), ("negatives", negatives)):
        if np.ndim(scores) != 1 or not len(scores) or not np.isfinite(scores).all():
            raise ValueError(f"{name} have shape {np.shape(scores)}. Expected (n,), n >= 1, all finite.")
