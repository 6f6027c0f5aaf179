"""The closed forms of a linear manifold: spectra, gaps and phases of x_0 = F z over the noise (Ventura et al., arXiv:2410.05898).

z ~ N(0, I_m) and F is d x m with independent Gaussian entries; a share f_k of its columns has entry variance tau_k / m
(``norm="m"``) or tau_k / d (``norm="d"``, eigenvalues alpha times as large). With alpha = m / d and t = sigma^2, the score
Jacobian is J = -(F F^T + t)^-1 and D' = I + t J = F F^T (F F^T + t)^-1 at every point. All follows from the eigenvalues l of F F^T:

    J: -1 / (l + t)        D': u = l / (l + t)        both with an atom of weight 1 - alpha (at -1 / t and at 0) from l = 0

For d -> infinity l has a density, see :mod:`.silverstein`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from .silverstein import EigenvalueLaw

SAME_VARIANCE, LEAST_FRACTION = 1e-10, 1e-20  # relative difference of variances, and share of a group, that doubles can tell
QUANTILE_NODES = 4001  # of the grid over a bulk from which quantiles are read
# Mean and standard deviation of the Tracy-Widom law for real matrices (Tracy and Widom 1996; Bornemann 2010, arXiv:0904.1581).
TRACY_WIDOM_MEAN, TRACY_WIDOM_SD = -1.2065335745820, 1.2680340580160


class LinearManifold:
    """Spectrum of F F^T in the limit of large dimensions, and what follows for J and D' at t = sigma^2.

    Args:
        dim_ratio: alpha = m / d, positive; above 1 the data fill the space.
        variances: tau_k of the groups of columns, positive.
        fractions: Share f_k of the columns in each group, positive, summing to one; equal if None.
        norm: "m" for entries of variance tau / m, "d" for tau / d.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        dim_ratio: float,
        variances: Sequence[float] = (1.0,),
        fractions: Sequence[float] | None = None,
        norm: Literal["m", "d"] = "m",
    ) -> None:
        variances = _group_numbers("variances", variances)
        if fractions is None:
            fractions = [1 / max(len(variances), 1)] * len(variances)
        fractions = _group_numbers("fractions", fractions)
        if not (0 < dim_ratio < math.inf):
            raise ValueError(f"dim_ratio={dim_ratio}. Expected a finite number > 0, the ratio m / d.")
        if not variances or not all(0 < v < math.inf for v in variances):
            raise ValueError(f"variances={tuple(variances)}. Expected finite numbers > 0, one for each group of columns.")
        if len(fractions) != len(variances) or not all(f >= LEAST_FRACTION for f in fractions) or abs(sum(fractions) - 1) > 1e-9:
            raise ValueError(f"fractions={tuple(fractions)}. Expected {len(variances)} numbers > {LEAST_FRACTION} that sum to 1.")
        if norm not in ("m", "d"):
            raise ValueError(f"norm={norm!r}. Expected 'm' or 'd'.")
        self.dim_ratio, self.norm = float(dim_ratio), norm
        order = np.argsort(variances)  # ascending, as the bulks are
        tau, shares = np.array(variances)[order], np.array(fractions)[order]
        starts = np.flatnonzero(np.append(True, np.diff(tau) > SAME_VARIANCE * tau[1:]))  # equal ones are one group
        tau, shares = tau[starts], np.add.reduceat(shares, starts)
        self._law = EigenvalueLaw(self.dim_ratio, tau, shares)
        self._unit = 1.0 if norm == "m" else self.dim_ratio

    # -- Eigenvalues of F F^T -----------------------------------------------------------------------

    def bulk_edges(self) -> list[tuple[float, float]]:
        """(low, high) of every bulk of non-zero eigenvalues of F F^T, ascending."""
        values = [max(edge.value, 0.0) * self._unit for edge in self._law.edges]
        return list(zip(values[::2], values[1::2], strict=True))

    def bulk_masses(self) -> list[float]:
        """Share of all d eigenvalues in every bulk, ascending: alpha f_k where the variances are apart."""
        below = [int((-1 / self._law.tau < edge.h).sum()) for edge in self._law.edges[2::2]]  # groups under each later bulk
        upper = [self.dim_ratio * float(self._law.fractions[a:b].sum()) for a, b in pairwise([*below, len(self._law.fractions)])]
        return [min(self.dim_ratio, 1.0) - sum(upper), *upper]

    @property
    def atom(self) -> float:
        """Share of zero eigenvalues of F F^T, max(1 - alpha, 0): weight of the atom of J at -1/t and of D' at 0."""
        return max(1 - self.dim_ratio, 0.0)

    def density(self, eigenvalues: ArrayLike) -> np.ndarray:
        """Density of the non-zero eigenvalues of F F^T; it integrates to min(alpha, 1).

        Args:
            eigenvalues: Where, any shape; zero outside the bulks.

        Returns:
            The same shape, per unit of eigenvalue.
        """
        places = np.asarray(eigenvalues, float)
        return (self._law.density(places.ravel() / self._unit) / self._unit).reshape(places.shape)

    def bulk_counts(self, dim: int) -> list[int]:
        """How many of ``dim`` eigenvalues every bulk holds, ascending: sums of the masses from the top, rounded; dim >= 2."""
        _check_dim(dim)
        from_top = np.round(np.cumsum(self.bulk_masses()[::-1]) * dim).astype(int)
        return np.diff(np.append(0, from_top))[::-1].tolist()

    def eigenvalues(self, dim: int) -> np.ndarray:
        """What a matrix of d = ``dim`` rows has to expect, descending, (dim,): the middles of equal shares of every bulk."""
        found = [
            self._quantiles(low, high, count) for (low, high), count in zip(self.bulk_edges(), self.bulk_counts(dim), strict=True)
        ]
        positive = np.concatenate(found)[::-1]
        return np.append(positive, np.zeros(dim - len(positive)))

    def _quantiles(self, low: float, high: float, count: int) -> np.ndarray:
        """Values below which (i + 1/2) / count of one bulk lie, ascending, (count,)."""
        angles = np.linspace(0, math.pi, QUANTILE_NODES)
        places = (low + high) / 2 - (high - low) / 2 * np.cos(angles)  # close at the edges, where the density is a square root
        heights = self.density(places) * np.sin(angles)
        cumulative = np.append(0.0, np.cumsum((heights[1:] + heights[:-1]) / 2))
        return np.interp((np.arange(count) + 0.5) / count, cumulative / cumulative[-1], places)

    def edge_fluctuations(self, dim: int) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        """Mean and standard deviation of the extreme eigenvalues of every bulk at a finite dimension, by Tracy and Widom's law.

        An edge at h fluctuates on the scale s = (|z''(h)| / 2 m^2)^(1/3); for one variance that is Johnstone's scale.

        Args:
            dim: d, at least 2.

        Returns:
            For every bulk, ascending, ((mean, sd) of its smallest eigenvalue, (mean, sd) of its largest).

        Raises:
            ValueError: dim below 2, or alpha = 1, whose lowest edge at zero is of another kind.
        """
        _check_dim(dim)
        if self.dim_ratio == 1:
            raise ValueError("dim_ratio=1 has its lowest edge at zero, which Tracy and Widom's law does not describe.")
        number, found = self.dim_ratio * dim, []
        for edge in self._law.edges:
            scale = self._unit * (abs(self._law.curvature(edge.h)) / (2 * number**2)) ** (1 / 3)
            shift = -TRACY_WIDOM_MEAN if edge.is_lower else TRACY_WIDOM_MEAN
            found.append((self._unit * edge.value + shift * scale, TRACY_WIDOM_SD * scale))
        return list(zip(found[::2], found[1::2], strict=True))

    def critical_dim_ratios(self) -> list[float]:
        """alpha below which the bulks of neighbouring variances are apart, for every pair, ascending; may exceed 1.

        For two variances that is (tau_1 - tau_2)^2 / [(f tau_1^2)^(1/3) + ((1 - f) tau_2^2)^(1/3)]^3.
        """
        poles = (-1 / self._law.tau).tolist()
        return [1 / self._law.least_load(low, high)[1] for low, high in pairwise(poles)]

    # -- The Jacobians at t = sigma^2 ---------------------------------------------------------------

    def score_edges(self, t: ArrayLike) -> np.ndarray:
        """Edges of the bulks of J, -1 / (l + t) at those of F F^T; its atom lies at -1 / t.

        Args:
            t: Positive, any shape.

        Returns:
            Ascending in the bulks, (bulks, 2, *t.shape), low and high.
        """
        edges, times = np.array(self.bulk_edges()), _times(t, positive=True)
        return -1 / (edges.reshape(*edges.shape, *[1] * times.ndim) + times)

    def denoised_edges(self, t: ArrayLike) -> np.ndarray:
        """Edges of the bulks of D', l / (l + t) at those of F F^T; its atom lies at 0. As :meth:`score_edges`."""
        times = _times(t, positive=True)
        return 1 + times * self.score_edges(times)

    def score_density(self, values: ArrayLike, t: float) -> np.ndarray:
        """Density of the eigenvalues of J beside its atom at -1 / t: rho(-1/g - t) / g^2."""
        (t,), g = _times([t], positive=True), np.asarray(values, float)
        safe = np.where(g < 0, g, -1.0)
        return np.where(g < 0, self.density(-1 / safe - t) / safe**2, 0.0)

    def denoised_density(self, values: ArrayLike, t: float) -> np.ndarray:
        """Density of the eigenvalues of D' beside its atom at 0: rho(t u / (1 - u)) t / (1 - u)^2."""
        (t,), u = _times([t], positive=True), np.asarray(values, float)
        safe = np.where((u > 0) & (u < 1), u, 0.5)
        return np.where((u > 0) & (u < 1), self.density(t * safe / (1 - safe)) * t / (1 - safe) ** 2, 0.0)

    def effective_dimension(self, t: ArrayLike) -> np.ndarray:
        """tr D' / d, from min(alpha, 1) at t = 0 to 0 at t = infinity. Same shape as ``t``."""
        times = _times(t)
        return np.array([self._kept_share(value / self._unit) for value in times.ravel()]).reshape(times.shape)[()]

    def _kept_share(self, t: float) -> float:
        if t == 0:
            return min(self.dim_ratio, 1.0)
        return 0.0 if math.isinf(t) else self._law.kept_share(t)

    # -- Gaps and phases ----------------------------------------------------------------------------

    def _final_edge(self) -> float:
        if self.dim_ratio >= 1:
            raise ValueError(
                f"dim_ratio={self.dim_ratio} leaves no normal space, so there is no final gap. Expected dim_ratio < 1."
            )
        return self.bulk_edges()[0][0]

    def final_gap(self, t: ArrayLike) -> np.ndarray:
        """Gap between the manifold's directions and the normal ones, in D' units: l / (l + t) at the lowest edge l.

        It rises to 1 as t falls and never closes. In units of J it is 1 / t times that.

        Raises:
            ValueError: alpha >= 1, or t < 0.
        """
        return self._final_edge() / (self._final_edge() + _times(t))

    def final_gap_opening(self, resolution: float = 0.1) -> float:
        """t below which the final gap exceeds ``resolution`` (in D' units)."""
        return self._final_edge() * (1 - _resolution(resolution)) / resolution

    def _neighbours(self) -> list[tuple[float, float]]:
        """(upper edge of the lower bulk, lower edge of the upper one) for neighbouring bulks, ascending."""
        edges = self.bulk_edges()
        return [(below[1], above[0]) for below, above in pairwise(edges)]

    def intermediate_gaps(self, t: ArrayLike) -> np.ndarray:
        """Gaps between neighbouring bulks, in D' units, ascending in the bulks, shape (pairs, *t.shape); t >= 0."""
        times = _times(t)
        finite = np.where(np.isinf(times), 0.0, times)  # at either end every gap is closed
        found = [finite * (b - a) / ((a + finite) * (b + finite)) for a, b in self._neighbours()]
        return np.array(found).reshape(len(found), *times.shape)

    def gap_peak_times(self) -> np.ndarray:
        """t at which each intermediate gap is widest, the geometric mean of its edges, (pairs,), ascending in the bulks."""
        return np.array([math.sqrt(a * b) for a, b in self._neighbours()])

    def gap_peaks(self) -> np.ndarray:
        """Greatest width of each intermediate gap, in D' units, (pairs,)."""
        return np.array([(math.sqrt(b) - math.sqrt(a)) / (math.sqrt(b) + math.sqrt(a)) for a, b in self._neighbours()])

    def gap_window(self, resolution: float = 0.1) -> list[tuple[float, float] | None]:
        """(t_close, t_open) between which each intermediate gap exceeds ``resolution``; None where it never does.

        Generation runs from large to small t: a gap opens at t_open and closes at t_close.
        """
        delta, windows = _resolution(resolution), []
        for a, b in self._neighbours():
            half = ((b - a) - delta * (a + b)) / (2 * delta)
            beyond = half**2 - a * b
            if half <= 0 or beyond < 0:
                windows.append(None)
                continue
            t_open = half + math.sqrt(beyond)
            windows.append((a * b / t_open, t_open))
        return windows

    def phase_times(self, resolution: float = 0.1) -> tuple[float, float]:
        """(t_consolidation, t_trivial) by the eigenvalue rule of :mod:`~diffusers_geometry.phases`.

        Above t_trivial every eigenvalue of D' is below ``resolution``; below t_consolidation every one of the manifold is above
        1 - ``resolution``. Phases are crossovers: the times depend on the resolution.
        """
        delta, edges = _resolution(resolution, 0.5), self.bulk_edges()
        return edges[0][0] * delta / (1 - delta), edges[-1][1] * (1 - delta) / delta

    def bulk_width_peak(self) -> tuple[float, float]:
        """(t, width) at which the eigenvalues of D' are spread widest: t = sqrt(l_- l_+); sqrt(alpha) wide for one variance."""
        low, high = self.bulk_edges()[0][0], self.bulk_edges()[-1][1]
        return math.sqrt(low * high), (math.sqrt(high) - math.sqrt(low)) / (math.sqrt(high) + math.sqrt(low))


def _group_numbers(name: str, given: Sequence[float]) -> list[float]:
    if np.ndim(given) != 1:
        raise ValueError(f"{name}={given!r}. Expected a sequence of numbers, one for each group of columns, as ({given!r},).")
    return [float(v) for v in given]


def _check_dim(dim: int) -> None:
    if dim < 2:
        raise ValueError(f"dim={dim}. Expected at least 2.")


def _times(t: ArrayLike, *, positive: bool = False) -> np.ndarray:
    times = np.asarray(t, float)
    if not (times > 0 if positive else times >= 0).all():
        raise ValueError(f"t={t}. Expected t = sigma^2 {'> 0' if positive else '>= 0'}.")
    return times


def _resolution(resolution: float, below: float = 1.0) -> float:
    if not 0 < resolution < below:
        raise ValueError(f"resolution={resolution}. Expected 0 < resolution < {below:g}, in units of D'.")
    return resolution
