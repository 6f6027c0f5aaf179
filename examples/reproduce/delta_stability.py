"""How far the ranking of images by delta depends on the radius of its neighbourhood and on the number of directions.

The radius is r = neighborhood_radius sqrt(d), so that a knot is in reach at the same neighborhood_radius whatever the dimension is.
Directions are common to all images. A ranking can be no more stable between two settings than between two halves of the draws of
one, and where k = d the directions are the axes and nothing is drawn.
"""

from __future__ import annotations

import numpy as np
import torch
from local_probe import RADIUS, Probe
from resampling import Interval, interval, spearman
from torch import Tensor

from diffusers_geometry.complexity import local_complexity

RADII = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)
DRAWS, COMPARED_K = 4, 8
DIRECTIONS = (1, 2, 4, 8, 16, 32, 64)


def over_radii(probe: Probe, images: Tensor) -> dict[str, np.ndarray]:
    """Share of knots met at the first draw of the noise as "fraction", (n, draws, radii), and "seconds", (n,)."""
    return _swept(probe, images, "radii", RADII, COMPARED_K)


def over_directions(probe: Probe, images: Tensor, k: int) -> dict[str, np.ndarray]:
    """The same at one radius and k directions, (n, draws, 1); one draw of the axes where k = d."""
    return _swept(probe, images, f"directions{k}", (RADIUS,), k)


def _swept(probe: Probe, images: Tensor, what: str, radii: tuple[float, ...], k: int) -> dict[str, np.ndarray]:
    denoiser = probe.denoiser()
    canonical = denoiser.canonical_map("denoised")

    def make(image: Tensor) -> dict[str, Tensor]:
        x_t, generator = probe.points(denoiser, image)[:1], torch.Generator().manual_seed(5)
        found = local_complexity(canonical, x_t, radii, num_directions=k, num_draws=DRAWS, generator=generator)
        return {"fraction": found.counts[:, :, 0].sum(-1) / found.knots}

    return probe.kept(what, images, make)


def halves(draws: np.ndarray) -> float:
    """Rank correlation of the images between two and two of four draws (n, 4), mean over the three ways; 1 for one draw (n, 1)."""
    if draws.shape[1] == 1:
        return 1.0
    found = []
    for i in range(1, DRAWS):
        half = [0, i]
        found.append(float(spearman(draws[:, half].mean(1), np.delete(draws, half, axis=1).mean(1))))
    return float(np.mean(found))


def settings_of(sweep: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Per radius (n, draws)."""
    return list(np.moveaxis(sweep["fraction"], -1, 0))


def stability(settings: list[np.ndarray], reference: int) -> list[tuple[Interval, float]]:
    """Of every setting (n, draws): rank correlation of the images with the reference setting, and between halves of its draws."""
    means = [draws.mean(1) for draws in settings]
    return [(interval(spearman, own, means[reference]), halves(draws)) for own, draws in zip(means, settings, strict=True)]


def between_all(settings: list[np.ndarray]) -> np.ndarray:
    """Rank correlations of the images between all settings."""
    means = [draws.mean(1) for draws in settings]
    return np.array([[float(spearman(a, b)) for b in means] for a in means])
