"""Noise level of a diffusers scheduler at a loop position, in one convention for every family.

The scheduler's sample is x = alpha x_0 + sigma epsilon, the network sees c_in x, and its output o gives x_0 = a x + b o. Families
differ in where alpha and sigma are kept (i is the position in ``scheduler.timesteps``):

    family                                       alpha, sigma                       c_in
    alphas_cumprod[t]: DDPM, DDIM, PNDM, LCM     sqrt(ac), sqrt(1 - ac)             1
    sigmas[i], VP or flow: DPM-Solver, UniPC     from _sigma_to_alpha_sigma_t       1
    sigmas[i], VE: Euler, Heun, LMS, KDPM2       1, s                               1 / sqrt(1 + s²)
    EDM preconditioning (sigma_data = d)         1, s                               1 / sqrt(d² + s²)
    flow matching                                1 - s, s                           1

Positions, never timesteps: Karras timesteps are fractional, Heun and KDPM2 visit 2N - 1 positions, KDPM2 is between two sigmas at
odd ones. ``clip_sample`` and thresholding act after x_0 = a x + b o and are the sampler's business, not the denoiser's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .denoiser import prediction_coefficients

_FAMILIES = {
    "alphas_cumprod": (
        "DDPMScheduler",
        "DDPMParallelScheduler",
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "PNDMScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
    ),
    "wuerstchen": ("DDPMWuerstchenScheduler",),
    "variance_preserving": (
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
    ),
    "variance_exploding": (
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "KDPM2DiscreteScheduler",
    ),
    "edm": ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"),
    "flow": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"),
}
KNOWN_SCHEDULERS = {name: family for family, names in _FAMILIES.items() for name in names}


@dataclass(frozen=True)
class NoiseLevel:
    """x = alpha_t x_0 + sigma_t epsilon; x_0 = a x + b output; the network sees c_in x."""

    alpha_t: float
    sigma_t: float
    a: float
    b: float
    c_in: float
    timestep: float

    @property
    def sigma(self) -> float:
        """Variance-exploding noise sigma_t / alpha_t, infinite at alpha_t = 0."""
        return self.sigma_t / self.alpha_t if self.alpha_t > 0 else math.inf


def scheduler_family(scheduler: Any) -> str:
    """The family of a scheduler (or of a subclass of a known one).

    Raises:
        ValueError: the scheduler, or a setting of it, is not known; the message says which are and how to swap.
    """
    name = type(scheduler).__name__
    family = next((KNOWN_SCHEDULERS[c.__name__] for c in type(scheduler).__mro__ if c.__name__ in KNOWN_SCHEDULERS), None)
    if family is None:
        raise ValueError(
            f"{name} is not a scheduler whose noise levels are known. Expected one of {sorted(KNOWN_SCHEDULERS)}. Swap it, e.g. "
            "pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config), or wrap the network at one noise "
            "level yourself with Denoiser.from_function."
        )
    return family


def loop_position(scheduler: Any, timestep: Any, expected: int | None) -> int:
    """Position in ``scheduler.timesteps`` of a loop's step.

    Args:
        scheduler: After ``set_timesteps``.
        timestep: The step's.
        expected: The position after the previous step; None at the first, which may be late (image to image): the scheduler's
            ``begin_index`` tells where, or the timestep does. Of a timestep that comes twice in a row (Heun, PNDM) the first is it.

    Raises:
        RuntimeError: the timestep is not in the schedule, or a later step is elsewhere and ambiguous.
    """
    timesteps = torch.as_tensor(scheduler.timesteps).cpu().double()
    wanted = float(torch.as_tensor(timestep).flatten()[0])  # Wuerstchen's pipelines give one a sample
    matches = (timesteps == wanted).nonzero().flatten().tolist()
    likely = expected if expected is not None else getattr(scheduler, "begin_index", None) or 0
    if likely in matches:
        return likely
    adjacent = bool(matches) and matches[-1] - matches[0] == len(matches) - 1
    if len(matches) == 1 or (expected is None and adjacent):
        return matches[0]
    raise RuntimeError(
        f"step {expected or 0} uses timestep {wanted}, found {len(matches)} times in the schedule of {type(scheduler).__name__}. "
        "Expected a loop over scheduler.timesteps."
    )


def unvisited(scheduler: Any) -> int:
    """Timesteps at the end of a schedule from which no step starts: Wuerstchen's last is where the last step leads."""
    return int(scheduler_family(scheduler) == "wuerstchen")


def loop_length(scheduler: Any) -> int:
    """Number of steps of a run over ``scheduler.timesteps``."""
    return len(scheduler.timesteps) - unvisited(scheduler)


def noise_level(scheduler: Any, i: int) -> NoiseLevel:
    """The noise level at loop position ``i``, after ``scheduler.set_timesteps``.

    Raises:
        ValueError: unknown scheduler, position outside the schedule, or epsilon prediction at alpha = 0.
    """
    family, config = scheduler_family(scheduler), scheduler.config
    if not 0 <= i < loop_length(scheduler):
        raise ValueError(f"i={i}. Expected 0 <= i < {loop_length(scheduler)}, the number of loop positions.")
    timestep = float(scheduler.timesteps[i])
    prediction = getattr(config, "prediction_type", None) or "epsilon"
    if family == "alphas_cumprod":
        alpha_cumprod = float(scheduler.alphas_cumprod[int(timestep)].cpu().double())
        return _level(prediction, math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod), 1.0, timestep)
    if family == "wuerstchen":
        alpha_cumprod = float(scheduler._alpha_cumprod(scheduler.timesteps[i : i + 1].cpu(), torch.device("cpu")))
        return _level("epsilon", math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod), 1.0, timestep)
    sigma = float(scheduler.sigmas[i].cpu().double())
    if family == "variance_preserving":
        alpha_t, sigma_t = (float(v) for v in scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i].cpu().double()))
        return _level(prediction, alpha_t, sigma_t, 1.0, timestep)
    if family == "flow":
        if getattr(config, "invert_sigmas", False):  # Mochi: sigmas rise with the signal, the output is x_0 - epsilon
            return NoiseLevel(sigma, 1 - sigma, 1.0, 1 - sigma, 1.0, timestep)
        return _level("flow_prediction", 1 - sigma, sigma, 1.0, timestep)
    if family == "variance_exploding":
        if hasattr(scheduler, "sigmas_interpol") and i % 2 == 1:
            sigma = float(scheduler.sigmas_interpol[i].cpu().double())
        return _level(prediction, 1.0, sigma, 1 / math.sqrt(1 + sigma**2), timestep)
    data = float(config.sigma_data)
    power = sigma**2 + data**2
    sign = {"epsilon": 1.0, "v_prediction": -1.0}.get(prediction)
    if sign is None:
        raise ValueError(f"prediction_type={prediction!r} with EDM preconditioning. Expected 'epsilon' or 'v_prediction'.")
    return NoiseLevel(1.0, sigma, data**2 / power, sign * sigma * data / math.sqrt(power), 1 / math.sqrt(power), timestep)


def _level(prediction: str, alpha_t: float, sigma_t: float, c_in: float, timestep: float) -> NoiseLevel:
    a, b = prediction_coefficients(prediction, alpha_t, sigma_t)
    return NoiseLevel(alpha_t, sigma_t, a, b, c_in, timestep)
