"""Collapse on the user's examples: of the exact score of the data, and of a model by its errors on examples it has not seen.

See :mod:`.theory.empirical` for the mathematics; here are the examples as samples of a pipeline's scheduler, and its errors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .capture import record
from .clones import noised
from .estimate import Estimate
from .pipeline_call import PipelineCall
from .restart import filled
from .speciation import covariance_eigenvalues, crossing
from .theory import EmpiricalCollapse, held_out_information

HELD_OUT_LEVELS = 40  # the area under the errors is a trapezoid rule over these
_ENCODED_AT_ONCE = 16


def as_samples(pipe: Any, images: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """The user's examples as finished samples of the scheduler, (n, *shape), float32 on the CPU.

    Args:
        pipe: The pipeline; its ``vae`` encodes images, (n, C, H, W) in [-1, 1], into the mode of their latents.
        images: Samples (n, *shape), or images where there is a ``vae``.
        shape: Of one sample.
        name: Of the argument, for errors.

    Raises:
        ValueError: no examples, numbers that are not finite, or a shape that is neither.
    """
    given = torch.as_tensor(np.asarray(images) if not isinstance(images, Tensor) else images).detach().cpu().float()
    if given.ndim < 2 or not len(given) or not given.isfinite().all():
        raise ValueError(f"{name} has shape {tuple(given.shape)}. Expected (n, {_said(shape)}), n >= 1, all finite.")
    if given.shape[1:] == shape:
        return given
    vae = getattr(pipe, "vae", None)
    if vae is None or given.ndim != 4 or given.shape[1] != vae.config.in_channels:
        images_too = "" if vae is None else f", or images (n, {vae.config.in_channels}, H, W) in [-1, 1] for the vae"
        raise ValueError(f"{name} has shape {tuple(given.shape)}. Expected samples (n, {_said(shape)}){images_too}.")
    if given.abs().max() > 1:
        raise ValueError(f"{name} has values up to {given.abs().max():.4g}. Expected images in [-1, 1].")
    with torch.no_grad():
        chunks = [vae.encode(c.to(vae.device, vae.dtype)).latent_dist.mode() for c in given.split(_ENCODED_AT_ONCE)]
    latents = (torch.cat(chunks).cpu().float() - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    if latents.shape[1:] != shape:
        raise ValueError(
            f"{name} becomes latents of shape {tuple(latents.shape)}. Expected (n, {_said(shape)}), the scheduler's samples: pass "
            "these, or images of the size that the pipeline generates."
        )
    return latents


def held_out_errors(
    pipe: Any, args: tuple, kwargs: dict, examples: Tensor, generator: torch.Generator
) -> tuple[np.ndarray, Tensor]:
    """|x_0 - D(x_k)|^2 of examples at levels spread over the run, through the pipeline's guided denoiser.

    Args:
        pipe: The pipeline, whose call is repeated; the caller's generators are not used.
        args: Arguments of its call.
        kwargs: Arguments of its call.
        examples: Finished samples, (n, *dims).
        generator: Draws the noise.

    Returns:
        Finite sigmas ascending, (L,), and errors summed over dimensions, (L, n).
    """
    call = PipelineCall.capture(pipe, type(pipe), args, kwargs)
    with record(pipe, HELD_OUT_LEVELS) as recording, call.global_rng():
        pipe(*call.positional, **call.replayed_arguments())
    sigmas, errors = [], []
    for step in reversed([s for s in recording if s.alpha_t > 0]):
        batch, denoiser = len(step.sample), step.denoiser
        x_0 = examples.to(step.sample)
        x_k, found = noised(x_0, step.level, generator), []
        for chunk in x_k.split(batch):
            with torch.no_grad():
                found.append(denoiser.denoised(filled(chunk, batch))[: len(chunk)])
        sigmas.append(step.sigma)
        errors.append((torch.cat(found).cpu().double() - x_0.cpu().double()).square().flatten(1).sum(1))
    return np.array(sigmas), torch.stack(errors)


def _said(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def data_collapse(samples: Tensor, num_draws: int, generator: torch.Generator) -> dict[str, Estimate | None]:
    """sigma_C of the exact score of examples (n, *dims), by its two criteria; ValueError for copies or fewer than three."""
    exact = EmpiricalCollapse(samples.flatten(1), num_draws=num_draws, generator=generator)
    return {"weight": exact.sigma("weight"), "log_odds": exact.sigma("log_odds")}


def held_out_collapse(measured: tuple[np.ndarray, Tensor], samples: Tensor) -> Estimate | None:
    """Where the information from errors on unseen examples falls to log n; None where it does not within the run's noise."""
    sigmas, errors = measured
    information = held_out_information(sigmas, errors, covariance_eigenvalues(samples.flatten(1)))
    values, sems = (np.array([getattr(i, name) for i in information]) for name in ("value", "sem"))
    low, value, high = (crossing(sigmas, values + shift * sems, math.log(len(samples))) for shift in (-1, 0, 1))
    if value is None:
        return None
    return Estimate(value, sem=None if low is None or high is None else abs(high - low) / 2, bias=None)
