"""Whether a score tells spoiled images from whole ones, and one set of images from another.

The direction of a score (are spoiled images higher or lower?) is fixed on one half of the images and tested on the other, so a
score that says nothing has an area of one half under its ROC curve, less as often as more. A whole image and its spoiled copies
stay together: in one half, and in every resample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from resampling import Interval, auroc, interval

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Separation:
    """Areas by score on the unseen half, and how far the best descriptor is above the best baseline, both chosen on the other."""

    areas: dict[str, Interval]
    seen: dict[str, float]
    descriptor: str
    baseline: str
    gain: Interval


def directions(whole: Scores, spoiled: list[Scores]) -> dict[str, float]:
    """+1 for a score that is higher on the spoiled images, -1 for one that is lower."""
    return {name: 1.0 if auroc(whole[name], np.concatenate([s[name] for s in spoiled])) >= 0.5 else -1.0 for name in whole}


def separation(whole: Scores, spoiled: list[Scores], descriptors: tuple[str, ...]) -> Separation:
    """Of whole images from one or several spoiled copies of each.

    Args:
        whole: Values by the name of the score, each (n,).
        spoiled: The same of the copies, in the same order of images.
        descriptors: Names of the scores that are descriptors; the others are baselines.
    """
    fitted, tested = ([_half(s, part) for s in (whole, *spoiled)] for part in (0, 1))
    signs = directions(fitted[0], fitted[1:])
    seen = {n: float(auroc(sign * fitted[0][n], sign * np.concatenate([s[n] for s in fitted[1:]]))) for n, sign in signs.items()}
    areas = {n: interval(_area, *(sign * s[n] for s in tested)) for n, sign in signs.items()}
    best = [max((n for n in seen if (n in descriptors) == own), key=seen.get) for own in (True, False)]
    pairs = [signs[n] * s[n] for n in best for s in tested]
    return Separation(areas, seen, *best, interval(_gain, *pairs))


def _half(scores: Scores, part: int) -> Scores:
    return {name: values[part::2] for name, values in scores.items()}


def _area(whole: np.ndarray, *spoiled: np.ndarray, axis: int = -1) -> np.ndarray:
    return auroc(whole, np.concatenate(spoiled, axis=axis), axis=axis)


def _gain(*scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Area of the first half of the arguments less that of the second."""
    middle = len(scores) // 2
    return _area(*scores[:middle], axis=axis) - _area(*scores[middle:], axis=axis)
