"""Measured transitions of a pipeline: from which noise on a generation has its class, and from which it recites an example.

    report = pipe.measure_transitions(batch_size=64, num_inference_steps=100, data=train, classify=labels_of)
    print(report.table())

Parents are plain runs. At every branch clones are made of them by one of the two gestures of :mod:`.clones`, and the agreement of
their classes falls from one to chance as the noise grows: where it meets a level is the speciation sigma. With a data set, U-turns
of its examples show how often the model comes back to the very example (the nearest neighbour of the end is the start), beside the
share of returns that the exact score of the same data would have, and the collapse of that score is found.
Formulas are in :mod:`.transition_report`; the experiments are those of George et al., arXiv:2502.04339.
"""

from __future__ import annotations

import inspect
import itertools
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm.auto import tqdm

from .clones import Classes, Experiment, Parents
from .collapse import as_samples, data_collapse, held_out_collapse, held_out_errors
from .restart import Restart, Schedule
from .speciation import ClassPair, speciation_sigma, square_root, top_eigenvalue
from .transition_report import TransitionReport


def measure_transitions(
    pipe: Any,
    /,
    *args: Any,
    data: Tensor | ArrayLike | None = None,
    held_out: Tensor | ArrayLike | None = None,
    classify: Callable[[Any], ArrayLike] | None = None,
    num_clusters: int = 2,
    branch_positions: int | Sequence[int] | Literal["all"] = 8,
    num_parents: int = 64,
    num_clones: int = 4,
    gesture: Literal["auto", "clones", "u_turn"] = "auto",
    agreement_level: float = 0.8,
    num_draws: int = 2000,
    clone_seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> TransitionReport:
    """Branches runs of ``pipe(*args, **kwargs)`` and says where their class and their example are decided.

    Calls hold as many runs as the pipeline's own arguments make (``batch_size``, ``num_images_per_prompt``, a list of prompts), and
    one number of runs is much like another to a processor: ask for large batches. U-turns of ``data`` are denoised under the
    conditioning of the call.

    Args:
        pipe: A diffusers pipeline.
        *args: Arguments of the pipeline's call.
        data: Examples for recall and collapse, as the scheduler's samples (n, *dims), or as images in [-1, 1] for a ``vae``.
        held_out: Examples that the model has not seen, likewise; adds the collapse by their errors.
        classify: Maps decoded images, (B, ...) as the pipeline returns them, to B labels (integers or strings). If None, k-means
            clusters of the samples are the classes, without decoding.
        num_clusters: Of k-means.
        branch_positions: How many loop positions after the first step (spread over the run), which ones, or "all".
        num_parents: Runs, and examples of ``data``, that clones are made of.
        num_clones: Clones of a parent at every position.
        gesture: "clones" continue from one x_k with independent noise; "u_turn" noises finished samples (of ``data`` where given)
            and denoises them. "auto" is "clones" where the sampler draws noise, which is tried, and "u_turn" where it does not:
            clones of a deterministic run are all the same.
        agreement_level: Agreement that defines the speciation sigma.
        num_draws: Examples or noised examples that expectations over the data are taken over.
        clone_seed: Seed of everything random here; the parents' noise is the caller's.
        progress: Show a bar over the positions.
        **kwargs: Arguments of the pipeline's call.

    Raises:
        ValueError: an argument out of range, a pipeline without a known scheduler, examples of another shape, labels of another
            length, output that is neither tensor nor array.
        RuntimeError: a pipeline whose loop cannot be entered at a later step.
    """
    _check(locals())
    if classify is not None and "output_type" in inspect.signature(type(pipe).__call__).parameters:
        kwargs = {"output_type": "pt" if pipe.dtype == torch.bfloat16 else "np"} | kwargs
    generator = torch.Generator().manual_seed(clone_seed)
    schedule = Schedule.of(pipe, args, kwargs)
    positions = schedule.branches(branch_positions)
    samples = None if data is None else as_samples(pipe, data, schedule.shape, "data")
    collapse = {} if samples is None else data_collapse(samples, num_draws, generator)
    if held_out is not None:
        unseen = as_samples(pipe, held_out, schedule.shape, "held_out")
        collapse["held_out"] = held_out_collapse(held_out_errors(pipe, args, kwargs, unseen, generator), samples)

    parents = Parents.run(pipe, args, kwargs, schedule, positions, num_parents)
    restarts = [Restart.at(step, schedule) for step in parents.steps]
    stochastic = _draws_noise(restarts[0], parents, generator)
    gesture = _gesture(gesture, stochastic, pipe)
    reference = _some(parents.finished.cpu().float() if samples is None else samples, num_draws, generator)
    decoder = Restart(parents.steps[0].drive, schedule, len(schedule.timesteps))
    classes = Classes(classify, num_clusters, decoder, parents, reference, generator)

    experiment = Experiment(parents, restarts, classes, samples, num_parents, num_clones, generator)
    measured = [experiment.at(i, gesture) for i in tqdm(range(len(positions)), disable=not progress, desc="branches")]
    agreements, recall, exact_recall = zip(*measured, strict=True)
    agreements, sigmas = np.stack(agreements, axis=1), tuple(step.sigma for step in parents.steps)
    return TransitionReport(
        positions=tuple(positions), sigmas=sigmas, gesture=gesture, stochastic=stochastic, agreements=agreements,
        level=float(agreement_level), speciation=speciation_sigma(sigmas, agreements, agreement_level, seed=clone_seed),
        top_eigenvalue_sigma=square_root(top_eigenvalue(reference.flatten(1), generator)),
        pairs=_pairs(reference, classes.of(reference), agreement_level, stochastic),
        recall=None if samples is None else list(recall), exact_recall=None if samples is None else list(exact_recall),
        collapse=collapse,
        settings={
            "pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__, "steps": len(schedule.timesteps),
            "num_parents": num_parents, "num_clones": num_clones, "clone_seed": clone_seed,
            "num_examples": 0 if samples is None else len(samples), "samples_for_predictions": len(reference),
            "classes": f"{num_clusters} clusters" if classify is None else getattr(classify, "__name__", "classifier"),
            "whole_loops": [r.position for r in restarts if r.whole],
        },
    )  # fmt: skip


def _some(samples: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return samples[torch.randperm(len(samples), generator=generator)[:count]]


def _draws_noise(restart: Restart, parents: Parents, generator: torch.Generator) -> bool:
    """Whether two continuations of the same samples end apart."""
    points = parents.samples[0][: parents.batch]
    first, second = (restart(points, parents.batch, generator)[0] for _ in range(2))
    return not torch.equal(first, second)


def _gesture(asked: str, stochastic: bool, pipe: Any) -> str:
    if asked == "clones" and not stochastic:
        raise ValueError(
            f"gesture='clones' with {type(pipe.scheduler).__name__}, which draws no noise here: all clones would be the same. "
            "Expected 'u_turn' or 'auto'."
        )
    return ("clones" if stochastic else "u_turn") if asked == "auto" else asked


def _pairs(reference: Tensor, labels: np.ndarray, level: float, stochastic: bool) -> list[ClassPair]:
    """All pairs of classes that have at least two samples each."""
    flat = reference.flatten(1).double()
    groups = {name.item(): flat[torch.from_numpy(labels == name)] for name in np.unique(labels)}
    groups = {name: members for name, members in groups.items() if len(members) >= 2}
    return [ClassPair.between(p, groups[p[0]], groups[p[1]], level, stochastic) for p in itertools.combinations(groups, 2)]


def _check_branches(positions: Any, least: dict[str, int]) -> None:
    """Raises ValueError for what is neither a number (checked with the others, in ``least``), nor positions, nor "all"."""
    if isinstance(positions, (int, np.integer)):
        least["branch_positions"] = 2
    elif not isinstance(positions, (Sequence, np.ndarray)) or (
        positions != "all" if isinstance(positions, str) else not all(isinstance(k, (int, np.integer)) for k in positions)
    ):
        raise ValueError(f"branch_positions={positions!r}. Expected a number, loop positions, or 'all'.")
    elif not len(positions):
        raise ValueError("branch_positions is empty. Expected at least one loop position, a number of them, or 'all'.")


def _check(given: dict[str, Any]) -> None:
    """Raises ValueError for an argument out of range, before anything runs."""
    least = {"num_clusters": 2, "num_parents": 2, "num_clones": 2, "num_draws": 2, "clone_seed": 0}
    _check_branches(given["branch_positions"], least)
    for name, smallest in least.items():
        try:
            number = operator.index(given[name])
        except TypeError:
            number = -1
        if number < smallest or isinstance(given[name], bool):
            raise ValueError(f"{name}={given[name]!r}. Expected an integer >= {smallest}.")
    level = given["agreement_level"]
    if not isinstance(level, numbers.Real) or not 0.5 < level < 1:
        raise ValueError(f"agreement_level={level!r}. Expected 0.5 < agreement_level < 1.")
    if given["classify"] is not None and not callable(given["classify"]):
        raise ValueError(f"classify={given['classify']!r}. Expected None or a function from B decoded images to B labels.")
    if given["gesture"] not in ("auto", "clones", "u_turn"):
        raise ValueError(f"gesture={given['gesture']!r}. Expected 'auto', 'clones' or 'u_turn'.")
    if given["held_out"] is not None and given["data"] is None:
        raise ValueError(
            "held_out without data. Expected data too: they collapse where the information is the log of their number."
        )
    if given["held_out"] is not None and len(given["held_out"]) < 2:
        raise ValueError(f"held_out has {len(given['held_out'])} examples. Expected at least 2: its error is their spread.")
    if getattr(given["pipe"], "scheduler", None) is None:
        raise ValueError(f"{type(given['pipe']).__name__} has no scheduler. Expected a diffusers pipeline that denoises with one.")
