"""Collapse of the exact score of a finite data set: from which noise on a backward run returns to the example that it came from.

The exact score of n points is a softmax average with the weights w_i(x) = softmax_i(-|x - x_i|^2 / 2 sigma^2). Started at
x = x_i + sigma epsilon, a run of the exact SDE back ends in x_i with probability w_i(x), exactly: the weight of the parent is the
return probability of the U-turn experiment (George et al., arXiv:2502.04339). There are two criteria, E w = 1/2 and
E log(w / (1 - w)) = 0. The information log n - E H(w) saturates at log n and must not be solved for log n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from torch import Tensor

from ..estimate import Estimate
from .transitions import gaussian_information, information_from_dimension, time_of_sigma

_CHUNK = 512  # draws compared with all data at once


@dataclass(frozen=True)
class ParentWeight:
    """How surely a noised example is told from all others.

    Attributes:
        weight: E w of the parent: the probability that a U-turn returns to it.
        log_odds: E log(w / (1 - w)).
    """

    weight: Estimate
    log_odds: Estimate


class EmpiricalCollapse:
    """The U-turn of one finite data set, on draws that are the same at every noise level.

    Args:
        data: Different points, shape (n, *dims), n >= 3: of two, one is always the likelier parent by more than a half.
        num_draws: Noised examples that expectations are taken over; each carries its own noise.
        generator: Draws parents and noise.

    Raises:
        ValueError: fewer than three points, copies among them, or numbers that are not finite.
    """

    def __init__(self, data: Tensor, *, num_draws: int = 2000, generator: torch.Generator | None = None) -> None:
        if data.ndim < 1 or len(data) < 3 or not data.isfinite().all():
            raise ValueError(f"data has shape {tuple(data.shape)}. Expected (n, *dims), at least three points, all finite.")
        points = data.detach().cpu().double().reshape(len(data), -1)  # the CPU has float64 everywhere
        if len(points.unique(dim=0)) < len(points):
            raise ValueError("data has copies of points. Expected different ones: a copy takes half of its twin's weight.")
        if num_draws < 2:
            raise ValueError(f"num_draws={num_draws}. Expected at least 2.")
        self.points = points - points.mean(dim=0)  # close points far from the origin keep their digits
        self.scale = self.points.square().sum(1).mean().sqrt().item()
        self.parents = torch.randint(len(points), (num_draws,), generator=generator)
        self.noise = torch.randn(num_draws, points.shape[1], dtype=torch.float64, generator=generator)

    def _log_odds(self, sigma: float) -> Tensor:
        """log(w / (1 - w)) of every draw's parent, (draws,)."""
        found = []
        for parents, noise in zip(self.parents.split(_CHUNK), self.noise.split(_CHUNK), strict=True):
            x = self.points[parents] + sigma * noise
            logits = (x @ self.points.T - 0.5 * self.points.square().sum(1)) / sigma**2
            own = logits.gather(1, parents[:, None])[:, 0]
            found.append(own - logits.scatter(1, parents[:, None], -math.inf).logsumexp(1))
        return torch.cat(found)

    def at(self, sigma: float) -> ParentWeight:
        """The parent's weight at noise ``sigma``, with standard errors over the draws.

        Raises:
            ValueError: ``sigma`` is not within 1e-8 and 1e8 of the data's root mean square distance from their mean.
        """
        if not 1e-8 < sigma / self.scale < 1e8:
            raise ValueError(f"sigma={sigma}. Expected within {1e-8 * self.scale:.3g} and {1e8 * self.scale:.3g}.")
        log_odds = self._log_odds(sigma)
        return ParentWeight(*(_mean(values) for values in (log_odds.sigmoid(), log_odds)))

    def sigma(self, criterion: Literal["weight", "log_odds"] = "weight") -> Estimate:
        """Noise at which E w = 1/2, or E log(w / (1 - w)) = 0; the error is that of the criterion over its slope.

        ``converged`` is False where the error exceeds the value: the criterion hardly falls there.
        """
        if criterion not in ("weight", "log_odds"):
            raise ValueError(f"criterion={criterion!r}. Expected 'weight' or 'log_odds'.")
        level = 0.5 if criterion == "weight" else 0.0

        def excess(log_sigma: float) -> float:
            return getattr(self.at(math.exp(log_sigma)), criterion).value - level

        low, high = math.log(self.scale) - 1, math.log(self.scale) + 1
        while excess(low) < 0:
            low -= 1
        while excess(high) > 0:
            high += 1
        root = brentq(excess, low, high, xtol=1e-6)
        slope = (excess(root + 0.05) - excess(root - 0.05)) / 0.1
        value = math.exp(root)
        sem = value * getattr(self.at(value), criterion).sem / abs(slope) if slope else math.inf
        return Estimate(value, sem=sem if math.isfinite(sem) else None, converged=sem <= value)

    def time(self, criterion: Literal["weight", "log_odds"] = "weight") -> Estimate:
        """The same as an OU time, 1/2 log(1 + sigma^2)."""
        sigma = self.sigma(criterion)
        sem = None if sigma.sem is None else sigma.sem * sigma.value / (1 + sigma.value**2)
        return Estimate(float(time_of_sigma(sigma.value)), sem=sem, converged=sigma.converged)


def held_out_information(sigmas: ArrayLike, errors: Tensor, eigenvalues: ArrayLike | None = None) -> list[Estimate]:
    """I(x_0; x_sigma) by the area law from a trained denoiser's errors on unseen data; n examples collapse where it is log n.

    E |x_0 - D|^2 / sigma^2 stands for E tr D' in :func:`~.transitions.information_from_dimension`. A model errs by at least as much
    as the posterior mean, so that the information, and the noise at which it reaches log n, is an upper estimate.

    Args:
        sigmas: Ascending noise levels, (n,).
        errors: |x_0 - D(x_0 + sigma epsilon)|^2 of the same unseen points at every level, summed over dimensions, (n, points).
        eigenvalues: Of the data's covariance, for what lies above the largest sigma; left out if None.

    Returns:
        One estimate for every sigma, nats; its error is that of the mean over the points.
    """
    if errors.ndim != 2 or errors.shape[1] < 2 or not errors.isfinite().all() or (errors < 0).any():
        shape = tuple(errors.shape)
        raise ValueError(f"errors has shape {shape}. Expected (sigmas, points), at least two points, finite and >= 0.")
    levels = np.asarray(sigmas, float)
    if levels.shape != (len(errors),) or not (levels > 0).all():
        raise ValueError(f"sigmas has shape {levels.shape}. Expected ({len(errors)},), positive numbers, one a row of errors.")
    each = np.stack([information_from_dimension(levels, column / levels**2) for column in errors.detach().cpu().double().numpy().T])
    tail = 0.0 if eigenvalues is None else gaussian_information(eigenvalues, float(time_of_sigma(levels[-1])))
    sems = each.std(0, ddof=1) / math.sqrt(len(each))
    return [Estimate(float(mean) + tail, sem=float(sem)) for mean, sem in zip(each.mean(0), sems, strict=True)]


def _mean(values: Tensor) -> Estimate:
    return Estimate(values.mean().item(), sem=values.std().item() / math.sqrt(len(values)))
