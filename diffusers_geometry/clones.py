"""Clones of a run, and U-turns: from which noise on a generation has decided what it makes.

Two gestures, both made of :class:`~.restart.Restart`:

* *clones* continue from one x_k of a run with independent noise. Of a deterministic sampler they would all be the same;
* a *U-turn* takes a finished sample x_0 to x_k = alpha_t x_0 + sigma_t epsilon and denoises from there, with any sampler.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2, vq
from torch import Tensor

from .capture import record
from .estimate import Estimate
from .exact import EmpiricalDenoiser
from .recorded_step import RecordedStep
from .restart import Restart, Schedule
from .schedule import NoiseLevel
from .speciation import share


@dataclass(frozen=True)
class Parents:
    """Runs of the pipeline with their samples at the branches.

    Attributes:
        steps: The first call's recorded steps, one a branch.
        samples: x_k of every run at every branch, each (P, *dims).
        finished: x_0 of every run, in the scheduler's units, (P, *dims).
        batch: Runs of one call.
    """

    steps: list[RecordedStep]
    samples: list[Tensor]
    finished: Tensor
    batch: int

    @classmethod
    def run(cls, pipe: Any, args: tuple, kwargs: dict, schedule: Schedule, positions: list[int], count: int) -> Parents:
        """As many plain calls as make ``count`` runs.

        Raises:
            ValueError: two calls give the same run.
        """
        steps, samples, finished = [], [[] for _ in positions], []
        while sum(map(len, finished)) < count:
            with record(pipe, [k - schedule.first for k in positions], engine="drive") as recording:
                pipe(*args, **kwargs)
            recording.check_complete()
            if finished and torch.equal(recording[0].sample, samples[0][-1]):
                raise ValueError(
                    f"two calls of {type(pipe).__name__} gave the same runs: num_parents={count} cannot be had. Expected at most "
                    f"{len(samples[0][-1])}, as many as one call makes, where latents are given."
                )
            steps = steps or list(recording)
            for kept, step in zip(samples, recording, strict=True):
                kept.append(step.sample)
            finished.append(recording.final_sample[: len(recording[0].sample)].detach())
        return cls(steps, [torch.cat(kept)[:count] for kept in samples], torch.cat(finished)[:count], len(finished[0]))


def noised(x_0: Tensor, level: NoiseLevel, generator: torch.Generator) -> Tensor:
    """alpha_t x_0 + sigma_t epsilon, (P, *dims)."""
    epsilon = torch.randn(x_0.shape, generator=generator, dtype=torch.float32)
    return level.alpha_t * x_0 + level.sigma_t * epsilon.to(x_0)


class Classes:
    """Labels of finished samples, by the user's classifier on decoded images or by clusters of the samples."""

    def __init__(
        self,
        classify: Callable | None,
        count: int,
        decoder: Restart,
        parents: Parents,
        reference: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.classify, self.decoder, self.parents, self.generator = classify, decoder, parents, generator
        self.centres = None
        if classify is None:
            if len(reference) < count:
                raise ValueError(f"num_clusters={count} of {len(reference)} samples. Expected at most as many.")
            seed = int(torch.randint(2**31, (1,), generator=generator))
            rng = np.random.default_rng(seed)
            self.centres, _ = kmeans2(reference.flatten(1).double().numpy(), count, minit="++", seed=rng, iter=50)

    def of(self, finished: Tensor) -> np.ndarray:
        """Labels of finished samples (n, *dims), (n,)."""
        if self.classify is None:
            return self.label(finished, None)
        points = finished.to(self.parents.finished)
        return self.label(*self.decoder(points, self.parents.batch, self.generator, decode=True))

    def label(self, ends: Tensor, images: Any) -> np.ndarray:
        """Labels of ends (n, *dims) that were decoded to ``images``."""
        if self.classify is None:
            return vq(ends.flatten(1).cpu().double().numpy(), self.centres)[0]
        labels = self.classify(images)
        labels = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if labels.shape != (len(images),) or labels.dtype.kind not in "biuUS":
            raise ValueError(
                f"classify returned shape {labels.shape} of {labels.dtype} for {len(images)} images. Expected ({len(images)},), "
                "integers or strings."
            )
        return labels


@dataclass
class Experiment:
    """All clones and U-turns of one measurement."""

    parents: Parents
    restarts: list[Restart]
    classes: Classes
    samples: Tensor | None
    num_parents: int
    num_clones: int
    generator: torch.Generator

    def __post_init__(self) -> None:
        self.decode = self.classes.classify is not None
        self.starts, self.own = self.parents.finished, None
        if self.samples is not None:
            self.own = torch.randperm(len(self.samples), generator=self.generator)[: self.num_parents]
            self.starts = self.samples[self.own].to(self.parents.finished)
            self.exact = EmpiricalDenoiser(self.samples)
        self._start_labels: np.ndarray | None = None

    def at(self, i: int, gesture: str) -> tuple[np.ndarray, Estimate | None, Estimate | None]:
        """Agreement of every parent at one branch, recall of the model and of the exact score."""
        restart, batch = self.restarts[i], self.parents.batch
        labels, home, weights = [], [], []
        for _ in range(self.num_clones):
            if gesture == "clones":
                points = self.parents.samples[i]
                labels.append(self.classes.label(*restart(points, batch, self.generator, decode=self.decode)))
            if gesture == "u_turn" or self.own is not None:
                points = noised(self.starts, self.parents.steps[i].level, self.generator)
                decode = self.decode and gesture == "u_turn"
                ends, images = restart(points, batch, self.generator, decode=decode)
                if gesture == "u_turn":
                    labels.append(self.classes.label(ends, images))
                if self.own is not None:
                    home.append(_nearest(ends, self.samples) == self.own)
                    weights.append(self._weights(points, i))
        agreement = _pairwise(labels) if gesture == "clones" else np.mean([own == self.start_labels for own in labels], axis=0)
        if self.own is None:
            return agreement, None, None
        recall = share(torch.stack(home).double().mean(0).numpy())
        return agreement, recall, share(torch.stack(weights).mean(0).cpu().numpy())

    @property
    def start_labels(self) -> np.ndarray:
        """Classes of the samples that U-turns start from."""
        if self._start_labels is None:
            self._start_labels = self.classes.of(self.starts)
        return self._start_labels

    def _weights(self, points: Tensor, i: int) -> Tensor:
        """The exact score's weight of every U-turn's own example, (P,)."""
        level = self.parents.steps[i].level
        return self.exact.weights(points.cpu(), level.alpha_t, level.sigma_t)[range(len(self.own)), self.own]


def _pairwise(labels: list[np.ndarray]) -> np.ndarray:
    """Share of pairs of clones with one label, for every parent."""
    pairs = list(itertools.combinations(labels, 2))
    return np.mean([one == other for one, other in pairs], axis=0)


def _nearest(ends: Tensor, data: Tensor) -> Tensor:
    ends, data = ends.cpu().float().flatten(1), data.flatten(1)
    return torch.cdist(ends, data, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
