"""Runs of a zoo model with dense spectra of D' on the way, under its own noise schedule or another.

A network trained under one schedule is a function of x_t and of its own timestep. Under another schedule it is asked at the
(fractional) training timestep of equal sigma, where both schedules mean the same x_t; only the sigmas that are visited differ.

Two marks of a run need no rule for whole spectra: a direction is *seen* where its singular value is at least 0.1, *kept* where it
exceeds 0.9. The first mark is the sigma at which the first direction is kept, the second that at which half of those seen are. Of
Gaussian data both are sigmas of the data alone.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from diffusers_geometry import GeometryTrace
from diffusers_geometry.schedule import noise_level

ZOO = Path(__file__).parent.parent / "zoo"
sys.path.append(str(ZOO))

from load import load_zoo  # noqa: E402

SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2},
    "scaled-linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
SEEN, KEPT = 0.1, 0.9


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_sigmas(scheduler: Any) -> np.ndarray:
    """log sigma at every training timestep, (T,), ascending."""
    kept = scheduler.alphas_cumprod.double().numpy()
    return 0.5 * np.log((1 - kept) / kept)


class AtEqualSigma(nn.Module):
    """A network trained under one schedule, for a pipeline that runs another: asked at the training timestep of equal sigma.

    Beyond the sigmas of the training it is asked at the nearest.
    """

    def __init__(self, network: nn.Module, trained: Any, used: Any) -> None:
        super().__init__()
        self.network, self.config, self.dtype, self.device = network, network.config, network.dtype, network.device
        self.trained, self.used = log_sigmas(trained), log_sigmas(used)

    def training_timestep(self, timestep: Any) -> float:
        return float(np.interp(self.used[int(timestep)], self.trained, np.arange(len(self.trained))))

    def forward(self, sample: Tensor, timestep: Any, **kwargs: Any) -> Any:
        return self.network(sample, torch.tensor(self.training_timestep(timestep)), **kwargs)


def pipeline(name: str, schedule: str | None = None) -> Any:
    """A model of the zoo; the pixel models run DDIM, under their own schedule or another."""
    pipe = load_zoo(name)
    pipe.set_progress_bar_config(disable=True)
    if schedule is not None:
        trained = pipe.scheduler
        pipe.scheduler = DDIMScheduler.from_config(trained.config, **SCHEDULES[schedule])
        if schedule != "linear":
            pipe.unet = AtEqualSigma(pipe.unet, trained, pipe.scheduler).eval()
    return pipe


def visited(pipe: Any, steps: int) -> np.ndarray:
    """sigma of every step of a run, (steps,), falling."""
    pipe.scheduler.set_timesteps(steps)
    return np.array([noise_level(pipe.scheduler, i).sigma for i in range(len(pipe.scheduler.timesteps))])


@dataclass
class Run:
    """A trace, and the sigma of every step of its run, recorded or not."""

    trace: GeometryTrace
    visited: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """Singular values of D', (steps, samples, d)."""
        return np.stack([step.denoised_singular_values for step in self.trace.steps])


def run(pipe: Any, steps: int, wanted: tuple[float, ...], *args: Any, **kwargs: Any) -> Run:
    """Spectra (dense, unless asked otherwise) at the steps nearest to the ``wanted`` sigmas, the first and the last."""
    sigmas = visited(pipe, steps)
    near = {int(np.abs(np.log(sigmas / sigma)).argmin()) for sigma in wanted if sigmas.min() < 1.5 * sigma < 2.25 * sigmas.max()}
    options = {"spectrum": "dense", "progress": False, "num_inference_steps": steps, "generator": seeded(1)} | kwargs
    return Run(pipe.analyze_geometry(*args, record_steps=sorted(near | {0, steps - 1}), **options), sigmas)


def shares(values: np.ndarray) -> np.ndarray:
    """Of the directions with u >= 0.1, the share with u > 0.9, over the last axis of ``values``; 0 where none is seen."""
    seen = (values >= SEEN).sum(axis=-1)
    return (values > KEPT).sum(axis=-1) / np.maximum(seen, 1)


def rising(sigmas: np.ndarray, values: np.ndarray, level: float) -> float:
    """sigma at which ``values`` first reach ``level`` as sigma falls, linear in log sigma.

    Infinity if they begin above it; 0 if they stay below.
    """
    above = np.flatnonzero(values >= level)
    if not len(above) or above[0] == 0:
        return math.inf if len(above) else 0.0
    i = int(above[0])
    if not math.isfinite(sigmas[i - 1]):
        return float(sigmas[i])
    share = (level - values[i - 1]) / (values[i] - values[i - 1])
    return float(np.exp(np.log(sigmas[i - 1]) + share * (np.log(sigmas[i]) - np.log(sigmas[i - 1]))))


def boundaries(found: Run) -> dict[str, np.ndarray]:
    """Per sample, the sigma where the first direction is kept, and where half of the directions seen are."""
    values, sigmas = found.values, found.trace.sigmas
    samples = range(values.shape[1])
    return {
        "first": np.array([rising(sigmas, values[:, i, 0], KEPT) for i in samples]),
        "half": np.array([rising(sigmas, shares(values[:, i]), 0.5) for i in samples]),
    }


def in_run(found: Run) -> np.ndarray:
    """Mean shares of the steps before the first direction is kept, until half of those seen are, and after, (3,)."""
    first, half = (np.mean([(found.visited > s).mean() for s in marks]) for marks in boundaries(found).values())
    return np.array([first, half - first, 1 - half])
