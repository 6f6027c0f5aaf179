"""Engine one: let the pipeline's own loop evaluate our points at step k.

A private shallow copy of the pipeline gets a private copy of the scheduler whose ``set_timesteps`` makes every loop position the
recorded one and whose ``step`` hands the loop our next point instead of a denoised sample, and collects the model output. No code
per pipeline, the result is what ``scheduler.step`` would have seen: guidance combined, channels split, signs right. It is the
truth that the faster engine is checked against. Nothing of the user's pipeline or scheduler is touched.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_CALLBACKS = ("callback", "callback_on_step_end")
PATCHED = ("set_timesteps", "scale_model_input", "step")


class EndOfRun(BaseException):
    """Ends a private run of the pipeline; not an Exception, so that no pipeline swallows it."""


class StepOutput(tuple):
    """What a pipeline reads of a scheduler step: ``.prev_sample``, or the first item of a tuple."""

    @property
    def prev_sample(self) -> Tensor:
        return self[0]


@dataclass
class PipelineCall:
    """One call of a pipeline, with what is needed to repeat its conditioning.

    Attributes:
        pipe: The pipeline.
        pipeline_class: Its class.
        arguments: Keyword arguments of the call (positional ones bound to their names), callbacks left out.
        generator_states: States that the call's generators had at its start.
        rng_states: States of torch's global generators at its start, per device type.
        positional: What the call passed through a ``*args``, with everything before it.
    """

    pipe: Any
    pipeline_class: type
    arguments: dict[str, Any]
    generator_states: list[tuple[torch.device, Tensor]] = field(default_factory=list)
    rng_states: dict[str, Any] = field(default_factory=dict)
    positional: tuple = ()

    @classmethod
    def capture(cls, pipe: Any, pipeline_class: type, args: tuple, kwargs: dict) -> PipelineCall:
        """Takes down the call ``pipe(*args, **kwargs)`` before it is made."""
        bound = inspect.signature(pipeline_class.__call__).bind(pipe, *args, **kwargs)
        arguments, positional = dict(list(bound.arguments.items())[1:]), ()
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                # Python binds what stands before *args by position too.
                before = list(bound.signature.parameters)[1 : list(bound.signature.parameters).index(name)]
                positional = (*(arguments.pop(n) for n in before if n in arguments), *arguments.pop(name, ()))
        arguments = {k: v for k, v in arguments.items() if k not in _CALLBACKS}
        generator = arguments.get("generator")
        generators = generator if isinstance(generator, (list, tuple)) else [generator] if generator is not None else []
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
        states_of = [(g.device, g.get_state()) for g in generators]
        return cls(pipe, pipeline_class, arguments, states_of, states, positional)

    def replayed_arguments(self) -> dict[str, Any]:
        """The arguments with fresh generators in the recorded states."""
        arguments = dict(self.arguments)
        if self.generator_states:
            fresh = []
            for device, state in self.generator_states:
                fresh.append(torch.Generator(device))
                fresh[-1].set_state(state)
            arguments["generator"] = fresh if isinstance(arguments["generator"], (list, tuple)) else fresh[0]
        return arguments

    @contextmanager
    def global_rng(self) -> Any:
        """A scope in which torch's global generators are in the recorded states; the current ones return afterwards."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if "cuda" in self.rng_states else []):
            torch.set_rng_state(self.rng_states["cpu"])
            if "cuda" in self.rng_states:
                torch.cuda.set_rng_state_all(self.rng_states["cuda"])
            yield


@contextmanager
def keeping_attention_processors(pipe: Any) -> Iterator[None]:
    """Puts back attention processors that a pipeline swaps for the length of its loop, also when the loop is left early."""
    networks = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    held = [(part, part.processor) for m in networks for part in m.modules() if hasattr(part, "processor")]
    try:
        yield
    finally:
        for part, processor in held:
            if part.processor is not processor:
                part.set_processor(processor) if hasattr(part, "set_processor") else setattr(part, "processor", processor)


def private_pipeline(call: PipelineCall, scheduler: Any, **components: Any) -> Any:
    """A shallow copy of the call's pipeline with another scheduler, and other components where given."""
    pipe = copy.copy(call.pipe)
    pipe.__class__ = call.pipeline_class
    pipe.__dict__.update(scheduler=scheduler, _progress_bar_config={"disable": True}, **components)
    return pipe


def run_privately(call: PipelineCall, pipe: Any, **changed: Any) -> Any:
    """Repeats the call on a private pipeline, with gradients where they are enabled; None when :class:`EndOfRun` ended it.

    Args:
        call: The recorded call.
        pipe: From :func:`private_pipeline`.
        **changed: Arguments of the call that differ.
    """
    run = call.pipeline_class.__call__
    if torch.is_grad_enabled():
        run = inspect.unwrap(run)  # past diffusers' @torch.no_grad
    try:
        with call.global_rng(), keeping_attention_processors(pipe):
            return run(pipe, *call.positional, **call.replayed_arguments() | changed)
    except EndOfRun:
        return None


