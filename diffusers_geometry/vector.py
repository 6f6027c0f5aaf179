"""Diffusion of plain vectors: a residual network and the pipeline around it, for distributions whose geometry is known exactly.

Ventura et al. (arXiv:2410.05898) train a residual perceptron on data x_0 = F z of a linear manifold and compare its score Jacobian
with the closed form. :class:`GeometryVectorPipeline` makes such a network a diffusers pipeline, variance-exploding by way of
``EDMEulerScheduler`` (``DDPMPipeline`` is for images and preserves variance): x_t = x_0 + sigma epsilon, and the network F sees
c_in x_t and c_noise = log(sigma) / 4, so that the denoiser is D(x_t) = c_skip x_t + c_out F(c_in x_t, c_noise)
(Karras et al. 2022, arXiv:2206.00364, equation 7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, EDMEulerScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .mixin import GeometryMixin

NOISE_FREQUENCIES = 16  # of the sine and cosine features of c_noise, from 1 to 64 radians a unit


@dataclass
class VectorNetworkOutput(BaseOutput):
    """What :class:`VectorNetwork` predicts.

    Attributes:
        sample: Shape (B, dim).
    """

    sample: Tensor


@dataclass
class VectorPipelineOutput(BaseOutput):
    """What :class:`GeometryVectorPipeline` generates.

    Attributes:
        samples: Shape (B, dim).
    """

    samples: Tensor | np.ndarray


class VectorNetwork(ModelMixin, ConfigMixin):
    """A residual perceptron with SiLU whose blocks and last layer are scaled by the noise level.

    Args:
        dim: Length d of a vector.
        width: Of the residual stream and of every block.
        num_blocks: Residual blocks.
    """

    @register_to_config
    def __init__(self, dim: int = 100, width: int = 128, num_blocks: int = 2) -> None:
        super().__init__()
        if min(dim, width, num_blocks) < 1:
            raise ValueError(f"dim={dim}, width={width}, num_blocks={num_blocks}. Expected positive numbers.")
        self.register_buffer("frequencies", torch.logspace(0, math.log10(64), NOISE_FREQUENCIES), persistent=False)
        self.noise_embedding = nn.Sequential(nn.Linear(2 * NOISE_FREQUENCIES + 1, width), nn.SiLU())
        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(num_blocks))
        self.gain = nn.Linear(width, width)
        self.last = nn.Linear(width, dim)

    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> VectorNetworkOutput | tuple[Tensor]:
        """The prediction for scaled vectors.

        Args:
            sample: c_in x_t, shape (B, dim).
            timestep: c_noise = log(sigma) / 4, a number or shape (B,).
            return_dict: An object with ``.sample``, or a tuple.
        """
        noise = torch.as_tensor(timestep, dtype=sample.dtype, device=sample.device).reshape(-1, 1)
        angles = noise * self.frequencies.to(sample)
        embedding = self.noise_embedding(torch.cat([noise, angles.sin(), angles.cos()], dim=1))
        hidden = self.first(sample)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        prediction = self.last(hidden * (1 + self.gain(embedding)))
        return VectorNetworkOutput(sample=prediction) if return_dict else (prediction,)


class _Block(nn.Module):
    """hidden + W_2 SiLU(scale * W_1 hidden + shift), scale and shift from the noise level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave, self.modulation = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        return hidden + self.leave(nn.functional.silu(self.enter(hidden) * (1 + scale) + shift))


class GeometryVectorPipeline(GeometryMixin, DiffusionPipeline):
    """Generates vectors, with geometry, see :class:`~diffusers_geometry.mixin.GeometryMixin`.

    Args:
        network: Predicts F of the module docstring.
        scheduler: Its ``sigma_data`` is the root mean square of a coordinate of the data.
    """

    model_cpu_offload_seq = "network"

    def __init__(self, network: VectorNetwork, scheduler: EDMEulerScheduler) -> None:
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 100,
        output_type: Literal["np", "pt"] = "np",
        return_dict: bool = True,
    ) -> VectorPipelineOutput | tuple[Any]:
        """Vectors from noise.

        Args:
            batch_size: How many.
            generator: Makes the noise, as in every diffusers pipeline.
            num_inference_steps: Denoising steps.
            output_type: "np" or "pt".
            return_dict: An object with ``.samples``, or a tuple.

        Raises:
            ValueError: unknown ``output_type``.
        """
        if output_type not in ("np", "pt"):
            raise ValueError(f"output_type={output_type!r}. Expected 'np' or 'pt'.")
        shape, device = (batch_size, self.network.config.dim), self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=self.network.dtype)
        x_t = noise * self.scheduler.init_noise_sigma
        for timestep in self.progress_bar(self.scheduler.timesteps):
            prediction = self.network(self.scheduler.scale_model_input(x_t, timestep), timestep).sample
            x_t = self.scheduler.step(prediction, timestep, x_t).prev_sample
        samples = x_t if output_type == "pt" else x_t.float().cpu().numpy()
        self.maybe_free_model_hooks()
        return VectorPipelineOutput(samples=samples) if return_dict else (samples,)
