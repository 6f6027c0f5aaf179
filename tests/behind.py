"""Exact distributions behind tiny real pipelines, by scheduler."""

import diffusers
import torch
from tiny import SCALED_LINEAR, ddpm_pipeline, pixel_call, sd_call, sd_pipeline

from diffusers_geometry.selfcheck import exact_network

NO_CLIP = {"clip_sample": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixel(name, size=4, **config):
    """A pixel pipeline whose samples have size x size numbers."""
    return lambda **call: (
        ddpm_pipeline(getattr(diffusers, name)(**config), size=size),
        pixel_call(generator=seeded(), **call),
    )


def latent(name, **config):
    """A Stable Diffusion pipeline whose latents have 64 numbers."""

    def make(batch_size=1, **call):
        pipe = sd_pipeline(getattr(diffusers, name)(**SCALED_LINEAR, **config))
        return pipe, sd_call(batch_size, height=8, width=8, guidance_scale=1.0, generator=seeded(), **call)

    return make


def behind(make, exact, **call):
    """The pipeline with an exact distribution behind it, and its call."""
    pipe, arguments = make(**call)
    pipe.unet = exact_network(exact, pipe.scheduler, like=pipe.unet)
    return pipe, arguments
