"""Local complexity delta: how many knots of a network a small neighbourhood of a point meets (arXiv:2408.08307).

The neighbourhood is a cross-polytope: the 2k vertices x ± r v_i of k orthonormal directions. delta counts, over all units, the
knots that lie between two vertices: the units whose pre-activation changes sign, and for an activation with two knots each of them
(:mod:`.activations` says where knots are). In the first layer a knot is a hyperplane, and it meets the cross-polytope exactly when
it separates two vertices. Deeper ones are bent, and an even number of crossings inside is missed. It is a count of knots, not of
the linear regions that the paper defines: N hyperplanes in general position make N + 1 regions or more.

A hyperplane at distance h with unit normal u is met when h < r max_i |u·v_i|, and the maximum shrinks like 1/sqrt(d). So the radius
is given per coordinate, as noise is:

    r = neighborhood_radius · sqrt(d)

and the reach is neighborhood_radius · c_k, c_k about the mean of the largest of k |Gaussians| (1.78 at k = 8) whatever d is. Models
compare at equal neighborhood_radius and equal k.

Where activations are smooth there are no knots; delta is then a labelled proxy, and its companion is the relative change of the
Jacobian over the same distance, a measure of second order (:mod:`.variation`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .activations import Kind
from .difference import BatchedMap, orthonormal_directions, require_finite
from .estimate import Estimate
from .stochastic import mean_estimate, small_sample
from .vertices import Vertices

LEAST_DRAWS = 4  # of directions: fewer give no standard error that can be used
AFFINE_TOLERANCE = 1e-3  # relative second difference


@dataclass(frozen=True)
class ActivationLayer:
    """One activation call of the network, which is one layer of units.

    Attributes:
        name: Path of the module that makes the call ("decoder.conv_act"), or the function where there is no module; "#2" for a
            second call of that name.
        function: Torch function.
        kind: "exact", or "proxy" for an activation without knots.
        units: Units per sample.
        knots: Knots per sample: units times the knots of the activation.
    """

    name: str
    function: str
    kind: Kind
    units: int
    knots: int


@dataclass(frozen=True)
class LocalComplexity:
    """delta of a batch at several radii.

    Attributes:
        counts: Knots met, float64 on the CPU, shape (draws, radii, B, layers).
        layers: In the order of calls; layers that do not depend on the sample (a time embedding) are left out.
        neighborhood_radii: Per coordinate, as given.
        euclidean_radii: r = neighborhood_radius sqrt(d), the distance of the vertices from the sample.
        num_directions: k; there are 2k vertices.
        is_random: Whether the directions were drawn. They are the axes when there are d of them.
        uncounted: Functions with kinks or jumps that were called and are not counted.
        forwards: Evaluations of the network at one point, all together.
        backend: "vmap", or after a refusal by torch "looped", one point at a time.
        fallback_reason: torch's words then, else None.
    """

    counts: Tensor
    layers: tuple[ActivationLayer, ...]
    neighborhood_radii: tuple[float, ...]
    euclidean_radii: tuple[float, ...]
    num_directions: int
    is_random: bool
    uncounted: tuple[str, ...]
    forwards: int
    backend: str
    fallback_reason: str | None = None

    @property
    def kind(self) -> str:
        """ "exact" when every counted knot is one, "proxy" when a layer is smooth, "affine" for a map without any."""
        if not self.layers:
            return "affine"
        return "proxy" if any(layer.kind == "proxy" for layer in self.layers) else "exact"

    @property
    def num_vertices(self) -> int:
        """2k."""
        return 2 * self.num_directions

    @property
    def knots(self) -> int:
        """Knots of the network per sample; units, where every activation has one."""
        return sum(layer.knots for layer in self.layers)

    @property
    def value(self) -> Tensor:
        """delta, knots met per sample, mean over the draws, shape (radii, B)."""
        return self.counts.sum(dim=-1).mean(dim=0)

    @property
    def fraction(self) -> Tensor:
        """delta as a fraction of all knots, shape (radii, B); 0 for an affine map."""
        return self.value / max(1, self.knots)

    @property
    def sem(self) -> Tensor | None:
        """Standard error of ``value`` over the draws of directions, (radii, B); None for one draw, zeros for the axes."""
        return _sem(self.counts.sum(dim=-1), self.is_random)

    def estimate(self, sample: int = 0, radius: int = 0) -> Estimate:
        """delta of one sample at the radius of this index; ``products`` are the network evaluations it took."""
        counts = self.counts[:, radius, sample].sum(dim=-1)
        products = len(counts) * self.num_vertices
        if not self.is_random:
            return Estimate(counts.mean().item(), products=products)
        return mean_estimate(counts, products) if len(counts) > 1 else Estimate(counts.item(), None, 0.0, False, products)

    def table(self, sample: int = 0, radius: int = 0) -> list[dict[str, Any]]:
        """A row per layer: name, function, kind, units, knots, count and its sem, fraction of the layer's knots."""
        if not self.layers:
            return []
        counts = self.counts[:, radius, sample]
        means, sems = counts.mean(dim=0).tolist(), _sem(counts, self.is_random)
        rows = zip(self.layers, means, [None] * len(means) if sems is None else sems.tolist(), strict=True)
        return [asdict(layer) | {"count": count, "sem": sem, "fraction": count / layer.knots} for layer, count, sem in rows]

    def __str__(self) -> str:
        lines = [
            f"neighborhood_radius {radius:g}: {self.estimate(b, i)} of {self.knots} knots ({self.kind}), sample {b}"
            for i, radius in enumerate(self.neighborhood_radii)
            for b in range(self.counts.shape[2])
        ]
        if self.uncounted:
            lines.append(f"not counted: {', '.join(self.uncounted)}")
        return "\n".join(lines)


