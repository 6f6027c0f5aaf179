"""What is measured of a reward on seeds it never saw.

Spearman's rank correlation and R² are taken within a noise level and then averaged: over all levels they would measure how well
the noise is known, which is an input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from .reward import GeometryReward

Samples = Mapping[str, Tensor]
BOOTSTRAP, DECILES = 200, 10


@dataclass(frozen=True)
class LevelMetrics:
    """Of one noise level: test samples, R², Spearman's correlation and its bootstrap standard error over seeds."""

    sigma: float
    samples: int
    r_squared: float
    spearman: float
    spearman_sem: float


@dataclass(frozen=True)
class RewardMetrics:
    """What was measured on the test seeds.

    Attributes:
        levels: Per noise level.
        calibration: Rows (mean prediction, mean label, standard error of the latter) of ten groups by prediction, standardised.
        seconds: Of training.
        steps: Taken, and ``best_step`` of the kept weights.
        validation_loss: At the best step.
        train_samples: Labels trained on; ``validation_samples`` and ``test_samples``.
        seconds_per_label: What a label cost; None where it is not known.
    """

    levels: list[LevelMetrics]
    calibration: list[tuple[float, float, float]]
    seconds: float
    steps: int
    best_step: int
    validation_loss: float
    train_samples: int
    validation_samples: int
    test_samples: int
    seconds_per_label: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def spearman(self) -> float:
        """Mean of the within-level correlations."""
        return float(np.mean([level.spearman for level in self.levels]))

    @property
    def r_squared(self) -> float:
        """Mean of the within-level R²."""
        return float(np.mean([level.r_squared for level in self.levels]))


@torch.no_grad()
def measured(reward: GeometryReward, samples: Samples) -> tuple[list[LevelMetrics], list[tuple[float, float, float]]]:
    """Metrics per noise level, and the calibration over all, labels standardised by their level."""
    parts = torch.arange(len(samples["label"])).split(1024)
    predicted = torch.cat([reward.predict(samples["x_t"][p], samples["sigma"][p], samples["alpha_t"][p]) for p in parts])
    labels, log_sigma, seeds = samples["label"].double().numpy(), samples["sigma"].log(), samples["seed"].numpy()
    level_of = (log_sigma[:, None] - reward.log_sigmas).abs().argmin(dim=1)
    predicted, index = predicted.double().numpy(), level_of.numpy()
    generator, levels = np.random.default_rng(0), []
    for level in np.unique(index):
        own = index == level
        p, y, s = predicted[own], labels[own], seeds[own]
        sigma, r_squared = float(reward.log_sigmas[level].exp()), float(1 - ((y - p) ** 2).sum() / ((y - y.mean()) ** 2).sum())
        sem = _spearman_sem(p, y, s, generator)
        levels.append(LevelMetrics(sigma, int(own.sum()), r_squared, float(spearmanr(p, y).statistic), sem))
    mean, std = (table[level_of].double().numpy() for table in (reward.label_mean, reward.label_std))
    z, truth = (predicted - mean) / std, (labels - mean) / std
    groups = np.array_split(np.argsort(z), min(DECILES, len(z)))
    return levels, [(float(z[g].mean()), float(truth[g].mean()), float(truth[g].std() / math.sqrt(len(g)))) for g in groups]


def _spearman_sem(predicted: np.ndarray, labels: np.ndarray, seeds: np.ndarray, generator: np.random.Generator) -> float:
    """Standard deviation of Spearman's correlation over bootstrap draws of the seeds."""
    rows = [np.flatnonzero(seeds == seed) for seed in np.unique(seeds)]
    draws = []
    for _ in range(BOOTSTRAP):
        chosen = np.concatenate([rows[i] for i in generator.integers(len(rows), size=len(rows))])
        draws.append(spearmanr(predicted[chosen], labels[chosen]).statistic)
    return float(np.std(draws, ddof=1))
