"""How good a set of generated images is: distances, coverage and diversity in a feature space, and nearness to training images."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

NEIGHBOURS = 3  # of the precision and recall balls


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to features (n, f), (Heusel et al. 2017, arXiv:1706.08500)."""
    a, b = np.cov(first.T), np.cov(second.T)
    overlap = np.sqrt(np.linalg.eigvals(a @ b).real.clip(min=0)).sum()
    return float(np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(a + b) - 2 * overlap)


def coverage(covered: np.ndarray, covering: np.ndarray, k: int = NEIGHBOURS) -> float:
    """Share of ``covered`` (n, f) inside the union of balls around ``covering`` (m, f) that reach its k-th neighbour.

    Precision is ``coverage(generated, real)``, recall ``coverage(real, generated)`` (Kynkäänniemi et al. 2019, arXiv:1904.06991).
    """
    radius = np.sort(cdist(covering, covering), axis=1)[:, k]
    return float((cdist(covered, covering) <= radius).any(axis=1).mean())


def vendi(features: np.ndarray) -> float:
    """Effective number of different items, exp(entropy of the eigenvalues of K/n), K cosine (arXiv:2210.02410)."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
    share = np.linalg.svd(unit / math.sqrt(len(unit)), compute_uv=False) ** 2
    share = share[share > 1e-12]
    return float(np.exp(-(share * np.log(share)).sum()))


def compare(generated: np.ndarray, real: np.ndarray, other_real: np.ndarray) -> dict[str, dict[str, float]]:
    """All figures of generated features against real ones, and of another real half against the same; equal numbers of each."""
    count = min(map(len, (generated, real, other_real)))
    real = real[:count]
    return {
        name: {
            "images": count, "frechet": frechet(made[:count], real), "precision": coverage(made[:count], real),
            "recall": coverage(real, made[:count]), "vendi": vendi(made[:count]),
        }
        for name, made in (("generated", generated), ("real", other_real))
    }  # fmt: skip


def nearest(images: Tensor, others: Tensor, *, same: bool = False) -> Tensor:
    """Euclidean distance of every image (n, ...) to the nearest of ``others`` (m, ...), (n,); not to itself if the ``same``."""
    points, targets = images.flatten(1).double(), others.flatten(1).double()
    distances = torch.cat([torch.cdist(chunk, targets) for chunk in points.split(500)])
    if same:
        distances.fill_diagonal_(math.inf)
        distances[distances == 0] = math.inf  # exact copies
    return distances.amin(1).float()


def planted_radius(reconstructions: Tensor) -> float:
    """Half the median distance from a training image's reconstruction to the nearest different one."""
    return nearest(reconstructions, reconstructions, same=True).median().item() / 2
