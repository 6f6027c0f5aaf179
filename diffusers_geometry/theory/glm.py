"""Information in data x_0 = phi(W z), a generalised linear model with Gaussian weights (George et al., arXiv:2502.04339).

z in R^p, p = beta d, is +-mu + N(0, I_p). The mutual information of x_0 and x_t = e^-t x_0 + sqrt(Delta) epsilon,
Delta = 1 - e^-2t, is in the limit of large dimensions d times the replica-symmetric one (Barbier et al. 2019, arXiv:1708.03395):

    i(t) = min over q in [0, 1) of  I_q - beta / 2 (q + log(1 - q)),      I_q = E_V[h(Y | V)] - 1/2 log(2 pi e Delta)
    Y = e^-t phi(sqrt(v_mu + v_w q) V + sqrt(v_w (1 - q)) w) + sqrt(Delta) epsilon,    V, w, epsilon ~ N(0, 1)

Several minima mean a transition of first order; the lowest counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import ndtr

Activation = Literal["identity", "tanh", "relu", "sign"] | Callable[[np.ndarray], np.ndarray]
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda u: u,
    "tanh": np.tanh,
    "relu": lambda u: np.maximum(u, 0),
    "sign": np.sign,
}
REACH = 8.5  # standard deviations within which Gaussian integrals are taken; e^(-REACH^2 / 2) is 2e-16
NARROW = 1e-3  # 1 - q below which the argument of phi hardly varies
LARGEST_KERNEL = 5e7  # numbers in the table of output densities
SHORTEST = 1e-4  # time down to which the information is computed
_OVERLAPS = 1 - np.concatenate([[1.0], np.logspace(-0.02, -9, 48)])  # grid over q


@dataclass(frozen=True)
class GLMInformation:
    """The replica-symmetric information of a generalised linear model.

    Attributes:
        value: i(t), nats per ambient dimension.
        overlap: q of the lowest minimum.
        minima: (q, value) of every minimum, lowest first.
    """

    value: float
    overlap: float
    minima: tuple[tuple[float, float], ...]

    @property
    def has_competing_minima(self) -> bool:
        """Whether there are several minima: a transition of first order is near, at which the overlap jumps from one to another."""
        return len(self.minima) > 1


def glm_information(
    t: float, dim_ratio: float, activation: Activation = "tanh", weight_variance: float = 1.0, mean_overlap: float = 0.0
) -> GLMInformation:
    """I(x_0; x_t) / d for x_0 = phi(W z), z = +-mu + N(0, I_p), in the limit of large dimensions.

    Args:
        t: OU time, at least 1e-4.
        dim_ratio: beta = p / d, positive.
        activation: phi, a name or a function on arrays, smooth but for a jump or a kink at zero.
        weight_variance: v_w, the variance of a component of W xi: 1 for W_ij ~ N(0, 1/p), beta for N(0, 1/d).
        mean_overlap: v_mu = |W mu|^2 / d.

    Raises:
        ValueError: an argument out of range.
    """
    check_positive(t=t, dim_ratio=dim_ratio, weight_variance=weight_variance)
    if t < SHORTEST:
        raise ValueError(f"t={t}. Expected at least {SHORTEST:g}.")
    if not mean_overlap >= 0:
        raise ValueError(f"mean_overlap={mean_overlap}. Expected a number >= 0.")
    channel = _Channel(t, activation_function(activation), weight_variance, mean_overlap)

    def potential(q: float) -> float:
        return channel.information(q) - 0.5 * dim_ratio * (q + math.log1p(-q))

    values = np.array([potential(q) for q in _OVERLAPS])
    padded = np.concatenate([[np.inf], values, [np.inf]])
    minima = []
    for i in np.flatnonzero((values <= padded[:-2]) & (values < padded[2:])):
        depths = [-math.log1p(-_OVERLAPS[j]) for j in (max(i - 1, 0), min(i + 1, len(values) - 1))]
        found = minimize_scalar(lambda s: potential(-math.expm1(-s)), bounds=depths, method="bounded", options={"xatol": 1e-9})
        minima.append(min((-math.expm1(-found.x), float(found.fun)), (float(_OVERLAPS[i]), float(values[i])), key=lambda m: m[1]))
    minima.sort(key=lambda m: m[1])
    return GLMInformation(minima[0][1], minima[0][0], tuple(minima))


@dataclass(frozen=True)
class ActivationMoments:
    """phi(u) = rho0 + rho1 u + the rest, for u ~ N(0, v).

    Attributes:
        constant: rho0 = E phi(u).
        linear: rho1 = E[g phi(sqrt(v) g)] / sqrt(v).
        rest: rho*^2 = E phi^2 - rho0^2 - rho1^2 v.
    """

    constant: float
    linear: float
    rest: float


def activation_moments(activation: Activation = "tanh", variance: float = 1.0) -> ActivationMoments:
    """The Gaussian moments of phi that rule the covariance of phi(W z); ``variance`` positive."""
    check_positive(variance=variance)
    nodes = gaussian_nodes(1e-3)
    weights = np.exp(-0.5 * nodes**2)
    weights /= weights.sum()
    values = activation_function(activation)(math.sqrt(variance) * nodes)
    constant, linear = float(weights @ values), float(weights @ (nodes * values)) / math.sqrt(variance)
    return ActivationMoments(constant, linear, float(weights @ values**2) - constant**2 - linear**2 * variance)


class _Channel:
    """I_q at one time: entropies of the scalar output Y given V, on grids that do not depend on q where it is not near one."""

    def __init__(self, t: float, phi: Callable[[np.ndarray], np.ndarray], weight_variance: float, mean_overlap: float) -> None:
        self.decay, self.noise = math.exp(-t), math.sqrt(-math.expm1(-2 * t))
        self.phi, self.weight_variance, self.mean_overlap = phi, weight_variance, mean_overlap
        self.field = self._field(REACH * math.sqrt(weight_variance + mean_overlap))
        levels, margin = self.decay * phi(self.field), REACH * self.noise
        outputs = (np.ptp(levels) + 2 * margin) / (self.noise / 5)
        if outputs * len(self.field) > LARGEST_KERNEL:
            raise ValueError(f"t={t} is too short for this activation, whose slope or range is large. Expected a longer time.")
        self.output = levels.min() - margin + np.arange(math.ceil(outputs)) * self.noise / 5
        self.kernel = self._gaussian(self.output[:, None] - levels)  # (Y, field)
        below, above = phi(np.array([-1e-9, 1e-9]))
        self.jumps = abs(above - below) > 1e-6

    def _field(self, reach: float) -> np.ndarray:
        """Midpoints of cells over the argument of phi, an edge at zero, fine enough that phi moves by less than half the noise."""
        cells = 1600
        while True:
            field = (np.arange(cells) + 0.5 - cells / 2) * (2 * reach / cells)
            moves = np.abs(np.diff(self.decay * self.phi(field)))
            moves[cells // 2 - 1] = 0.0  # a jump at zero is between two cells, as it should be
            if moves.max() < self.noise / 2 or cells > LARGEST_KERNEL:
                return field
            cells *= 2

    def _gaussian(self, difference: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * (difference / self.noise) ** 2) / (math.sqrt(2 * math.pi) * self.noise)

    def information(self, q: float) -> float:
        """I_q = E_V[h(Y | V)] - h(Y | V, w)."""
        spread, width = math.sqrt(self.mean_overlap + self.weight_variance * q), math.sqrt(self.weight_variance * (1 - q))
        if 1 - q > NARROW:
            nodes = gaussian_nodes(0.2 if spread == 0 else min(0.2, width / (2 * spread)))
            centres, weights = spread * nodes, np.exp(-0.5 * nodes**2)
            mixing = np.exp(-0.5 * ((self.field - centres[:, None]) / width) ** 2)  # (V, field)
            density = (mixing / mixing.sum(axis=1, keepdims=True)) @ self.kernel.T
        else:
            # V = (width / spread) sinh(s): as fine as the width near zero, where phi may jump, and coarse far from it.
            scale = width / spread
            s = gaussian_nodes(0.05, math.asinh(REACH / scale))
            nodes = scale * np.sinh(s)
            centres, weights = spread * nodes, np.cosh(s) * np.exp(-0.5 * nodes**2)
            near = np.abs(centres) < REACH * width if self.jumps else np.zeros(len(centres), bool)
            density = np.empty((len(centres), len(self.output)))
            density[~near] = self._narrow(centres[~near], width)
            density[near] = self._across_the_jump(centres[near], width)
        entropy = -np.where(density > 0, density * np.log(np.maximum(density, 1e-300)), 0.0).sum(axis=1) * self.noise / 5
        return float(weights @ entropy / weights.sum()) - 0.5 * math.log(2 * math.pi * math.e * self.noise**2)

    def _narrow(self, centres: np.ndarray, width: float) -> np.ndarray:
        """Densities of Y where phi is smooth over the width around each centre, (centres, Y): 21 Hermite nodes."""
        points, shares = np.polynomial.hermite_e.hermegauss(21)
        levels = self.decay * self.phi(centres[:, None] + width * points)
        return self._mixture(levels, np.broadcast_to(shares / shares.sum(), levels.shape))

    def _across_the_jump(self, centres: np.ndarray, width: float) -> np.ndarray:
        """Densities of Y where zero is within the width: cells of w with their exact masses, one edge where phi jumps."""
        edges = np.linspace(-REACH, REACH, 86)
        edges = np.sort(np.concatenate([np.tile(edges, (len(centres), 1)), -centres[:, None] / width], axis=1), axis=1)
        masses = np.diff(ndtr(edges), axis=1)
        middles = (edges[:, 1:] + edges[:, :-1]) / 2
        return self._mixture(self.decay * self.phi(centres[:, None] + width * middles), masses / masses.sum(axis=1, keepdims=True))

    def _mixture(self, levels: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """sum_j shares_j N(Y; level_j, noise^2) for every row, (rows, Y)."""
        columns = zip(levels.T, shares.T, strict=True)
        return sum((share[:, None] * self._gaussian(self.output - level[:, None]) for level, share in columns), np.zeros(()))


def activation_function(activation: Activation) -> Callable[[np.ndarray], np.ndarray]:
    """phi by its name, or itself."""
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}. Expected one of {sorted(ACTIVATIONS)}, or a function on arrays.")
    return ACTIVATIONS[activation]


def gaussian_nodes(step: float, reach: float = REACH) -> np.ndarray:
    """Midpoints of cells between -reach and reach: with Gaussian weights, an integral that converges faster than any power."""
    half = math.ceil(reach / step)
    return (np.arange(-half, half) + 0.5) * step


def check_positive(**values: float) -> None:
    """Raises ValueError unless all numbers are positive and finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}. Expected a finite number > 0.")
