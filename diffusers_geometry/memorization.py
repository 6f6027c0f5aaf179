"""Memorisation scores of recorded runs; the scores themselves and their sources are in :mod:`.memorization_scores`.

A run gives one number per score. Prompts are then compared by these numbers over seeds, see :mod:`.memorization_detector`; a prompt
whose seeds all end at the same image is a suspect without any model call, see :func:`cross_seed_agreement`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .estimate import Estimate, jackknife_sem
from .memorization_detector import Ranking as Ranking
from .memorization_detector import rank_prompts as rank_prompts
from .memorization_scores import PROMPT_SCORES as PROMPT_SCORES
from .memorization_scores import SCORES, Measured, RunPoint, StepProbe, measure
from .memorization_scores import Score as Score

DEFAULT_SCORES: tuple[str, ...] = (
    "guidance_norm", "guidance_shift", "sharpness_reverse", "anisotropy", "commitment", "flipd", "flipd_gap", "effective_dimension",
    "contraction", "psi", "nuclear_norm", "spectral_norm",
)  # fmt: skip


@dataclass(frozen=True)
class RunScores:
    """The scores of one run.

    Attributes:
        steps: Per recorded step, the scores that have a meaning there.
        scores: One number per score, made of the steps as :attr:`Score.over_steps` says; its error is that of random probes, and 0
            for what is exact at the recorded steps. How much a score varies from seed to seed is another matter.
        forwards: Network evaluations of one sample spent, products converted at the rates of :mod:`.jacobian`.
    """

    steps: list[dict[str, Estimate]]
    scores: dict[str, Estimate]
    forwards: int


def score_run(
    points: Sequence[RunPoint], final: Tensor, scores: Sequence[str] = DEFAULT_SCORES, *, generator: torch.Generator | None = None
) -> RunScores:
    """All scores of one run, each network evaluation made once.

    Args:
        points: Recorded steps of one sample, in the order of the run.
        final: The sample that the run ended at, (*dims), in the scheduler's scale of x_0.
        scores: Names in :data:`SCORES`. Those that compare branches are left out where there is no guidance, those of the spectrum
            where there is, or it is not in hand.
        generator: Random probes, the same for every branch and step; a fixed seed by default.

    Raises:
        ValueError: an unknown score, or no points.
        FloatingPointError: the network returned NaN or infinity.
    """
    stacked = [
        replace(p, x_t=p.x_t[None], singular_values=None if p.singular_values is None else np.asarray(p.singular_values)[None])
        for p in points
    ]
    return score_batch(stacked, final[None], scores, generator=generator)[0]


def score_batch(
    points: Sequence[RunPoint], final: Tensor, scores: Sequence[str] = DEFAULT_SCORES, *, generator: torch.Generator | None = None
) -> list[RunScores]:
    """:func:`score_run` of a whole recorded batch at once: x_t (B, *dims), denoisers of the batch, singular values (B, k)."""
    unknown = [name for name in scores if name not in SCORES]
    if unknown or not points:
        raise ValueError(f"scores={unknown} of {len(points)} points. Expected names in {list(SCORES)}, and at least one point.")
    generator = generator or torch.Generator().manual_seed(0)
    order = sorted(range(len(points)), key=lambda i: points[i].sigma, reverse=True)
    steps, forwards = [], 0.0
    for point in points:
        probe = StepProbe(point, final, generator)
        found = {name: measure(name, probe) for name in scores}
        steps.append({name: value for name, value in found.items() if value is not None})
        forwards += probe.forwards
    by_noise = [steps[i] for i in order]
    runs = {name: _over_steps(name, by_noise) for name in scores if any(name in step for step in steps)}
    return [
        RunScores(
            [{name: _estimate(m, i) for name, m in step.items()} for step in steps],
            {name: _estimate(m, i) for name, m in runs.items()},
            math.ceil(forwards),
        )
        for i in range(len(final))
    ]


def _over_steps(name: str, by_noise: list[dict[str, Measured]]) -> Measured:
    """One number a run, of the steps from the noisiest on."""
    found = [step[name] for step in by_noise if name in step]
    if SCORES[name].over_steps != "mean":
        return found[0 if SCORES[name].over_steps == "first" else -1]
    # The same probes serve every step, so their errors add up.
    return Measured(np.mean([m.value for m in found], axis=0), np.mean([m.sem for m in found], axis=0))


def _estimate(measured: Measured, i: int) -> Estimate:
    return Estimate(float(measured.value[i]), sem=float(measured.sem[i]))


def cross_seed_agreement(samples: Tensor) -> Estimate:
    """Mean correlation of the finished samples of one prompt with one another: 1 where every seed gives the same image.

    Args:
        samples: One a seed, (S, *dims), S >= 2.

    Returns:
        The mean over pairs of seeds of the correlation over the sample's entries; its standard error is the jackknife's over
        seeds, None for two.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} samples. Expected those of at least two seeds.")
    flat = require_spread(samples.detach().flatten(1).double().cpu())
    correlation = (flat @ flat.T).numpy()

    def mean(chosen: Sequence[int]) -> float:
        return float(np.mean([correlation[i, j] for i, j in itertools.combinations(chosen, 2)]))

    everything = list(range(len(flat)))
    left_out = [mean([i for i in everything if i != j]) for j in everything] if len(flat) > 2 else []
    return Estimate(mean(everything), sem=jackknife_sem(left_out) if left_out else None)


def require_spread(flat: Tensor) -> Tensor:
    """Rows (S, d) centred and of unit length; a constant row correlates with nothing and stays zero."""
    centred = flat - flat.mean(dim=1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
