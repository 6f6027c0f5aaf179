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
from .difference import require_finite
from .drive import Drive
from .ending import Ending
from .jacobian import Derivative, Jacobian
from .precision import HALF, ProbeWeights, has_step_cache, to_float32
from .replay import NetworkCall, Replay, ReplayRefused, input_scales, is_single_output
from .schedule import NoiseLevel

Engine = Literal["auto", "replay", "drive"]
Branch = Literal["guided", "conditional", "unconditional"]
CERTIFICATE_TOLERANCE = 2e-5
HALF_TOLERANCE = 5e-2  # what half precision may cost where a float32 probe is compared with the pipeline's own number
DERIVATIVE_TOLERANCE = 3e-5  # between the two engines' reverse products; they agree to rounding or are of different maps
DIFFERENCE_TOLERANCE = 0.2  # a difference over 0.1 sigma_t is coarse; a cut gradient is off by 1
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
        engine: Engine,
        derivative: Derivative = "autograd",
        ending: Ending | None = None,
    ) -> None:
        self.index, self.level, self.sample, self.model_output = index, level, sample, model_output
        self.timestep, self.alpha_t, self.sigma_t, self.sigma = level.timestep, level.alpha_t, level.sigma_t, level.sigma
        self.drive, self._requested, self._calls, self._derivative = drive, engine, calls, derivative
        self.ending = ending
        self._autocast = torch.is_autocast_enabled(sample.device.type)  # while the pipeline ran
        modules = list({id(c.module): c.module for c in calls}.values())
        self._weights = ProbeWeights(modules)
        self._cached = any(has_step_cache(m) for m in modules)  # while the pipeline ran
        self._replay: Replay | None = None
        self._certificate: tuple[str, float] | None = None
        self.refusal: str | None = None
        self.note: str | None = None

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
        half, x = self.sample.dtype in HALF, to_float32(self.sample)
        generator = torch.Generator().manual_seed(self.index)
        shift = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) * (_OFF_TRAJECTORY * self.sigma_t)
        points = [x, x + shift, x - shift]
        with self._weights.scope(), torch.no_grad():
            driven = [require_finite(o, f"the network's output at step {self.index}") for o in self.drive.verified(points)]
        on_point = _relative(driven[0], self.model_output)
        tolerance = HALF_TOLERANCE if half or self._autocast else CERTIFICATE_TOLERANCE
        if self._cached:  # the trajectory is that of the cached run, the denoiser that of the network itself
            self.note = f"a step cache changed the recorded output by {on_point:.1e}; probes are of the network without it"
        elif on_point > tolerance:
            raise RuntimeError(
                f"step {self.index} (timestep {self.timestep:g}) cannot be evaluated again: the pipeline's own loop gives a model "
                f"output that differs by {on_point:.1e} from the recorded one. Expected a step that depends on the sample and "
                "the call's arguments only; a callback, a cache or a loop counter that changes the network's input breaks this."
            )
        self._check_input_scale(HALF_TOLERANCE if half or self._autocast else 1e-4)
        if self._derivative == "difference":
            return self._certify_black_box(points, driven, on_point)
        difference = (driven[1] - driven[2]) / 2
        direction = difference / difference.norm() if difference.any() else torch.ones_like(difference)
        pulled = self._pull(lambda x: self.drive([x])[0], direction)
        rounding = 10 * torch.finfo(x.dtype).eps * driven[0].norm().item()
        self._check_derivative((pulled * shift).sum().item(), difference.norm().item(), rounding)
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
        with self._weights.scope(), torch.no_grad():
            replayed = self._replay(torch.stack(points), self._replay.weights)
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

    def _check_derivative(self, slope: float, size: float, rounding: float) -> None:
        """Compares the driven loop's derivative with its difference; RuntimeError when something cuts the gradient."""
        if abs(slope - size) > DIFFERENCE_TOLERANCE * size + rounding:
            raise RuntimeError(
                f"the derivative of the model output at step {self.index} differs by {abs(slope / size - 1):.1e} from its finite "
                "difference. Expected a network that can be differentiated: detach, no_grad or rounding inside it, or a __call__ "
                "that calls another under no_grad, hides its Jacobian. For a black box pass derivative='difference'."
            )


def _relative(value: Tensor, reference: Tensor) -> float:
    value, reference = value.cpu().double(), reference.cpu().double()
    return ((value - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
