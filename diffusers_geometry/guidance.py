"""Guidance in the step: the model's clean estimate is shifted before the scheduler uses it.

    with guided(pipe, GeometryGuidance(reward, scale=2.0)):
        pipe("a thin seven")

x_0 = a x_t + b o for a network output o, so a wanted change of x_0 is o + shift / b, whatever the scheduler, its order, the
prediction type or classifier-free guidance do with it: a model that always answers one point ends at that point plus the shift, to
rounding. Multistep solvers keep the shifted estimate in their history, as they should.

Tilting a density by exp(scale V / spread) adds scale grad V / spread to its score, so sigma² scale grad_y V / spread to x_0. With
tau = sigma / sqrt(1 + sigma²), the noise seen from data of unit variance, and g = tau grad_y V / spread per sample,

    shift = scale tau g / |g|  (``normalize=True``)        shift = scale tau g  (the tilt itself, sigma² bounded by the data's)

so that with normalisation ``scale`` counts posterior standard deviations along the one direction that matters, in any dimension
and for any objective. The shift is then cut to a trust radius: a multiple of what the model itself just changed in x_0, or of the
length tau sqrt(d) of its uncertainty. Nothing couples the samples of a batch. After Dhariwal and Nichol (2021, arXiv:2105.05233)
and, for a function of x_0, Bansal et al. (2023, arXiv:2302.07121).
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .drive import own_output
from .objectives import Evaluation, GuidedStep, append_dims, as_objective, checked
from .pipeline_call import step_arguments
from .precision import ProbeWeights, to_float32
from .replay import NetworkCall, Replay, may_hold
from .schedule import NoiseLevel, loop_length, loop_position, noise_level, scheduler_family

Trust = Literal["update", "noise"]
_PATCHED = ("set_timesteps", "step")


class GeometryGuidance:
    """How an objective steers a generation; holds no state of a run.

    Args:
        objective: A reward, an objective of :mod:`.objectives`, a function (x_0, x_t, sigma) -> (B,), or a list of (one of these,
            weight) pairs.
        scale: Positive raises the objective, negative lowers it, 0 changes nothing; a number, or a function of progress in [0, 1].
        start: First share of the run that is guided.
        stop: Last share. Noises that a reward was not trained on are left out.
        target: Value to come to, instead of ever higher: the shift points to it, and shrinks within one spread of it.
        target_bin: A reward's bin to come to.
        normalize: Per-sample unit direction, see the module docstring.
        trust_radius: Largest shift, in units of the reference.
        trust: The reference: "update" (the model's last change of x_0; at its first step the noise) or "noise" (tau sqrt(d)).

    Raises:
        TypeError: what cannot be an objective.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        objective: Any,
        scale: float | Callable[[float], float] = 1.0,
        start: float = 0.2,
        stop: float = 0.8,
        target: float | None = None,
        target_bin: int | None = None,
        normalize: bool = True,
        trust_radius: float = 1.0,
        trust: Trust = "update",
    ) -> None:
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"start={start}, stop={stop}. Expected 0 <= start <= stop <= 1, shares of the run.")
        if trust not in ("update", "noise") or not trust_radius > 0:
            raise ValueError(f"trust={trust!r}, trust_radius={trust_radius}. Expected 'update' or 'noise', and a positive radius.")
        if not callable(scale) and not math.isfinite(scale):
            raise ValueError(f"scale={scale}. Expected a finite number, or a function of progress.")
        if target is not None and (target_bin is not None or not math.isfinite(target)):
            raise ValueError(f"target={target}, target_bin={target_bin}. Expected one of them, the value finite.")
        self.objective = as_objective(objective, target_bin)
        self.scale, self.start, self.stop, self.target = scale, start, stop, target
        self.normalize, self.trust_radius, self.trust = normalize, trust_radius, trust

    def scale_at(self, progress: float) -> float:
        """The scale at a share of the run, 0 outside ``start..stop``."""
        if not self.start <= progress <= self.stop:
            return 0.0
        scale = float(self.scale(progress)) if callable(self.scale) else float(self.scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale({progress:.3g}) = {scale}. Expected a finite number.")
        return scale

    def shift(self, step: GuidedStep, scale: float, previous: Tensor | None) -> tuple[Tensor, Evaluation]:
        """The wanted change of x_0 (B, *dims), and the objective's evaluation.

        Args:
            step: Where the sample is.
            scale: Of this step.
            previous: The model's clean estimate at the step before, None at its first.
        """
        with torch.inference_mode(False), torch.enable_grad():
            found = checked(self.objective.evaluate(step), step)
        tau = 1.0 if math.isinf(step.level.sigma) else step.level.sigma / math.sqrt(1 + step.level.sigma**2)
        spread = torch.as_tensor(found.spread).to(found.value).expand(len(step.x_t))
        direction = tau * found.gradient / append_dims(spread, found.gradient)
        tiny = torch.finfo(direction.dtype).tiny
        if self.normalize:
            direction = direction / append_dims(_lengths(direction).clamp_min(tiny), direction)
        if self.target is not None:
            direction = direction * append_dims(((self.target - found.value) / spread).clamp(-1, 1), direction)
        shift = scale * tau * direction
        reference = torch.full_like(spread, tau * math.sqrt(step.x_t[0].numel()))
        if self.trust == "update" and previous is not None:
            reference = _lengths(step.denoised - previous)
        if math.isfinite(self.trust_radius):
            share = self.trust_radius * reference / _lengths(shift).clamp_min(tiny)
            shift = shift * append_dims(share.clamp_max(1), shift)
        return shift, found


@dataclass(frozen=True)
class GuidedStepLog:
    """What guidance did at one step: objective's value (B,), length of the shift of x_0 and of the model's estimate (B,)."""

    position: int
    progress: float
    sigma: float
    scale: float
    value: Tensor
    shift: Tensor
    denoised: Tensor


class GuidedRun:
    """The state of guidance over one pipeline call; made by :func:`guided`.

    Attributes:
        log: One :class:`GuidedStepLog` per guided step of the latest call.
    """

    def __init__(self, pipe: Any, guidance: GeometryGuidance) -> None:
        self.pipe, self.guidance = pipe, guidance
        self._calls: list[NetworkCall] = []
        self.begin()

    def begin(self) -> None:
        """Forgets the call before."""
        self.log: list[GuidedStepLog] = []
        self._first: int | None = None
        self._position = 0
        self._previous: Tensor | None = None
        self._scales: dict[int, float] = {}

    def output(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """The model output whose clean estimate is the shifted one; the same object where nothing is to be done."""
        scheduler, calls, self._calls = self.pipe.scheduler, self._calls, []
        self._position = loop_position(scheduler, timestep, None if self._first is None else self._position + 1)
        if self._first is None:
            self._plan(self._position)
        scale = self._scales.get(self._position, 0.0)
        needs_previous = self.guidance.trust == "update" and any(position > self._position for position in self._scales)
        if scale == 0 and not needs_previous:
            return model_output
        level, own = noise_level(scheduler, self._position), own_output(model_output, sample)
        # A pipeline that puts [x, x] through its scheduler (DiT) needs one shift for both halves; other equal rows get it anyway.
        doubled = len(sample) % 2 == 0 and all(torch.equal(*v.chunk(2)) for v in (sample, own))
        x_t, output = (to_float32(v.detach()[: len(v) // (1 + doubled)]) for v in (sample, own))
        step = GuidedStep(x_t, level.a * x_t + level.b * output, level, *self._denoisers(x_t, output, level, calls))
        previous, self._previous = self._previous, step.denoised
        if scale == 0:
            return model_output
        shift, found = self.guidance.shift(step, scale, previous)
        lengths = (_lengths(shift).cpu(), _lengths(step.denoised).cpu())
        progress = self._progress(self._position)
        self.log.append(GuidedStepLog(self._position, progress, level.sigma, scale, found.value.cpu(), *lengths))
        change = (torch.cat([shift, shift]) if doubled else shift) / level.b
        shifted, moved = model_output.clone(), change.flatten(1).any(dim=1)  # what is not moved keeps every bit
        own_output(shifted, sample)[moved] += change[moved].to(shifted.dtype)
        return shifted

    def _progress(self, position: int) -> float:
        return (position - self._first) / max(loop_length(self.pipe.scheduler) - 1 - self._first, 1)

    def _plan(self, first: int) -> None:
        """The scale of every position of the run; refuses a run in which nothing could be guided."""
        self._first, scheduler, guidance = first, self.pipe.scheduler, self.guidance
        wanted = {i: guidance.scale_at(self._progress(i)) for i in range(first, loop_length(scheduler))}
        wanted = {i: scale for i, scale in wanted.items() if scale}
        self._scales = {i: scale for i, scale in wanted.items() if guidance.objective.covers(noise_level(scheduler, i))}
        if wanted and not self._scales:
            sigmas = [noise_level(scheduler, i).sigma for i in (min(wanted), max(wanted))]
            raise ValueError(
                f"the objective covers no noise between start={guidance.start} and stop={guidance.stop}, sigma={sigmas[0]:.4g} to "
                f"{sigmas[1]:.4g}. Expected an interval that meets the noises it was trained on."
            )

    def _denoisers(
        self, x_t: Tensor, output: Tensor, level: NoiseLevel, calls: list[NetworkCall]
    ) -> tuple[Callable[[int], Denoiser], Callable[[str], Denoiser], Callable[[str], Tensor]] | tuple[()]:
        """The last three of a :class:`~.objectives.GuidedStep`, for an objective that asks for them."""
        if not self.guidance.objective.needs_network:
            return ()
        weights = ProbeWeights({id(c.module): c.module for c in calls}.values())
        replay = Replay(x_t, output, [c for c in calls if may_hold(c, x_t)])
        options = {"alpha_t": level.alpha_t, "sigma_t": level.sigma_t, "cancellation": level.alpha_t * abs(level.a)}

        def denoised(points: Tensor, share: Tensor, index: int | None) -> Tensor:
            stack = points[None] if index is None else points[:, None]
            with weights.scope():
                found = replay(stack, share, index)
            return level.a * points + level.b * found.reshape(points.shape)

        def of_sample(index: int) -> Denoiser:
            return Denoiser(functools.partial(denoised, share=replay.weights, index=index), **options)

        def of_branch(name: str) -> Denoiser:
            return Denoiser(functools.partial(denoised, share=replay.branch_weights(name), index=None), **options)

        def estimate(name: str) -> Tensor:
            return level.a * x_t + level.b * to_float32(replay.recorded(replay.branch_weights(name)))

        return of_sample, of_branch, estimate

    def watch(self, undo: ExitStack) -> None:
        """Notes the network calls of every step, where the objective needs them."""

        def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self._calls.append(NetworkCall(module, args, dict(kwargs), output))

        for module in self.pipe.components.values():
            if self.guidance.objective.needs_network and isinstance(module, nn.Module):
                undo.callback(module.register_forward_hook(after, with_kwargs=True).remove)


@contextmanager
def guided(pipe: Any, guidance: GeometryGuidance) -> Iterator[GuidedRun]:
    """A scope in which calls of ``pipe`` are guided; afterwards nothing is left patched.

    A recording may be opened inside: ``with guided(pipe, g), record(pipe) as recording``. What it records is the model's own output
    on the guided path, so its denoisers are the model's, not the guided ones.

    Args:
        pipe: A pipeline whose scheduler's noise levels are known.
        guidance: What to do.

    Raises:
        TypeError: ``guidance`` is no GeometryGuidance.
        ValueError: unknown scheduler.
        RuntimeError: the pipeline is guided or recorded already.
    """
    if not isinstance(guidance, GeometryGuidance):
        raise TypeError(f"guidance is a {type(guidance).__name__}. Expected GeometryGuidance(reward, scale=...).")
    scheduler = pipe.scheduler
    scheduler_family(scheduler)
    if getattr(scheduler.step, "is_recording", False):
        raise RuntimeError("the pipeline is being recorded. Expected the recording inside: `with guided(pipe, g), record(pipe)`.")
    if getattr(scheduler.step, "is_guided", False):
        raise RuntimeError("the pipeline is guided already. Expected one guidance; pass several objectives as a list of pairs.")
    run, originals = GuidedRun(pipe, guidance), {name: getattr(scheduler, name) for name in _PATCHED}
    held = {name: scheduler.__dict__[name] for name in _PATCHED if name in scheduler.__dict__}

    @_method_like(originals["set_timesteps"])
    def set_timesteps(own: Any, *args: Any, **kwargs: Any) -> Any:
        if own is not scheduler:  # a copy of the scheduler, made while it was guided
            return type(own).set_timesteps(own, *args, **kwargs)
        run.begin()
        return originals["set_timesteps"](*args, **kwargs)

    @_method_like(originals["step"])
    def step(own: Any, *args: Any, **kwargs: Any) -> Any:
        if own is not scheduler:
            return type(own).step(own, *args, **kwargs)
        named = step_arguments(scheduler, args, kwargs)
        output = run.output(named["model_output"], named["timestep"], named["sample"])
        if args:
            return originals["step"](output, *args[1:], **kwargs)
        return originals["step"](**kwargs | {"model_output": output})

    step.is_guided = True
    with ExitStack() as undo:
        undo.callback(scheduler.__dict__.update, held)
        undo.callback(lambda: [scheduler.__dict__.pop(name, None) for name in _PATCHED])
        scheduler.set_timesteps, scheduler.step = (types.MethodType(f, scheduler) for f in (set_timesteps, step))
        run.watch(undo)
        yield run


def _method_like(bound: Callable) -> Callable[[Callable], Callable]:
    """Makes a function pass for the method that it stands in for, its signature with ``self`` included."""

    def dress(function: Callable) -> Callable:
        function = functools.wraps(bound)(function)
        own, signature = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), inspect.signature(bound)
        function.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
        return function

    return dress


def _lengths(value: Tensor) -> Tensor:
    """L2 length of every sample, (B, *dims) -> (B,)."""
    return value.flatten(1).norm(dim=1)
