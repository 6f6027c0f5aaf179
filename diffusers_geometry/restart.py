"""Running a pipeline's own loop again from a later position on, with samples of our choice.

A run whose sample is replaced after step k - 1 is a run that starts at k. A private copy of the pipeline gets a private copy of
the scheduler whose ``step`` does that. At the branch it is set back to what ``set_timesteps`` left, so that a multistep solver
takes its first step without the history of another trajectory (diffusers' image-to-image does so by ``set_begin_index``). Nothing
of the user's pipeline is touched and no code is per pipeline.

The loop is shortened to begin one step before the branch. Before it is used, its model output at the recorded sample is compared
with the recorded one; where that differs (guidance that depends on the loop's index) the whole loop is run.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .analyze import made_by
from .capture import record
from .drive import PATCHED, Drive, held, own_channels
from .pipeline_call import EndOfRun, PipelineCall, StepOutput, private_pipeline, run_privately, step_arguments
from .recorded_step import CERTIFICATE_TOLERANCE, RecordedStep


@dataclass(frozen=True)
class Schedule:
    """A run's loop.

    Attributes:
        timesteps: Of all positions.
        first: The position it starts at.
        order: How many positions one solver step takes.
        shape: Of one sample, (*dims).
    """

    timesteps: Tensor
    first: int
    order: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, pipe: Any, args: tuple, kwargs: dict) -> Schedule:
        """Runs the call up to its second step; the caller's generators and callbacks are not used."""
        call = PipelineCall.capture(pipe, type(pipe), args, kwargs)
        with record(pipe, 1, engine="drive") as recording, call.global_rng():
            recording.run(1, *call.positional, **call.replayed_arguments())
        scheduler = pipe.scheduler
        if hasattr(scheduler, "ets") and not scheduler.config.skip_prk_steps:
            raise ValueError("PNDMScheduler has skip_prk_steps=False. Expected True: its Runge-Kutta start has no later beginning.")
        step = recording[0]
        order, shape = getattr(scheduler, "order", 1), tuple(step.sample.shape[1:])
        return cls(torch.as_tensor(scheduler.timesteps).clone(), step.index, order, shape)

    def branches(self, positions: int | Sequence[int] | str) -> list[int]:
        """Loop positions to branch at.

        Args:
            positions: How many (spread over the run after its first step), which ones, counted from the run's first step or
                from the end (as :func:`~.capture.record` counts), or "all".

        Raises:
            ValueError: a position at which no run can branch, with those at which it can.
        """
        total = len(self.timesteps) - self.first
        possible = list(range(self.order, total, self.order))
        if self.order == 1:  # PNDM visits its second level twice
            possible = [k for k in possible if self.timesteps[self.first + k] != self.timesteps[self.first + k - 1]]
        if not possible:
            raise ValueError(f"the run has {total} steps. Expected at least {self.order + 1}, to branch after the first.")
        if positions == "all":
            wanted = possible
        elif isinstance(positions, (int, np.integer)):
            wanted = [possible[round(i)] for i in np.linspace(0, len(possible) - 1, positions)]
        else:
            wanted = [k + total if k < 0 else k for k in positions]
            if outside := [k for k in wanted if k not in possible]:
                steps = f" in steps of {self.order}" if self.order > 1 else ""
                raise ValueError(
                    f"branch_positions={list(positions)} has {outside}. Expected from {possible[0]} to {possible[-1]}{steps}."
                )
        return sorted({self.first + k for k in wanted})


