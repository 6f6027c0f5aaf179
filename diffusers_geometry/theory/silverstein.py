"""The law of the eigenvalues of F F^T in large dimensions, by Silverstein's equation (Silverstein and Choi 1995).

F is d x m with independent Gaussian entries, alpha = m / d, and a share f_k of its columns has entry variance tau_k / m. The
resolvent g(z) = tr (F F^T - z)^-1 / d = alpha h is given by

    z(h) = -1 / (alpha h) + sum_k f_k tau_k / (1 + tau_k h)
    phi(h) = h^2 z'(h) = 1 / alpha - sum_k f_k (tau_k h / (1 + tau_k h))^2

The density at l is alpha max Im h / pi over the roots of z(h) = l, and the bulks end where phi = 0. Between its poles
-1 / tau_k < 0 phi is concave, so that every interval between neighbouring poles holds two zeros (the bulks of the two variances are
apart there) or none (they have merged). For one variance this is Marchenko and Pastur's law.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import brentq

_NEAR = 1e-14  # relative distance to a pole of phi at which a root is bracketed


@dataclass(frozen=True)
class Edge:
    """An end of a bulk.

    Attributes:
        value: The eigenvalue.
        h: Where z(h) is that value and phi(h) = 0.
        is_lower: Whether the bulk lies above it.
    """

    value: float
    h: float
    is_lower: bool


class EigenvalueLaw:
    """Edges, density and resolvent for groups of columns.

    Args:
        dim_ratio: alpha, positive.
        tau: Variances of the groups, ascending and different, (K,).
        fractions: f_k, positive, summing to one, (K,).
    """

    def __init__(self, dim_ratio: float, tau: np.ndarray, fractions: np.ndarray) -> None:
        self.dim_ratio, self.tau, self.fractions = dim_ratio, tau, fractions
        self.edges = self._find_edges()

    def z(self, h: float) -> float:
        """The place whose resolvent is alpha h."""
        return -1 / (self.dim_ratio * h) + float((self.fractions * self.tau / (1 + self.tau * h)).sum())

    def _load(self, h: float) -> float:
        """sum_k f_k (tau_k h / (1 + tau_k h))^2, so that phi = 1 / alpha - load."""
        return float((self.fractions * (self.tau * h / (1 + self.tau * h)) ** 2).sum())

    def phi(self, h: float) -> float:
        """h^2 z'(h)."""
        return 1 / self.dim_ratio - self._load(h)

    def curvature(self, h: float) -> float:
        """z''(h)."""
        return -2 / (self.dim_ratio * h**3) + 2 * float((self.fractions * self.tau**3 / (1 + self.tau * h) ** 3).sum())

    def least_load(self, low: float, high: float) -> tuple[float, float]:
        """(h, load) where the load is least between two poles: its slope rises from -infinity to infinity there."""

        def slope(h: float) -> float:
            return float((self.fractions * self.tau**2 * h / (1 + self.tau * h) ** 3).sum())

        h = _root(slope, low * (1 - _NEAR), high * (1 + _NEAR))
        return h, self._load(h)

    def _find_edges(self) -> list[Edge]:
        poles = (-1 / self.tau).tolist()  # ascending: the smallest variance has the pole farthest from zero
        edges = [self._lowest_edge(poles[0])]
        for low, high in pairwise(poles):
            h, load = self.least_load(low, high)
            if 1 / self.dim_ratio > load:
                below, above = _root(self.phi, low * (1 - _NEAR), h), _root(self.phi, h, high * (1 + _NEAR))
                edges += [Edge(self.z(below), below, False), Edge(self.z(above), above, True)]
        top = _root(self.phi, poles[-1] * (1 - _NEAR), poles[-1] * 1e-300)
        return [*edges, Edge(self.z(top), top, False)]

    def _lowest_edge(self, pole: float) -> Edge:
        if self.dim_ratio == 1:
            return Edge(0.0, math.inf, True)
        # Below one the zero lies left of all poles, above one right of the origin; far out phi is 1 / alpha - 1.
        if self.dim_ratio < 1:
            near, far = pole * (1 + _NEAR), 2 * pole
            while self.phi(far) < 0:
                far *= 2
        else:
            near, far = -pole * 1e-300, -pole
            while self.phi(far) > 0:
                far *= 2
        h = _root(self.phi, *sorted((near, far)))
        return Edge(self.z(h), h, True)

    def _roots(self, eigenvalues: np.ndarray) -> np.ndarray:
        """All h with z(h) = l, (n, K + 1): the eigenvalues of diag(0, -1 / tau) - (1 / alpha, -f) 1^T / l."""
        poles, weights = np.append(0.0, -1 / self.tau), np.append(1 / self.dim_ratio, -self.fractions)
        matrices = np.diag(poles) - weights[:, None] / eigenvalues[:, None, None]
        return np.linalg.eigvals(matrices).astype(complex)

    def kept_share(self, t: float) -> float:
        """tr F F^T (F F^T + t)^-1 / d = 1 - t g(-t) for t > 0, as alpha sum_k f_k tau_k h / (1 + tau_k h): nothing cancels."""
        alpha, top = self.dim_ratio, self.edges[-1].value
        low, high = 1 / (alpha * (t + top)), 1 / (alpha * t)  # g lies between 1 / (t + the largest eigenvalue) and 1 / t
        h = _root(lambda h: self.z(h) + t, low * (1 - 1e-9), high * (1 + 1e-9))
        return alpha * float((self.fractions * self.tau * h / (1 + self.tau * h)).sum())

    def density(self, eigenvalues: np.ndarray) -> np.ndarray:
        """Density of the non-zero eigenvalues, (n,) -> (n,); zero outside the bulks."""
        result, inside = np.zeros(len(eigenvalues)), np.zeros(len(eigenvalues), bool)
        for low, high in zip(self.edges[::2], self.edges[1::2], strict=True):
            inside |= (eigenvalues > low.value) & (eigenvalues < high.value)
        if inside.any():
            result[inside] = self.dim_ratio * self._roots(eigenvalues[inside]).imag.max(axis=1) / math.pi
        return result


def _root(fn: Callable[[float], float], low: float, high: float) -> float:
    return brentq(fn, low, high, xtol=1e-300, rtol=4 * np.finfo(float).eps, maxiter=2000)
