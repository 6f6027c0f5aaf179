"""Recording a pipeline while it generates: every chosen step's sample, noise level, and the denoiser to evaluate there again.

    with record(pipe, steps=10) as recording:
        pipe("a thin seven")
    denoiser = recording[3].denoiser

While the block is open, ``scheduler.step`` is wrapped on the instance, forward hooks note the arguments of the networks, and the
pipeline's class is a subclass that takes down the call. All of it is undone on leaving, also after an exception, and none of it
changes a number: images are bit-identical. Denoisers are built when they are first asked for, see :mod:`.recorded_step`.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .difference import require_finite
from .drive import Drive, held, own_output
from .ending import Ending
from .jacobian import Derivative
from .pipeline_call import PipelineCall, keeping_attention_processors, step_arguments
from .precision import ProbeWeights, check_probeable, out_of_inference
from .recorded_step import Engine, RecordedStep
from .replay import NetworkCall, is_duplicated, may_hold
from .schedule import loop_length, loop_position, noise_level, scheduler_family


class RecordedEnough(BaseException):
    """Ends a call whose recording was to stop early; not an Exception, so that no pipeline swallows it."""


class Recording(Sequence[RecordedStep]):
    """The recorded steps of one pipeline call, in order; made by :func:`record`.

    Attributes:
        final_sample: The last step's result, before any decoding, (B, *dims); None before the call.
        total_steps: Number of loop positions of the run.
        before_first: Called with the sample before the first step; may raise to refuse the run.
        after_kept: Called with every recorded step while the run waits there; its denoiser can be evaluated already.
        stop_after_recording: Ends the call by :class:`RecordedEnough` when this many steps are recorded; None lets it finish.
    """

    def __init__(self, pipe: Any, steps: int | Sequence[int] | str, engine: Engine, derivative: Derivative = "autograd") -> None:
        self.pipe, self._steps, self._engine, self._derivative = pipe, steps, engine, derivative
        self.stop_after_recording: int | None = None
        self.before_first: Callable[[Tensor], None] | None = None
        self.after_kept: Callable[[RecordedStep], None] | None = None
        self._recorded: list[RecordedStep] = []
        self._wanted: frozenset[int] = frozenset()
        self._first = self._count = 0
        self._calls: list[NetworkCall] = []
        self._call: PipelineCall | None = None
        self._used = self._waiting = False
        self._restore = ExitStack()
        self._weights = ProbeWeights(m for m in _networks(pipe).values() if not type(m).__module__.startswith("transformers."))
        self.final_sample: Tensor | None = None
        self.total_steps = 0

    def __len__(self) -> int:
        return len(self._recorded)

    def __getitem__(self, i: Any) -> Any:
        return self._recorded[i]

    def __enter__(self) -> Recording:
        if self._used:
            raise RuntimeError("this recording was entered before. Expected one `with record(pipe)` block per recording.")
        if getattr(type(self.pipe), "_is_recorded", False) or getattr(self.pipe.scheduler.step, "is_recording", False):
            raise RuntimeError(f"{type(self.pipe).__name__} is being recorded already. Expected one recording at a time.")
        self._used = True
        with ExitStack() as undo:
            self._patch_pipeline(undo)
            self._restore = undo.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore.close()
        self._calls = []

    def run(self, count: int | None, *args: Any, **kwargs: Any) -> None:
        """Calls the recorded pipeline, and ends the call once ``count`` steps are recorded; lets it finish if None."""
        self.stop_after_recording = count
        try:
            self.pipe(*args, **kwargs)
        except RecordedEnough:
            if hasattr(self.pipe, "maybe_free_model_hooks"):
                self.pipe.maybe_free_model_hooks()

    def check_complete(self) -> None:
        """Raises RuntimeError when the run ended before the steps it was to record."""
        missing = sorted(self._wanted - {step.index for step in self})
        if missing:
            raise RuntimeError(
                f"the run ended after {self._count} of {self.total_steps} steps, before {missing} were recorded. Expected "
                "positions that the run reaches; a callback or an argument of the pipeline ends it early."
            )

    def _patch_pipeline(self, undo: ExitStack) -> None:
        pipe, scheduler, pipeline_class = self.pipe, self.pipe.scheduler, type(self.pipe)
        self._pristine = copy.deepcopy(scheduler)
        recording = self

        @functools.wraps(pipeline_class.__call__)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if pipe is not recording.pipe:  # a copy of the pipeline, made while it was recorded
                return pipeline_class.__call__(pipe, *args, **kwargs)
            if recording._call is not None:
                raise RuntimeError("a recording holds one pipeline call, and this is the second. Open another recording for it.")
            recording._call = PipelineCall.capture(pipe, pipeline_class, args, kwargs)
            with keeping_attention_processors(pipe):
                output = pipeline_class.__call__(pipe, *args, **kwargs)
            if not recording._count:
                raise RuntimeError(f"{pipeline_class.__name__} never called scheduler.step, so there is nothing to record.")
            return output

        members = {"__call__": call, "__module__": pipeline_class.__module__, "_is_recorded": True}
        pipe.__class__ = type(pipeline_class.__name__, (pipeline_class,), members)
        undo.callback(setattr, pipe, "__class__", pipeline_class)
        undo.callback(_put_back, scheduler, "step", scheduler.__dict__.get("step"))
        scheduler.step = types.MethodType(self._recorded_step(scheduler), scheduler)
        for module in _networks(pipe).values():
            undo.callback(module.register_forward_pre_hook(self._before_network, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(self._after_network).remove)

    def _recorded_step(self, scheduler: Any) -> Callable:
        """What stands in for ``scheduler.step``; a method, so that a copy of the scheduler steps itself and is not recorded."""
        recording, original = self, scheduler.step

        @functools.wraps(original)
        def step(stepping: Any, *args: Any, **kwargs: Any) -> Any:
            if stepping is not scheduler:
                return type(stepping).step(stepping, *args, **kwargs)
            named = step_arguments(scheduler, args, kwargs)
            recording._before_step(named["model_output"], named["timestep"], named["sample"])
            if recording.stop_after_recording is not None and len(recording) >= recording.stop_after_recording:
                raise RecordedEnough
            result = original(*args, **kwargs)
            recording.final_sample = out_of_inference(result[0] if isinstance(result, tuple) else result.prev_sample)
            return result

        step.is_recording = True
        return step

    def _before_network(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._call is not None and not self._waiting and (not self._wanted or self._count + self._first in self._wanted):
            self._calls.append(NetworkCall(module, args, dict(kwargs)))

    def _after_network(self, module: nn.Module, args: tuple, output: Any) -> None:
        for call in reversed(self._calls):
            if call.module is module and call.output is None:
                call.output = output
                return

    def _before_step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> None:
        scheduler = self.pipe.scheduler
        if self._call is None:
            raise RuntimeError(
                "the recorded scheduler was stepped by something else than a call of the recorded pipeline. Expected the call "
                "of the same object that was given to record()."
            )
        position = loop_position(scheduler, timestep, self._first + self._count if self._count else None)
        if not self._count:
            self._first, self.total_steps = position, loop_length(scheduler) - position
            self._wanted = frozenset(resolve_steps(self._steps, self.total_steps, self._first))
            if self.before_first is not None:
                self.before_first(sample)
        if position in self._wanted:
            self._keep(position, model_output, timestep, sample)
        self._calls = []
        if position in self._wanted and self.after_kept is not None:
            self._wait(self._recorded[-1])
        self._count += 1

    def _wait(self, step: RecordedStep) -> None:
        """Lets :attr:`after_kept` evaluate the step; the calls of networks that this takes are not recorded."""
        self._waiting = True
        try:
            with torch.inference_mode(False), torch.enable_grad():
                self.after_kept(step)
        finally:
            self._waiting = False

    def _keep(self, position: int, model_output: Tensor, timestep: Any, sample: Tensor) -> None:
        model_output = require_finite(own_output(model_output, sample), f"the network's output at step {position}")
        # Calls whose arguments hold no copy of the sample (text encoders before the first step) are not of this step.
        calls = [c for c in self._calls if may_hold(c, sample)]
        duplicated = is_duplicated(sample, model_output, calls)
        with torch.inference_mode(False):
            state = {name: held(value) for name, value in self.pipe.scheduler.__dict__.items()}
        drive = Drive(self._call, self._pristine, state, timestep, duplicated, position - self._first, self.total_steps)
        if duplicated:
            sample, model_output = sample[: len(sample) // 2], model_output[: len(model_output) // 2]
        level = noise_level(self.pipe.scheduler, position)
        sample, model_output = out_of_inference(sample.detach()), out_of_inference(model_output.detach())
        for call in calls:
            call.args, call.kwargs = out_of_inference(call.args), out_of_inference(call.kwargs)
        ending = Ending(drive, position, sample, lambda: self.final_sample, self._weights)
        step = RecordedStep(
            position, level, sample, model_output, calls, drive, self._weights, self._engine, self._derivative, ending
        )
        self._recorded.append(step)


def record(
    pipe: Any,
    steps: int | Sequence[int] | Literal["all"] = 10,
    *,
    engine: Engine = "auto",
    derivative: Derivative = "autograd",
) -> Recording:
    """A recording of the one pipeline call made inside its ``with`` block.

    Args:
        pipe: Any pipeline with a scheduler whose noise levels are known.
        steps: How many loop positions (evenly spaced from first to last), or which ones (negative from the end), or "all".
        engine: "auto" certifies a replay and falls back to drive, saying why in ``RecordedStep.refusal``; "replay" raises
            instead of falling back; "drive" always runs the pipeline's own loop.
        derivative: "difference" for a network without gradients, whose denoisers are then probed by function values only; "auto"
            is then drive, and a replay that is asked for by name is certified by its outputs alone.

    Raises:
        ValueError: unknown scheduler, empty or senseless ``steps``, a network in train mode.
        RuntimeError: the recording is entered twice, or the pipeline is being recorded already.
    """
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler. Expected a diffusers pipeline that denoises with one.")
    if engine not in ("auto", "replay", "drive"):
        raise ValueError(f"engine={engine!r}. Expected 'auto', 'replay' or 'drive'.")
    scheduler_family(pipe.scheduler)
    check_steps(steps)
    for name, module in _networks(pipe).items():
        check_probeable(name, module)
    if derivative not in get_args(Derivative):
        raise ValueError(f"derivative={derivative!r}. Expected one of {get_args(Derivative)}.")
    return Recording(pipe, steps, engine, derivative)


def check_steps(steps: int | Sequence[int] | str) -> None:
    """Raises ValueError for a choice of steps that no run can meet."""
    if steps == "all":
        return
    is_count = isinstance(steps, int) and not isinstance(steps, bool)
    is_choice = isinstance(steps, (Sequence, range)) and not isinstance(steps, str) and all(isinstance(s, int) for s in steps)
    if (is_count and steps < 1) or (is_choice and not len(steps)) or not (is_count or is_choice):
        raise ValueError(f"steps={steps!r}. Expected a positive number of steps, a non-empty sequence of positions, or 'all'.")


def resolve_steps(steps: int | Sequence[int] | str, total: int, first: int = 0) -> list[int]:
    """Loop positions to record in a run of ``total`` steps that starts at position ``first``.

    Raises:
        ValueError: more steps, or a later position, than the run has.
    """
    if steps == "all":
        return list(range(first, first + total))
    if isinstance(steps, int):
        count = min(steps, total)
        return sorted({first + round(i * (total - 1) / max(count - 1, 1)) for i in range(count)})
    outside = [s for s in steps if not -total <= s < total]
    if outside:
        raise ValueError(f"steps={list(steps)} has {outside}. Expected positions from {-total} to {total - 1} in a run of {total}.")
    return sorted({first + s % total for s in steps})


def _put_back(scheduler: Any, name: str, previous: Any) -> None:
    """Restores an attribute of the instance, or its absence."""
    scheduler.__dict__.pop(name, None)
    if previous is not None:
        setattr(scheduler, name, previous)


def _networks(pipe: Any) -> dict[str, nn.Module]:
    return {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
