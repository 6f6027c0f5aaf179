"""One recorded step: its noise level and its denoiser, with the certificate that the denoiser is the pipeline's own.

A denoiser is either a *replay* (fast, :mod:`.replay`) or a *drive* (the pipeline's own loop, :mod:`.drive`). The certificate
decides. The driven loop must give the recorded output again at the recorded sample, and its derivative must agree with its
difference over x ± h v, so that a network which cuts its gradient cannot pass. Replay must agree with the driven loop away from the
trajectory, at x ± h v, and in one reverse product: on the trajectory a replay of a non-linear guidance (guidance_rescale) agrees to
rounding and has a derivative that is several per cent off. A replay that disagrees is refused, and the step says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .denoiser import Denoiser
from .difference import check_derivative, is_out_of_memory, require_finite
from .drive import Drive
from .ending import Ending
from .jacobian import Derivative, Jacobian
from .precision import HALF, ProbeWeights, has_step_cache, is_half, to_float32
from .replay import NetworkCall, Replay, ReplayRefused, evaluations, input_scales, is_single_output, sampled_calls
from .schedule import NoiseLevel

Engine = Literal["auto", "replay", "drive"]
Branch = Literal["guided", "conditional", "unconditional"]
CERTIFICATE_TOLERANCE = 2e-5
HALF_TOLERANCE = 5e-2  # what half precision may cost where a float32 probe is compared with the pipeline's own number
DERIVATIVE_TOLERANCE = 3e-5  # between the two engines' reverse products; they agree to rounding or are of different maps
_OFF_TRAJECTORY = 0.1  # displacement of the certificate's points per coordinate, in units of sigma_t


class RecordedStep:
    """One step that a pipeline made.

    Attributes:
        index: Loop position.
        timestep: As the scheduler has it.
        level: The :class:`~diffusers_geometry.schedule.NoiseLevel`; its alpha_t, sigma_t and sigma are attributes here too.
        sample: x_t as the scheduler was given it, (B, *dims).
        model_output: What the scheduler was given with it, guidance combined, (B, *dims).
        refusal: Why replay was refused, or None.
        note: What a reader should know of this step's numbers (a step cache was on), or None; both are set once it is certified.
    """

    def __init__(
        self,
        index: int,
        level: NoiseLevel,
        sample: Tensor,
        model_output: Tensor,
        calls: list[NetworkCall],
        drive: Drive,
        weights: ProbeWeights,
        engine: Engine,
        derivative: Derivative = "autograd",
        ending: Ending | None = None,
    ) -> None:
        self.index, self.level, self.sample, self.model_output = index, level, sample, model_output
        self.timestep, self.alpha_t, self.sigma_t, self.sigma = level.timestep, level.alpha_t, level.sigma_t, level.sigma
        self.drive, self._requested, self._calls, self._derivative = drive, engine, calls, derivative
        self.ending = ending
        self._autocast = torch.is_autocast_enabled(sample.device.type)  # while the pipeline ran
        self._weights = weights
        self._half = sample.dtype in HALF or any(is_half(call.module) for call in calls)
        self._cached = any(has_step_cache(call.module) for call in calls)  # while the pipeline ran
        self._replay: Replay | None = None
        self._certificate: tuple[str, float] | None = None
        self.refusal: str | None = None
        self.note: str | None = None

    @property
    def network_calls(self) -> list[NetworkCall]:
        """The calls of networks that were given the sample."""
        return sampled_calls(self._calls, self.sample)

    @property
    def evaluations(self) -> int:
        """Network evaluations that this step took for one sample."""
        return evaluations(self._calls, self.sample)

    @property
    def has_guidance(self) -> bool:
        """Whether the conditional and the unconditional branch can be told apart: two outputs, and the replay engine."""
        return self.engine == "replay" and len(self._replay.weights) == 2

    @property
    def weights_memory(self) -> int:
        """Bytes of the float32 copies that probes make of the pipeline's half precision weights."""
        return self._weights.memory

    @property
    def engine(self) -> str:
        """The engine that passed the certificate: "replay" or "drive"."""
        return self._certified()[0]

    @property
    def certificate_error(self) -> float:
        """Relative L2 disagreement: replay with drive off the trajectory, or drive with the recorded output on it."""
        return self._certified()[1]

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser of the guided model output: what the sampler follows."""
        return self.branch("guided")

    def branch(self, name: Branch) -> Denoiser:
        """The denoiser of one branch of classifier-free guidance.

        Raises:
            ValueError: a branch that was not computed, or that only the replay engine could separate and it was refused.
        """
        a, b = self.level.a, self.level.b
        if self.engine == "replay":
            weights = self._replay.branch_weights(name)

            def model_output(points: Tensor, index: int | None) -> Tensor:
                with self._weights.scope():
                    return self._replay(points, weights, index)
        elif name != "guided" and not (name == "conditional" and is_single_output(self._calls, self.sample)):
            raise ValueError(
                f"branch={name!r} at step {self.index} needs the replay engine, which was refused: {self.refusal}. "
                "Expected branch='guided' here."
            )
        else:
            model_output = self._driven

        def denoised(x_t: Tensor, index: int | None = None) -> Tensor:
            points = self._stacked(to_float32(x_t), index)
            return (a * points + b * model_output(points, index)).reshape(x_t.shape)

        return Denoiser(
            denoised,
            alpha_t=self.alpha_t,
            sigma_t=self.sigma_t,
            select_fn=lambda i: functools.partial(denoised, index=i),
            cancellation=self.alpha_t * abs(a),
            continuation=self.ending and self.ending.continuation(guided=name == "guided"),
        )

    def _stacked(self, x_t: Tensor, index: int | None) -> Tensor:
        """Points as (K, b, *dims): rows of one sample, or whole batches."""
        batch = 1 if index is not None else len(self.sample)
        if x_t.shape[1:] != self.sample.shape[1:] or len(x_t) % batch:
            raise ValueError(
                f"x_t has shape {tuple(x_t.shape)}. Expected (B, {', '.join(map(str, self.sample.shape[1:]))}) with B a multiple "
                f"of {batch}, the batch of the recorded call; use denoiser.select(i) for points of one sample."
            )
        return x_t.reshape(-1, batch, *self.sample.shape[1:])

    def _driven(self, points: Tensor, index: int | None) -> Tensor:
        """Model outputs of the guided branch by the drive engine, (K, b, *dims) -> (K, b, *dims)."""
        batches = list(points.unbind(0))
        if index is not None:
            base = self.sample.to(points.dtype)
            batches = [torch.cat([base[:index], p, base[index + 1 :]]) for p in batches]
        with self._weights.scope():
            outputs = self.drive(batches)
        return torch.stack(outputs if index is None else [o[index : index + 1] for o in outputs])

    def _certified(self) -> tuple[str, float]:
        if self._certificate is None:
            self._certificate = self._certify()
        return self._certificate

    def _certify(self) -> tuple[str, float]:
        """Chooses the engine; see the module docstring."""
        half, x = self._half, to_float32(self.sample)
        generator = torch.Generator().manual_seed(self.index)
        shift = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) * (_OFF_TRAJECTORY * self.sigma_t)
        on_point = self._check_places(x, half and not self._autocast)
        points = [x, x + shift, x - shift]
        with self._weights.scope(), torch.no_grad():
            driven = [require_finite(o, f"the network's output at step {self.index}") for o in self.drive.verified(points)]
            self._check_rows(x, shift, driven)
        self._check_input_scale(HALF_TOLERANCE if half or self._autocast else 1e-4)
        if self._derivative == "difference":
            return self._certify_black_box(points, driven, on_point)
        difference = (driven[1] - driven[2]) / 2
        direction = difference / difference.norm() if difference.any() else torch.ones_like(difference)
        pulled = self._pull(lambda x: self.drive([x])[0], direction)
        with self._weights.scope():
            what = f"the model output at step {self.index}"
            check_derivative(lambda p: self.drive([p])[0], x, shift, direction, pulled, what)
        if self._requested == "drive":
            return "drive", on_point
        try:
            error = self._try_replay(points, driven, direction, pulled)
        except ReplayRefused as refused:
            if self._requested == "replay":
                raise
            self._replay, self.refusal = None, str(refused)
            return "drive", on_point
        return "replay", error

    def _check_places(self, x: Tensor, own_precision: bool) -> float:
        """Disagreement of the driven loop with the recorded output, the largest over the iterations that take points.

        Where an iteration disagrees, only the one that this step was is used. A half precision pipeline is held against its
        record in its own precision; what float32 probes differ by is noted.
        """
        tolerance = HALF_TOLERANCE if self._autocast else CERTIFICATE_TOLERANCE
        for by_count in (False, True):
            self.drive.by_count = by_count
            with self._weights.untouched() if own_precision else self._weights.scope(), torch.no_grad():
                point = self.sample if own_precision else x
                driven = self.drive.verified([point] * self.drive.places, own_precision=own_precision)
            errors = [_relative(require_finite(o, f"the network's output at step {self.index}"), self.model_output) for o in driven]
            if self._cached:  # the trajectory is that of the cached run, the denoiser that of the network itself
                self.note = f"a step cache changed the recorded output by {errors[0]:.1e}; probes are of the network without it"
                return errors[0]
            if max(errors) <= tolerance:
                return self._noted(x) if own_precision else max(errors)
            if self.drive.iteration == 0:
                break  # the first iteration has the pipeline's own sample
        raise RuntimeError(
            f"step {self.index} (timestep {self.timestep:g}) cannot be evaluated again: the pipeline's own loop gives a model "
            f"output that differs by {max(errors):.1e} from the recorded one. Expected a step that depends on the sample and "
            "the call's arguments only; a callback, a cache or a first step unlike the others changes the network's input."
        )

    def _noted(self, x: Tensor) -> float:
        """What the float32 loop differs by from a half precision record; such rounding is no reason to refuse."""
        with self._weights.scope(), torch.no_grad():
            error = _relative(self.drive.verified([x])[0], self.model_output)
        if error > CERTIFICATE_TOLERANCE:
            self.note = f"float32 probes differ from the recorded half precision output by {error:.1e}"
        return error

    def _check_rows(self, x: Tensor, shift: Tensor, driven: list[Tensor]) -> None:
        """Refuses samples that are frames of one: a row of a batch must not follow the others."""
        if len(x) == 1:
            return
        moved = torch.cat([x[:1], (x + shift)[1:]])
        followed = _relative(self.drive([moved])[0][:1], driven[0][:1])
        if followed > HALF_TOLERANCE * _relative(driven[1], driven[0]):
            raise RuntimeError(
                f"the {len(x)} rows of the scheduler's sample at step {self.index} influence one another: moving the others moves "
                f"the first one's output by {followed:.1e}. Expected independent samples; frames of one video as rows have no "
                "Jacobian of their own."
            )

    def _certify_black_box(self, points: list[Tensor], driven: list[Tensor], on_point: float) -> tuple[str, float]:
        """Without derivatives to compare, the pipeline's own loop is the engine, unless replay was asked for by name."""
        if self._requested != "replay":
            self.refusal = "a black box has no derivative that could certify a replay" if self._requested == "auto" else None
            return "drive", on_point
        return "replay", self._compare_replay(points, driven)

    def _check_input_scale(self, tolerance: float) -> None:
        """Refuses a pipeline that shows its network another multiple of the sample than the scheduler's noise level says."""
        for c_in in input_scales(self._calls, self.sample):
            if abs(c_in / self.level.c_in - 1) > tolerance:
                raise RuntimeError(
                    f"the network saw {c_in:.6g} x at step {self.index}. Expected {self.level.c_in:.6g} x, the input scale of "
                    "this scheduler: the pipeline and the scheduler do not fit together."
                )

    def _try_replay(self, points: list[Tensor], driven: list[Tensor], direction: Tensor, pulled: Tensor) -> float:
        """Builds the replay and returns its largest disagreement with the driven loop; ReplayRefused beyond tolerance."""
        error = self._compare_replay(points, driven)
        slope = _relative(self._pull(lambda x: self._replay(x[None], self._replay.weights)[0], direction), pulled)
        if slope > DERIVATIVE_TOLERANCE:
            raise ReplayRefused(f"replay's derivative differs from that of the pipeline's own loop by {slope:.1e}")
        return max(error, slope)

    def _compare_replay(self, points: list[Tensor], driven: list[Tensor]) -> float:
        """Builds the replay and returns its largest disagreement of outputs; ReplayRefused beyond tolerance."""
        self._replay = Replay(self.sample, self.model_output, self._calls)
        try:
            with self._weights.scope(), torch.no_grad():
                if self._half:
                    self._replay.fit(points[0], driven[0])
                replayed = self._replay(torch.stack(points), self._replay.weights)
                self._replay.separate(points[1])
        except RuntimeError as error:  # shapes that a network takes from more than its batch
            if is_out_of_memory(error):
                raise
            raise ReplayRefused(f"the network does not take a stack of samples: {str(error).splitlines()[0]}") from error
        error = max(_relative(r, d) for r, d in zip(replayed, driven, strict=True))
        if error > CERTIFICATE_TOLERANCE:
            raise ReplayRefused(f"replay differs from the pipeline's own loop by {error:.1e} off the trajectory")
        return error

    def _pull(self, model_output: Callable[[Tensor], Tensor], direction: Tensor) -> Tensor:
        """One reverse product of the model output at the sample."""

        def probed(x: Tensor) -> Tensor:
            with self._weights.scope():
                return model_output(x)

        return Jacobian(probed, to_float32(self.sample)).vjp(direction)


def _relative(value: Tensor, reference: Tensor) -> float:
    value, reference = value.cpu().double(), reference.cpu().double()
    return ((value - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