class Restart:
    """The pipeline's loop from one position on.

    Args:
        drive: Of a recorded step of the call to repeat.
        schedule: Of that call.
        position: Where samples are put in; ``len(schedule.timesteps)`` puts them in after the last step, to be decoded.
        whole: Run the loop from its beginning instead of from the step before.
    """

    def __init__(self, drive: Drive, schedule: Schedule, position: int, whole: bool = False) -> None:
        self._drive, self.position, self.whole = drive, position, whole or schedule.first > 0
        tail = schedule.timesteps[position:]
        if hasattr(drive.scheduler, "ets"):  # PNDM starts by a corrected step, which takes its second level twice
            tail = torch.unique_consecutive(tail)
            tail = torch.cat([tail[:1], tail[1:2], tail[1:]])
        self._loop = torch.cat([schedule.timesteps[0 if self.whole else position - 1 : position], tail])
        self._lead = position - schedule.first if self.whole else 1
        self._length = self._lead + len(tail)

    @classmethod
    def at(cls, step: RecordedStep, schedule: Schedule) -> Restart:
        """A restart at a recorded step that reproduces its model output.

        Raises:
            RuntimeError: neither the shortened nor the whole loop does.
        """
        for whole in (False, True):
            found = cls(step.drive, schedule, step.index, whole)
            seen, _, _ = found._run(step.sample, step.drive.call, first_output_only=True)
            output = own_channels(seen, step.sample.shape)[: len(step.sample)].double()
            if (output - step.model_output.double()).norm() <= CERTIFICATE_TOLERANCE * step.model_output.double().norm():
                return found
        raise RuntimeError(
            f"{step.drive.call.pipeline_class.__name__} gives another model output when its sample is put in before step "
            f"{step.index}. Expected scheduler.step to be the only thing that moves the sample."
        )

    def __call__(self, points: Tensor, batch: int, generator: torch.Generator, *, decode: bool = False) -> tuple[Tensor, Any]:
        """Runs ``points`` to their ends, ``batch`` of them in one call.

        Args:
            points: Samples at the position, (P, *dims).
            batch: As many as one call of the pipeline makes.
            generator: Seeds the noise of every call.
            decode: Also return what the pipeline makes of the ends.

        Returns:
            Ends in the scheduler's units, (P, *dims), and the decoded ends (P, ...) or None.
        """
        ends, images = [], []
        for chunk in points.split(batch):
            _, end, output = self._run(filled(chunk, batch), reseeded(self._drive.call, generator), decode=decode)
            ends.append(end[: len(chunk)])
            images.append(_decoded(output, batch, self._drive.call.pipeline_class)[: len(chunk)] if decode else None)
        if not decode:
            return torch.cat(ends), None
        return torch.cat(ends), torch.cat(images) if isinstance(images[0], Tensor) else np.concatenate(images)

    def _run(self, points: Tensor, call: PipelineCall, *, decode: bool = False, first_output_only: bool = False) -> tuple:
        """(first model output after the branch, ends, what the pipeline returned)."""
        pipe, seen = self._private_pipeline(points, stop_at=self._lead + 1 if first_output_only else None, decode=decode)
        with torch.no_grad():
            output = run_privately(call, pipe)
        if seen["steps"] < (self._lead + 1 if first_output_only else self._length):
            raise RuntimeError(
                f"{call.pipeline_class.__name__} ended after {seen['steps']} of {self._length} steps. Expected a loop over "
                "scheduler.timesteps that passes each step's result to the next."
            )
        return seen["output"], seen["sample"][: len(points)], output

    def _private_pipeline(self, points: Tensor, stop_at: int | None, decode: bool) -> tuple[Any, dict[str, Any]]:
        scheduler, state = copy.deepcopy(self._drive.scheduler), {}
        points = torch.cat([points, points]) if self._drive.duplicated else points
        set_original, step_original = scheduler.set_timesteps, scheduler.step
        seen: dict[str, Any] = {"steps": 0, "output": None, "sample": None}

        @functools.wraps(set_original)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            set_original(*args, **kwargs)
            state.update({k: held(v) for k, v in scheduler.__dict__.items() if k not in PATCHED})
            scheduler.timesteps = self._loop.to(scheduler.timesteps)

        @functools.wraps(step_original)
        def step(*args: Any, **kwargs: Any) -> Any:
            named = step_arguments(scheduler, args, kwargs)
            seen["steps"] += 1
            if seen["steps"] < self._lead:
                return StepOutput((named["sample"],) * 2)
            if seen["steps"] == self._lead:
                _resume(scheduler, state, self.position)
                seen["sample"], result = points, StepOutput((points,) * 2)
            else:
                seen["output"] = named["model_output"] if seen["output"] is None else seen["output"]
                if seen["steps"] == stop_at:
                    raise EndOfRun
                result = step_original(*args, **kwargs)
                seen["sample"] = result[0] if isinstance(result, tuple) else result.prev_sample
            if seen["steps"] == self._length and not decode:
                raise EndOfRun
            return result

        scheduler.__dict__.update(set_timesteps=set_timesteps, step=step)
        return private_pipeline(self._drive.call, scheduler), seen


def filled(chunk: Tensor, batch: int) -> Tensor:
    """At least one row repeated to ``batch`` of them: a call makes no fewer."""
    return torch.cat([chunk] * -(-batch // len(chunk)))[:batch]


def reseeded(call: PipelineCall, generator: torch.Generator) -> PipelineCall:
    """The call with noise of its own: fresh generators where it takes any, and fresh global states on the CPU."""
    given = call.arguments.get("generator")
    count = len(given) if isinstance(given, (list, tuple)) else 1
    devices = [device for device, _ in call.generator_states] or [torch.device("cpu")]
    fresh = [torch.Generator(d).manual_seed(s) for d, s in zip(devices, _seeds(generator, count), strict=True)]
    arguments, states = call.arguments, [(g.device, g.get_state()) for g in fresh]
    if given is None:
        parameters = inspect.signature(call.pipeline_class.__call__).parameters
        if "generator" in parameters and not call.positional:
            arguments = arguments | {"generator": fresh[0]}
        else:
            states = []
    rng = {**call.rng_states, "cpu": torch.Generator().manual_seed(_seeds(generator, 1)[0]).get_state()}
    return replace(call, arguments=arguments, generator_states=states, rng_states=rng)


def _seeds(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(2**62, (count,), generator=generator).tolist()


def _resume(scheduler: Any, state: dict[str, Any], position: int) -> None:
    """The scheduler as ``set_timesteps`` left it, its next step that of ``position``."""
    scheduler.__dict__.update({k: held(v) for k, v in state.items()})
    if hasattr(scheduler, "derivatives"):  # LMS takes its order from the position and expects as many derivatives
        scheduler.timesteps, scheduler.sigmas, position = scheduler.timesteps[position:], scheduler.sigmas[position:], 0
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(position)


def _decoded(output: Any, batch: int, pipeline_class: type) -> Tensor | np.ndarray:
    """The images (frames, vectors) of a pipeline's output as one tensor or array, (batch, ...)."""
    found = made_by(output)
    if isinstance(found, (list, tuple)) and len(found) and all(hasattr(image, "mode") for image in found):
        found = np.stack([np.asarray(image) for image in found])
    if not isinstance(found, (Tensor, np.ndarray)) or len(found) != batch:
        said = f"shape {tuple(found.shape)}" if hasattr(found, "shape") else type(found).__name__
        raise ValueError(
            f"{pipeline_class.__name__} returned {said} for {batch} samples. Expected one tensor or array with "
            f"{batch} rows to classify; pass output_type='np' or 'pt', or leave classify out to compare clusters of samples."
        )
    return found