class Drive:
    """Evaluates the model output of step k at any points by running the pipeline.

    Args:
        call: The recorded call.
        scheduler: A copy of the scheduler as it was before the call.
        state: The scheduler's attributes at step k, when the pipeline asked for the step.
        timestep: The timestep of step k.
        duplicated: Whether the pipeline carries [x, x] through its scheduler (DiT with guidance).
    """

    def __init__(self, call: PipelineCall, scheduler: Any, state: dict[str, Any], timestep: Any, duplicated: bool) -> None:
        self.call, self.scheduler, self.timestep, self.duplicated = call, scheduler, timestep, duplicated
        self.state = {name: value for name, value in state.items() if name not in PATCHED}

    def restore(self, scheduler: Any) -> None:
        """Puts a scheduler into its state at step k."""
        scheduler.__dict__.update({k: copy.copy(v) if isinstance(v, list) else v for k, v in self.state.items()})

    def __call__(self, points: Sequence[Tensor]) -> list[Tensor]:
        """Model outputs at ``points``, each (b, *dims) -> (b, *dims); differentiable where gradients are enabled.

        Raises:
            RuntimeError: the pipeline's loop did not take the points over as they are.
        """
        return [output for output, _ in self._run(points)]

    def verified(self, points: Sequence[Tensor]) -> list[Tensor]:
        """Like a call, for plain tensors, and checks that the loop asked for its steps at exactly these points."""
        results = self._run(points)
        for point, (_, sample) in zip(points, results, strict=True):
            if not torch.equal(sample.to(point.dtype), point):
                raise RuntimeError(
                    f"{self.call.pipeline_class.__name__} changes the sample between two scheduler steps, so its model cannot be "
                    "evaluated at a chosen point. Expected scheduler.step to be the only thing that moves the sample."
                )
        return [output for output, _ in results]

    def _run(self, points: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(model output, sample that the scheduler was given) at every point."""
        pipe, received = self._private_pipeline([torch.cat([p, p]) if self.duplicated else p for p in points])
        run_privately(self.call, pipe)
        if len(received) != len(points) + 1:
            raise RuntimeError(
                f"{self.call.pipeline_class.__name__} evaluated {max(len(received) - 1, 0)} of {len(points)} points when its "
                "loop was driven. Expected a loop over scheduler.timesteps that passes each step's result to the next."
            )
        pairs = [(own_channels(output, sample.shape), sample) for output, sample in received[1:]]
        return [(o[: len(o) // 2], x[: len(x) // 2]) for o, x in pairs] if self.duplicated else pairs

    def _private_pipeline(self, points: list[Tensor]) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        scheduler, received, upcoming = copy.deepcopy(self.scheduler), [], iter(points)
        originals = {name: getattr(scheduler, name) for name in PATCHED if hasattr(scheduler, name)}
        parameters = list(inspect.signature(originals["step"]).parameters)

        def pin() -> None:
            self.restore(scheduler)
            timesteps = torch.as_tensor(self.state["timesteps"])
            repeats = len(timesteps) + len(points) + 1
            scheduler.timesteps = torch.as_tensor(self.timestep, device=timesteps.device, dtype=timesteps.dtype).repeat(repeats)

        @functools.wraps(originals["set_timesteps"])
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            pin()  # the state of step k holds what this sets, and no NumPy that a function transform could not pass

        @functools.wraps(originals.get("scale_model_input", lambda sample, timestep=None: sample))
        def scale_model_input(*args: Any, **kwargs: Any) -> Tensor:
            pin()
            return originals["scale_model_input"](*args, **kwargs)

        @functools.wraps(originals["step"])
        def step(*args: Any, **kwargs: Any) -> StepOutput:
            named = dict(zip(parameters, args, strict=False)) | kwargs
            received.append((named["model_output"], named["sample"]))
            point = next(upcoming, None)
            if point is None:
                raise EndOfRun
            return StepOutput((point, point))

        replacements: dict[str, Callable] = {"set_timesteps": set_timesteps, "step": step}
        if "scale_model_input" in originals:
            replacements["scale_model_input"] = scale_model_input
        scheduler.__dict__.update(replacements)
        return private_pipeline(self.call, scheduler), received


def own_channels(output: Tensor, shape: Sequence[int]) -> Tensor:
    """The prediction part of a model output: the first half of its channels where it has twice those of ``shape``."""
    if output.ndim > 1 and len(shape) > 1 and output.shape[1] == 2 * shape[1]:
        return output[:, : shape[1]]
    return output


def own_output(model_output: Tensor, sample: Tensor) -> Tensor:
    """The prediction part of a model output; raises ValueError when it does not fit the sample."""
    output = own_channels(model_output, sample.shape)
    if output.shape != sample.shape:
        raise ValueError(f"model_output has shape {tuple(model_output.shape)}. Expected that of the sample, {tuple(sample.shape)}.")
    return output
