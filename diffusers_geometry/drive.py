"""Engine one: let the pipeline's own loop evaluate our points at step k.

A private shallow copy of the pipeline gets a private copy of the scheduler whose ``set_timesteps`` makes every loop position the
recorded one and whose ``step`` hands the loop our next point instead of a denoised sample, and collects the model output. No code
per pipeline, the result is what ``scheduler.step`` would have seen: guidance combined, channels split, signs right. It is the
truth that the faster engine is checked against. Nothing of the user's pipeline or scheduler is touched.

A loop also counts its iterations, and some pipelines act by the count (a ControlNet that guides the first half of a run, skipped
layers). So no run has more iterations than the recorded one, points are placed only in iterations that :meth:`Drive.verified` has
shown to agree, and where they do not, every point is placed in the iteration that step k really was.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .pipeline_call import EndOfRun, PipelineCall, StepOutput, private_pipeline, run_privately, step_arguments
from .precision import HALF

PATCHED = ("set_timesteps", "scale_model_input", "step")
PLACES = 8  # iterations of one run that take points


def held(value: Any) -> Any:
    """A value of a scheduler's state that no step changes in place: lists and tensors are copied."""
    if isinstance(value, list):
        return [held(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


class Drive:
    """Evaluates the model output of step k at any points by running the pipeline.

    Args:
        call: The recorded call.
        scheduler: A copy of the scheduler as it was before the call.
        state: The scheduler's attributes at step k, when the pipeline asked for the step.
        timestep: The timestep of step k.
        duplicated: Whether the pipeline carries [x, x] through its scheduler (DiT with guidance).
        iteration: How many steps the run had made before step k.
        iterations: How many it makes in all.

    Attributes:
        by_count: Whether the pipeline's loop acts by its count, so that points are placed in iteration ``iteration`` only.
    """

    def __init__(
        self,
        call: PipelineCall,
        scheduler: Any,
        state: dict[str, Any],
        timestep: Any,
        duplicated: bool,
        iteration: int,
        iterations: int,
    ) -> None:
        self.call, self.scheduler, self.timestep, self.duplicated = call, scheduler, timestep, duplicated
        self.state = {name: value for name, value in state.items() if name not in PATCHED}
        self.iteration, self.iterations, self.by_count = iteration, iterations, False

    @property
    def places(self) -> int:
        """How many points one run evaluates; the first iteration has the pipeline's own sample."""
        return 1 if self.by_count else min(max(self.iterations - 1, 1), PLACES)

    def restore(self, scheduler: Any) -> None:
        """Puts a scheduler into its state at step k."""
        scheduler.__dict__.update({name: held(value) for name, value in self.state.items()})

    def here(self, timesteps: Tensor) -> Tensor:
        """The timestep of step k, as ``timesteps`` hold theirs."""
        return torch.as_tensor(self.timestep, device=timesteps.device, dtype=timesteps.dtype).flatten()[0]

    def __call__(self, points: Sequence[Tensor]) -> list[Tensor]:
        """Model outputs at ``points``, each (b, *dims) -> (b, *dims); differentiable where gradients are enabled.

        Raises:
            RuntimeError: the pipeline's loop did not take the points over as they are.
        """
        return [output for output, _ in self._run(points)]

    def verified(self, points: Sequence[Tensor], *, own_precision: bool = False) -> list[Tensor]:
        """Like a call, for plain tensors, and checks that the loop asked for its steps at exactly these points.

        With ``own_precision`` the networks run as the user has them, outside any scope of probe weights.
        """
        results = self._run(points, own_precision)
        for point, (_, sample) in zip(points, results, strict=True):
            if not torch.equal(sample.to(point.dtype), point):
                if any(torch.equal(sample.to(point.dtype), point.to(dtype).to(point.dtype)) for dtype in HALF):
                    raise RuntimeError(
                        f"{self.call.pipeline_class.__name__} rounds its sample to half precision within its loop, so that it has "
                        "no float32 derivative. Expected the pipeline in float32: load it with dtype=torch.float32."
                    )
                raise RuntimeError(
                    f"{self.call.pipeline_class.__name__} changes the sample between two scheduler steps, so its model cannot be "
                    "evaluated at a chosen point. Expected scheduler.step to be the only thing that moves the sample."
                )
        return [output for output, _ in results]

    def _run(self, points: Sequence[Tensor], own_precision: bool = False) -> list[tuple[Tensor, Tensor]]:
        """(model output, sample that the scheduler was given) at every point, in as many runs as it takes."""
        pairs = []
        for start in range(0, len(points), self.places):
            taken = [torch.cat([p, p]) if self.duplicated else p for p in points[start : start + self.places]]
            pairs += self._one_run(taken, own_precision)
        pairs = [(own_channels(output, sample.shape), sample) for output, sample in pairs]
        return [(o[: len(o) // 2], x[: len(x) // 2]) for o, x in pairs] if self.duplicated else pairs

    def _one_run(self, points: list[Tensor], own_precision: bool) -> list[tuple[Tensor, Tensor]]:
        before = max(self.iteration - 1, 0) if self.by_count else 0
        pipe, received = self._private_pipeline([points[0].detach()] * before + points, own_precision)
        run_privately(self.call, pipe, own_precision=own_precision)
        if len(received) != before + len(points) + 1:
            raise RuntimeError(
                f"{self.call.pipeline_class.__name__} evaluated {max(len(received) - 1, 0)} of {before + len(points)} points when "
                "its loop was driven. Expected a loop over scheduler.timesteps that passes each step's result to the next."
            )
        return received[before + 1 :]

    def _private_pipeline(self, points: list[Tensor], own_precision: bool) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        received, upcoming = [], iter(points)

        def step(*args: Any, **kwargs: Any) -> StepOutput:
            named = step_arguments(scheduler, args, kwargs)
            received.append((named["model_output"], named["sample"]))
            point = next(upcoming, None)
            if point is None:
                raise EndOfRun
            return StepOutput((point, point))

        timesteps = torch.as_tensor(self.state["timesteps"])
        scheduler = self.private_scheduler(self.here(timesteps).repeat(len(timesteps) + (self.iterations == 1)), step)
        return private_pipeline(self.call, scheduler, own_precision=own_precision), received

    def private_scheduler(self, loop: Tensor, step: Callable, pinned: Callable[[], bool] = lambda: True) -> Any:
        """A copy of the scheduler that is in its state at step k whatever the pipeline sets up.

        Args:
            loop: The timesteps that the pipeline runs over.
            step: Stands in for ``scheduler.step``.
            pinned: Whether the next step still finds the state of step k; its own otherwise.
        """
        scheduler = copy.deepcopy(self.scheduler)
        originals = {name: getattr(scheduler, name) for name in PATCHED if hasattr(scheduler, name)}

        def pin() -> None:
            self.restore(scheduler)
            scheduler.timesteps = loop

        @functools.wraps(originals["set_timesteps"])
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            pin()  # the state of step k holds what this sets, and no NumPy that a function transform could not pass

        @functools.wraps(originals.get("scale_model_input", lambda sample, timestep=None: sample))
        def scale_model_input(*args: Any, **kwargs: Any) -> Tensor:
            if pinned():
                pin()
            return originals["scale_model_input"](*args, **kwargs)

        replacements = {"set_timesteps": set_timesteps, "step": functools.wraps(originals["step"])(step)}
        if "scale_model_input" in originals:
            replacements["scale_model_input"] = scale_model_input
        scheduler.__dict__.update(replacements)
        return scheduler


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
