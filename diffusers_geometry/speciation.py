"""Speciation from agreements and from samples: where an agreement falls to a level, and what theory predicts of two classes.

Formulas are in :mod:`.transition_report`, which shows these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq, isotonic_regression
from scipy.special import ndtri
from torch import Tensor

from .estimate import Estimate
from .theory import clone_agreement, speciation_time
from .theory.transitions import clone_snr, sigma_of_time


@dataclass(frozen=True)
class ClassPair:
    """Two classes of the samples and where theory lets clones part between them.

    Attributes:
        classes: Their labels.
        mean_norm_squared: |mu|^2, the square of half the distance of the means, free of what their sampling adds.
        within_variance: v, pooled, along the line between the means.
        sigma: Noise at which the closed form for equally likely classes falls to the level; None where it is below it everywhere.
    """

    classes: tuple[Any, Any]
    mean_norm_squared: float
    within_variance: float
    sigma: Estimate | None

    @classmethod
    def between(cls, names: tuple[Any, Any], first: Tensor, second: Tensor, level: float, stochastic: bool) -> ClassPair:
        """Of samples (n, d) of two classes, at least two each."""
        counts, apart = np.array([len(first), len(second)]), first.mean(0) - second.mean(0)
        noise = sum(x.var(0).sum().item() / len(x) for x in (first, second))
        raw = apart.square().sum().item()
        along = [x @ apart / max(math.sqrt(raw), torch.finfo(x.dtype).tiny) for x in (first, second)]
        within = sum((len(z) - 1) * z.var().item() for z in along) / (counts.sum() - 2)
        squared = (raw - noise) / 4
        snr = clone_snr(level) if stochastic else float(ndtri(level)) ** 2
        sigma = None
        if squared > snr * within:
            value = float(sigma_of_time(speciation_time(squared, within, "clones", float(clone_agreement(snr)))))
            variance = raw * within * (1 / counts).sum() / (4 * snr**2) + 2 * within**2 / (counts.sum() - 2)
            sigma = Estimate(value, sem=math.sqrt(variance) / (2 * value), bias=None)
        return cls(names, squared, within, sigma)


def share(values: np.ndarray) -> Estimate:
    """Mean of shares in [0, 1], one a parent; the error is that with one more parent at 0 and one at 1, so that it is never zero.

    References:
        Approximate is Better than "Exact" for Interval Estimation of Binomial Proportions (Agresti and Coull, 1998).
    """
    padded = np.concatenate([values, [0.0, 1.0]])
    return Estimate(float(np.mean(values)), sem=float(padded.std(ddof=1)) / math.sqrt(len(padded)))


def crossing(sigmas: Sequence[float], values: np.ndarray, level: float) -> float | None:
    """Noise at which ``values``, falling with finite sigma, meet ``level``; None where they do not.

    Made monotone by isotonic regression and joined by a monotone cubic in log sigma.
    """
    order = np.argsort(sigmas)
    order = order[np.isfinite(np.asarray(sigmas)[order])]
    logs = np.log(np.asarray(sigmas)[order])
    falling = isotonic_regression(np.asarray(values)[order], increasing=False).x
    above = np.flatnonzero(falling >= level)
    if not len(above) or above[-1] == len(falling) - 1:
        return None
    curve, i = PchipInterpolator(logs, falling), above[-1]
    return float(np.exp(brentq(lambda s: curve(s) - level, logs[i], logs[i + 1])))


def speciation_sigma(
    sigmas: Sequence[float], agreements: np.ndarray, level: float, *, num_resamples: int = 400, seed: int = 0
) -> Estimate | None:
    """Where the mean agreement falls to ``level``, with the error of a bootstrap over the parents; None where it does not.

    Args:
        sigmas: (K,).
        agreements: One row a parent, (P, K).
        level: Between 1/2 and 1.
        num_resamples: Of the bootstrap; ``converged`` says whether all but a twentieth of them cross.
        seed: Of the bootstrap.
    """
    value = crossing(sigmas, agreements.mean(0), level)
    if value is None:
        return None
    rng, parents = np.random.default_rng(seed), len(agreements)
    draws = [crossing(sigmas, agreements[rng.integers(parents, size=parents)].mean(0), level) for _ in range(num_resamples)]
    found = np.log([d for d in draws if d is not None])
    enough = len(found) >= 0.95 * num_resamples
    return Estimate(value, sem=value * float(found.std(ddof=1)) if len(found) > 1 else None, bias=None, converged=enough)


def covariance_eigenvalues(samples: Tensor) -> np.ndarray:
    """Eigenvalues of the covariance of samples (n, d), descending, min(n, d) of them: the largest too large where d >> n."""
    centred = samples.cpu().double() - samples.cpu().double().mean(0)
    return (torch.linalg.svdvals(centred).square() / (len(samples) - 1)).numpy()


def top_eigenvalue(samples: Tensor, generator: torch.Generator | None = None) -> Estimate | None:
    """Lambda of the covariance of samples (n, d): the variance of one random half along the top direction of the other, both ways.

    No direction has a larger variance than Lambda, and the top eigenvalue of a sample is never below it, both in expectation:
    ``bias`` is the first less the second, which bounds it. Along one direction the halves err independently; along two unlike ones
    both look at the same chance overlaps of the halves, and are taken to err together.

    Args:
        samples: Shape (n, d).
        generator: Draws the halves.

    Returns:
        None of fewer than four samples.
    """
    if len(samples) < 4:
        return None
    x = samples.cpu().double()
    half = torch.randperm(len(x), generator=generator).chunk(2)
    values, errors, directions = [], [], []
    for fit, held in (half, half[::-1]):
        direction = torch.linalg.svd(x[fit] - x[fit].mean(0), full_matrices=False).Vh[0]
        squares = ((x[held] - x[held].mean(0)) @ direction).square() * len(held) / (len(held) - 1)
        values.append(squares.mean().item())
        errors.append(squares.std().item() / math.sqrt(len(held)))
        directions.append(direction)
    alike = min((directions[0] @ directions[1]).square().item(), 1.0)
    variance = (errors[0] ** 2 + errors[1] ** 2 + 2 * (1 - alike) * errors[0] * errors[1]) / 4
    value = sum(values) / 2
    return Estimate(value, sem=math.sqrt(variance), bias=value - float(covariance_eigenvalues(samples)[0]))


def square_root(estimate: Estimate | None) -> Estimate | None:
    """Of a number >= 0, with its error; that of zero is not known."""
    if estimate is None:
        return None
    root = math.sqrt(estimate.value)
    bias = None if estimate.bias is None else root - math.sqrt(estimate.value - estimate.bias)
    return Estimate(root, sem=estimate.sem / (2 * root) if root > 0 else None, bias=bias)
