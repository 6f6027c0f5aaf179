"""Units of the bulk: how far a number lies from most of its kind, where a share of them is unlike the rest.

The unit is 1.4826 times the median absolute deviation (MAD), the standard deviation of a normal bulk that outliers do not move. Of
few numbers the MAD itself scatters: of four normal ones some lies beyond four units in one audit of 23, of 100 in one of 5,000. The
distance beyond which a number counts as outlying is therefore one that a normal bulk of the same count passes with a probability of
at most FAMILY_RATE, and never less than OUTLYING.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.stats import norm

OUTLYING = 4.0  # units; of a large normal bulk one prompt in 30,000 lies beyond
SOFT = 3.0  # units beyond which a number counts by its logarithm
FAMILY_RATE = 0.01  # of audits of a normal bulk, those in which any number is outlying
_DRAWS = 20_000


def bulk(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and 1.4826 MAD of columns (n, k), each (k,); 1 where half of the values are equal."""
    centre = np.median(values, axis=0)
    spread = np.median(np.abs(values - centre), axis=0) / norm.ppf(0.75)
    return centre, np.where(spread > 0, spread, 1.0)


def softened(values: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Values in units of the bulk, by their logarithm beyond SOFT of them."""
    return SOFT * np.arcsinh((values - centre) / (SOFT * spread))


@functools.cache
def outlying(count: int) -> tuple[float, float]:
    """The distance beyond which one of ``count`` numbers is outlying, and how many a normal bulk puts there.

    By simulation of one score with a fixed seed, softened and brought to units of its bulk again as an audit does.
    """
    draws = max(1000, min(_DRAWS, 2_000_000 // count))
    found = np.random.default_rng(0).standard_normal((count, draws))
    soft = softened(found, *bulk(found))
    centre, spread = bulk(soft)
    distance = (soft - centre) / spread
    threshold = max(OUTLYING, float(np.quantile(distance.max(axis=0), 1 - FAMILY_RATE)))
    return threshold, float((distance > threshold).sum(axis=0).mean())