def _sem(counts: Tensor, is_random: bool) -> Tensor | None:
    """Standard error of the mean over the first axis."""
    if not is_random:
        return torch.zeros_like(counts[0])
    if len(counts) == 1:
        return None
    return counts.std(dim=0) / math.sqrt(len(counts)) * small_sample(len(counts))


def local_complexity(
    fn: BatchedMap,
    x: Tensor,
    neighborhood_radius: float | Sequence[float],
    *,
    num_directions: int = 8,
    num_draws: int = LEAST_DRAWS,
    generator: torch.Generator | None = None,
    chunk_size: int = 32,
) -> LocalComplexity:
    """delta of every sample of a batch: knots met by a cross-polytope around it, per layer and in total.

    References:
        What Secrets Do Your Manifolds Hold? (Humayun et al., 2025), https://arxiv.org/abs/2408.08307, Definition 3

    Args:
        fn: A module or any function, (K, *dims) -> anything; samples must not influence one another. For a batch that is
            conditioned sample by sample pass one sample and its own map (``denoiser.select(i).canonical_map(of)``).
        x: The samples, shape (B, *dims), float32 or float64.
        neighborhood_radius: Distance per coordinate, in the unit of x: the vertices lie at r = neighborhood_radius sqrt(d). A
            sequence is evaluated along the same directions.
        num_directions: k, from 1 to d. Compare at equal k.
        num_draws: Draws of the directions, 1 (no standard error) or at least 4. When k = d the directions are the axes, once.
        generator: The directions; a fixed seed by default. Every sample has its own.
        chunk_size: Vertices evaluated at once; halved when memory runs out.

    Raises:
        TypeError: ``x`` is in half precision or not floating.
        ValueError: k, radius, draws or chunk size out of range; a radius that rounding swallows.
        RuntimeError: the network is random, in training mode, branches on values, or bends where no activation could be seen.
    """
    radii = tuple(
        float(r) for r in ([neighborhood_radius] if isinstance(neighborhood_radius, int | float) else neighborhood_radius)
    )
    _check_arguments(x, radii, num_draws, chunk_size)
    generator = generator or torch.Generator().manual_seed(0)
    shape, size = x.shape[1:], x[0].numel()
    is_random = num_directions != size
    draws = num_draws if is_random else 1
    distances = tuple(radius * math.sqrt(size) for radius in radii)
    directions = [[orthonormal_directions(shape, num_directions, x, generator) for _ in x] for _ in range(draws)]
    vertices = Vertices(fn, x.detach()[:1], chunk_size)
    counts = [[[vertices.knots_met(x[b].detach(), r, draw[b]) for b in range(len(x))] for r in distances] for draw in directions]
    if not any(seen := vertices.depends_on_x):
        _require_affine(fn, x.detach()[:1], max(1.0, *radii) * math.sqrt(size) * directions[0][0], vertices.uncounted)
    return LocalComplexity(
        counts=torch.tensor(counts, dtype=torch.float64).reshape(draws, len(radii), len(x), len(seen))[
            ..., torch.tensor(seen, dtype=torch.bool)
        ],
        layers=tuple(ActivationLayer(*row) for row, is_seen in zip(vertices.layers, seen, strict=True) if is_seen),
        neighborhood_radii=radii,
        euclidean_radii=distances,
        num_directions=num_directions,
        is_random=is_random,
        uncounted=tuple(sorted(vertices.uncounted)),
        forwards=vertices.forwards,
        backend=vertices.backend,
        fallback_reason=vertices.fallback_reason,
    )


def _check_arguments(x: Tensor, radii: tuple[float, ...], num_draws: int, chunk_size: int) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x has dtype {x.dtype}. Expected float32 or float64: small displacements are lost in less.")
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"x has shape {tuple(x.shape)}. Expected (B, *dims), a batch of samples: x[None] for one.")
    if not radii or not all(0 < radius < math.inf for radius in radii):
        raise ValueError(f"neighborhood_radius={radii}. Expected one or more finite radii > 0.")
    if num_draws != 1 and num_draws < LEAST_DRAWS:
        raise ValueError(f"num_draws={num_draws}. Expected 1 (no standard error) or at least {LEAST_DRAWS}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}. Expected at least 1.")


def _require_affine(fn: BatchedMap, x: Tensor, steps: Tensor, uncounted: set[str]) -> None:
    """RuntimeError unless second differences of ``fn`` along the steps (k, *dims) vanish: 0 knots is then the truth."""
    with torch.no_grad():
        outputs = [fn(x + scale * step) for step in steps for scale in (-1, 0, 1, 2)]
    if not all(isinstance(output, Tensor) for output in outputs):
        raise TypeError(
            f"fn returns {type(outputs[0]).__name__} and no activation was seen. Expected a tensor, to see whether fn is affine."
        )
    # Two differences of second order: an odd function has none around its centre, a homogeneous one none to one side of it.
    values = require_finite(torch.stack(outputs), "the function").reshape(len(steps), 4, -1)
    bends, slopes = values.diff(n=2, dim=1).norm(dim=2), values.diff(dim=1).norm(dim=2).amax(dim=1)
    rounding = 10 * torch.finfo(x.dtype).eps * values.norm(dim=2).amax(dim=1)
    if (bends.amax(dim=1) > AFFINE_TOLERANCE * slopes + rounding).any():
        raise RuntimeError(
            "no activation that depends on x was seen, and the function is not affine"
            + (f" (it called {', '.join(sorted(uncounted))})" if uncounted else "")
            + ". Expected ReLU-type, SiLU, GELU, Mish or gated units called through torch: tanh, softmax, norms and max pooling "
            "have no knots that are counted, and TorchScript hides its own. Use jacobian_variation for such a function."
        )
