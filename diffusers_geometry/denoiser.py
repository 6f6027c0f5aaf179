"""The denoiser at one noise level: E[x_0 | x_t], the score and the noise, and their canonical Jacobians.

A sampler's point is x_t = alpha_t x_0 + sigma_t epsilon; y = x_t / alpha_t = x_0 + sigma epsilon is its variance-exploding
form, sigma = sigma_t / alpha_t. A network's output o gives the posterior mean as x_0 = a x_t + b o. With D = E[x_0 | x_t]:

    score(x_t) = grad log p_t(x_t) = (alpha_t D - x_t) / sigma_t^2        epsilon(x_t) = (x_t - alpha_t D) / sigma_t

The canonical Jacobian is D' = dD/dy = Cov(x_0 | y) / sigma^2 = I + sigma^2 J (second-order Tweedie): symmetric, positive, its
large singular values are the directions that the model keeps. J = d score_y / dy = (D' - I) / sigma^2 is the score Jacobian
of arXiv:2410.05898. In code dy is dx_t / alpha_t, so that alpha_t = 0 (pure noise) gives D' = 0 instead of a division.

    of=            map whose plain Jacobian with respect to x_t is returned                equals
    "denoised"     alpha_t D(x_t)                                                          D'
    "score"        (alpha_t D(x_t) - x_t) alpha_t^2 / sigma_t^2                            (D' - I) / sigma^2
    "epsilon"      (x_t - alpha_t D(x_t)) alpha_t / sigma_t                                (I - D') / sigma
    "decoded"      alpha_t decode(D(x_t))                                                  d image / dy
    "sampled"      sigma_t x_0(x_t), through the remaining steps                           d x_0 / d (x_t / sigma_t)
    "decoder"      decode(z), at the latent z that D(x_t) becomes; with respect to z       d image / dz

The last three need a :class:`~.continuation.Continuation`: what follows a step in a pipeline. The unit of "sampled" is the noise,
so that it is finite at alpha_t = 0 and does not depend on the scheduler's scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .continuation import Continuation
from .difference import check_derivative
from .jacobian import Jacobian

Map = Literal["denoised", "score", "epsilon", "decoded", "decoder", "sampled"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
MAPS: tuple[str, ...] = get_args(Map)
CONTINUED: tuple[str, ...] = ("decoded", "decoder", "sampled")  # maps that do not follow from D' alone
UNITS = {
    "denoised": "x_0 per x_0", "score": "1 / x_0^2", "epsilon": "unit noise per x_0",
    "decoded": "decoder output (before any clamp) per x_0", "decoder": "decoder output (before any clamp) per decoder input",
    "sampled": "x_0 per unit noise",
}  # fmt: skip


def prediction_coefficients(prediction_type: str, alpha_t: float, sigma_t: float) -> tuple[float, float]:
    """(a, b) with x_0 = a x_t + b output, for diffusers' prediction types.

    v_prediction is alpha epsilon - sigma x_0 for the normalised pair (alpha, sigma) = (alpha_t, sigma_t) / norm, which is the
    network's view in variance-exploding schedulers too; flow_prediction is epsilon - x_0.

    Raises:
        ValueError: unknown type, or epsilon at alpha_t = 0, where noise says nothing of x_0.
    """
    power = alpha_t**2 + sigma_t**2
    if prediction_type == "epsilon":
        if alpha_t == 0:
            raise ValueError(
                "alpha_t=0 with prediction_type='epsilon'. Expected alpha_t > 0: at pure noise a predicted epsilon does not "
                "determine x_0. Use v_prediction, sample or flow_prediction, or leave this step out."
            )
        return 1 / alpha_t, -sigma_t / alpha_t
    if prediction_type in ("sample", "original_sample"):
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return alpha_t / power, -sigma_t / math.sqrt(power)
    if prediction_type == "flow_prediction":
        return 1 / (alpha_t + sigma_t), -sigma_t / (alpha_t + sigma_t)
    raise ValueError(f"prediction_type={prediction_type!r}. Expected one of {get_args(PredictionType)}.")


class Denoiser:
    """E[x_0 | x_t] at one noise level, as a function of the scheduler's sample.

    Args:
        denoised_fn: x_t (B, *dims) -> E[x_0 | x_t] (B, *dims); rows must not influence one another.
        alpha_t: Signal scale, >= 0.
        sigma_t: Noise scale, > 0.
        select_fn: For a batch whose samples are conditioned differently, maps a sample's index to its own ``denoised_fn``.
        cancellation: alpha_t |a| where D' = alpha_t (a I + b J) comes from a prediction J: its rounding is that of a I.
        continuation: What follows this step, for the maps "decoded", "decoder" and "sampled".

    Raises:
        ValueError: ``alpha_t < 0`` or ``sigma_t <= 0``.
    """

    def __init__(
        self,
        denoised_fn: Callable[[Tensor], Tensor],
        *,
        alpha_t: float,
        sigma_t: float,
        select_fn: Callable[[int], Callable[[Tensor], Tensor]] | None = None,
        cancellation: float = 0.0,
        continuation: Continuation | None = None,
    ) -> None:
        if not alpha_t >= 0 or not sigma_t > 0 or not math.isfinite(alpha_t + sigma_t):
            raise ValueError(f"alpha_t={alpha_t}, sigma_t={sigma_t}. Expected finite alpha_t >= 0 and sigma_t > 0.")
        self.alpha_t, self.sigma_t = float(alpha_t), float(sigma_t)
        self.cancellation, self.continuation = cancellation, continuation
        self._denoised_fn, self._select_fn = denoised_fn, select_fn

    @classmethod
    def from_function(
        cls,
        fn: Callable[[Tensor], Tensor],
        *,
        alpha_t: float,
        sigma_t: float,
        prediction_type: PredictionType = "epsilon",
        continuation: Continuation | None = None,
    ) -> Denoiser:
        """A denoiser from any network at this noise level; needs no diffusers.

        Args:
            fn: x_t (B, *dims) -> prediction (B, *dims).
            alpha_t: Signal scale, >= 0.
            sigma_t: Noise scale, > 0.
            prediction_type: What ``fn`` predicts, in diffusers' words.
            continuation: What decodes or samples on from here.
        """
        a, b = prediction_coefficients(prediction_type, alpha_t, sigma_t)
        levels = {"alpha_t": alpha_t, "sigma_t": sigma_t, "cancellation": alpha_t * abs(a)}
        return cls(lambda x_t: a * x_t + b * fn(x_t), continuation=continuation, **levels)

    @property
    def sigma(self) -> float:
        """Variance-exploding noise sigma_t / alpha_t; infinite at alpha_t = 0."""
        return self.sigma_t / self.alpha_t if self.alpha_t > 0 else math.inf

    def denoised(self, x_t: Tensor) -> Tensor:
        """E[x_0 | x_t], (B, *dims) -> (B, *dims)."""
        return self._denoised_fn(x_t)

    def score(self, x_t: Tensor) -> Tensor:
        """Gradient of log p_t at x_t (with respect to x_t), (B, *dims) -> (B, *dims)."""
        return (self.alpha_t * self.denoised(x_t) - x_t) / self.sigma_t**2

    def epsilon(self, x_t: Tensor) -> Tensor:
        """Expected noise (x_t - alpha_t E[x_0 | x_t]) / sigma_t, (B, *dims) -> (B, *dims)."""
        return (x_t - self.alpha_t * self.denoised(x_t)) / self.sigma_t

    def select(self, index: int) -> Denoiser:
        """The denoiser of one sample of a batch, which takes any number of points (K, *dims)."""
        if self._select_fn is None:
            return self
        continuation = None if self.continuation is None else self.continuation.select(index)
        levels = {"alpha_t": self.alpha_t, "sigma_t": self.sigma_t, "cancellation": self.cancellation}
        return Denoiser(self._select_fn(index), continuation=continuation, **levels)

    def canonical_map(self, of: Map = "denoised") -> Callable[[Tensor], Tensor]:
        """The map of the module docstring's table, (K, *dims) -> (K, *out): its Jacobian in x_t is the canonical one.

        "decoder" is a map of latents instead, see :meth:`map_point`.

        Raises:
            ValueError: an unknown map, or one that needs a continuation where there is none.
        """
        if of in CONTINUED:
            return self._continued(of)
        alpha_t, sigma_t = self.alpha_t, self.sigma_t
        if of == "denoised":
            return lambda x_t: alpha_t * self.denoised(x_t)
        if of == "score":
            return lambda x_t: (alpha_t * self.denoised(x_t) - x_t) * (alpha_t / sigma_t) ** 2
        if of == "epsilon":
            return lambda x_t: (x_t - alpha_t * self.denoised(x_t)) * (alpha_t / sigma_t)
        raise ValueError(f"of={of!r}. Expected one of {MAPS}.")

    def _continued(self, of: Map) -> Callable[[Tensor], Tensor]:
        if self.continuation is None:
            raise ValueError(
                f"of={of!r} needs to know what follows this step, and this denoiser does not. Expected one recorded from a "
                "pipeline, or Denoiser(..., continuation=Continuation(...))."
            )
        if of == "decoder":
            return self.continuation.decoder
        if of == "sampled":
            return lambda x_t: self.sigma_t * self.continuation.sample(x_t)
        return lambda x_t: self.alpha_t * self.continuation.decode(self.denoised(x_t))

    def map_point(self, x_t: Tensor, of: Map) -> Tensor:
        """Where the Jacobian of ``of`` is taken: x_t (*dims) itself, or for "decoder" the latent that D(x_t) becomes."""
        if of not in CONTINUED:
            return x_t
        continued = self._continued(of)
        with torch.no_grad():
            if of == "decoder":
                return self.continuation.decoder_input(self.denoised(x_t[None]))[0]
            continued(x_t[None])  # a pipeline finds out here how it ends, which it cannot while it is differentiated
        return x_t

    def as_denoised(self, columns: Tensor, directions: Tensor, of: Map) -> Tensor:
        """Turns columns J_of V of the canonical Jacobian into D'V, given the directions V; zero at alpha_t = 0."""
        if of == "denoised":
            return columns
        if self.alpha_t == 0:
            return torch.zeros_like(columns)
        return directions + self.sigma**2 * columns if of == "score" else directions - self.sigma * columns

    def error_scale(self, of: Map) -> float:
        """What an error in the canonical Jacobian of ``of`` becomes in D', see :meth:`as_denoised`."""
        if of == "denoised":
            return 1.0
        if self.alpha_t == 0:
            return 0.0
        return self.sigma**2 if of == "score" else self.sigma

    def jacobian(self, x_t: Tensor, of: Map = "denoised", **options: Any) -> Jacobian:
        """The canonical Jacobian at one sample.

        Args:
            x_t: The point, shape (*dims), at least float32.
            of: The map, see the module docstring.
            **options: ``chunk_size``, ``derivative``, ``symmetric``, ``generator`` of :class:`~.jacobian.Jacobian`.
        """
        batched = self.canonical_map(of)
        options = {"scale": self.sigma_t, "cancellation": self._cancellation(of), **options}
        jacobian = Jacobian(lambda x: batched(x[None])[0], self.map_point(x_t, of), batched_fn=batched, **options)
        if of in CONTINUED and jacobian.derivative == "autograd":
            self._check_continued(jacobian, of)
        return jacobian

    def _check_continued(self, jacobian: Jacobian, of: Map) -> None:
        """RuntimeError when a decoder or a sampler hides its derivative; a reverse product and a few evaluations."""
        generator = torch.Generator().manual_seed(0)
        x, value = jacobian.x, jacobian.value
        unit = self.sigma_t if of != "decoder" else float(x.std()) if x.numel() > 1 else 1.0
        shift = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) * (0.1 * unit)
        with torch.no_grad():
            direction = jacobian.fn(x + shift) - jacobian.fn(x - shift)
        direction = direction / direction.norm() if direction.any() else torch.ones_like(value)
        check_derivative(jacobian.fn, x, shift, direction, jacobian.vjp(direction), f"of={of!r}")
        jacobian.products = 0  # the check is not the caller's

    def _cancellation(self, of: Map) -> float:
        """Size of what cancels in the map's Jacobian: D' itself is subtracted from the identity in the others."""
        if of in CONTINUED:
            return 0.0
        inverse = self.alpha_t / self.sigma_t
        return {"denoised": self.cancellation, "score": (1 + self.cancellation) * inverse**2}.get(
            of, (1 + self.cancellation) * inverse
        )
