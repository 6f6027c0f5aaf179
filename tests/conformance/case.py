"""One row of the conformance suite: how to build a tiny pipeline, how to call it, and which schedulers its class admits."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from tiny import quiet, randn


@dataclass(frozen=True)
class Case:
    """A tiny pipeline of one diffusers class.

    Attributes:
        name: The diffusers class, with a suffix where a class has several uses.
        build: A fresh pipeline with the same weights every time: float32, on the CPU, in eval mode, silent.
        arguments: The keyword arguments of a call of that pipeline, without ``generator``.
        schedulers: Further schedulers that the class admits, each made from the pipeline.
        family: "image", "latent", "video", "audio" or "task".
        note: What is special, in one phrase.
    """

    name: str
    build: Callable[[], Any]
    arguments: Callable[[Any], dict[str, Any]]
    schedulers: tuple[Callable[[Any], Any], ...] = ()
    family: str = "latent"
    note: str = ""


def random_weights(module, seed=1, gain=1.0):
    """Every parameter drawn anew, so that no zero-initialised layer hides the network and outputs are of order one.

    Matrices have standard deviation gain / sqrt(fan in), norms are around one, biases around zero. Weights do not depend on how
    the installed release initialises a layer, nor on the global random state.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * gain / max(parameter[0].numel(), 1) ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (0.0 if re.search(r"bias$|token", name) else 1.0))
    return module.eval()


def scheduler_from(name):
    """The scheduler of this class made from a pipeline's own configuration."""
    return lambda pipe: getattr(diffusers, name).from_config(pipe.scheduler.config)


def schedulers(*names):
    return tuple(map(scheduler_from, names))


def pipeline(name, **components):
    """A silent pipeline of the diffusers class ``name``."""
    return quiet(getattr(diffusers, name)(**components))


def image(size=8, channels=3, seed=5):
    """A picture in [0, 1], (1, channels, size, size)."""
    return randn(1, channels, size, size, seed=seed).sigmoid()


def autoencoder(levels=2, latent_channels=4, **config):
    """An AutoencoderKL that halves the picture ``levels - 1`` times."""
    blocks = ["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels
    options = {
        "block_out_channels": [4] * levels,
        "norm_num_groups": 2,
        "latent_channels": latent_channels,
        "shift_factor": 0.0,
        **config,
    }
    return random_weights(diffusers.AutoencoderKL(down_block_types=blocks[0], up_block_types=blocks[1], **options))


def flow_scheduler(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


FLOW = schedulers("FlowMatchHeunDiscreteScheduler")
FLOW_SIGMAS = (
    lambda pipe: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    lambda pipe: diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
)
