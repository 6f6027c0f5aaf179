"""The trunks of :class:`~.reward.GeometryReward`: a sample scaled to unit variance and an embedding of its noise -> features.

Residual blocks whose normalised activations are scaled and shifted by the noise (Dhariwal and Nichol, 2021, arXiv:2105.05233), or a
transformer over tokens (Vaswani et al., 2017, arXiv:1706.03762) with one token more, which carries the noise and is read out.

psi is a property of the model's own network at x_t, and that network has learnt what is needed to tell it: from its features a few
hundred labels a noise level rank psi better than thousands do from the sample. So a reward can start as a copy of the encoder half
of the model's UNet, at the price of that half's pass in every guided step.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

GROUPS, POOLED = 8, 4


class ConvolutionalTrunk(nn.Module):
    """(B, C, H, W) -> (B, size): residual stages at falling resolution, pooled to a grid that keeps where things are."""

    def __init__(self, channels: int, width: int, num_stages: int, num_blocks: int, embedding: int) -> None:
        super().__init__()
        widths = [width * min(2**stage, 4) for stage in range(num_stages)]
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        layers: list[nn.Module] = []
        for stage, (before, after) in enumerate(zip([width, *widths], widths, strict=False)):
            layers += [_Down(before)] if stage else []
            layers += [_Block(before if not i else after, after, embedding) for i in range(num_blocks)]
        self.layers = nn.ModuleList(layers)
        self.norm, self.size = nn.GroupNorm(GROUPS, widths[-1]), widths[-1] * POOLED**2

    def forward(self, sample: Tensor, embedding: Tensor) -> Tensor:
        """Features of samples (B, C, H, W) with noise embeddings (B, E)."""
        hidden = self.first(sample)
        for layer in self.layers:
            hidden = layer(hidden, embedding)
        return functional.adaptive_avg_pool2d(functional.silu(self.norm(hidden)), POOLED).flatten(1)


class _Down(nn.Conv2d):
    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2, padding=1)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        return super().forward(hidden)


class _Block(nn.Module):
    """hidden + conv(SiLU(modulated norm(conv(SiLU(norm(hidden)))))), scale and shift from the noise."""

    def __init__(self, before: int, after: int, embedding: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.GroupNorm(GROUPS, before), nn.GroupNorm(GROUPS, after)
        self.enter, self.leave = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * after)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(functional.silu(embedding))[..., None, None].chunk(2, dim=1)
        inner = self.enter(functional.silu(self.norm_in(hidden)))
        inner = self.norm_out(inner) * (1 + scale) + shift
        return self.skip(hidden) + self.leave(functional.silu(inner))


class TokenTrunk(nn.Module):
    """(B, L, C) -> (B, size): a transformer over the tokens and one token that carries the noise, which is read out."""

    def __init__(self, channels: int, size: int, num_blocks: int) -> None:
        super().__init__()
        self.first, self.size = nn.Linear(channels, size), size
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(size, 4, 2 * size, **options) for _ in range(num_blocks))

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Features of tokens (B, L, C) with noise embeddings (B, size)."""
        place = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)[:, None]
        rates = torch.logspace(0, -4, self.size // 2, device=tokens.device)
        where = torch.cat([(place * rates).sin(), (place * rates).cos()], dim=1).to(tokens.dtype)
        hidden = torch.cat([embedding[:, None], self.first(tokens) + where], dim=1)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden[:, 0]


class NetworkTrunk(nn.Module):
    """(B, C, H, W) -> (B, size): a copy of the encoder half of an unconditional UNet, pooled to a grid.

    Args:
        config: Of the :class:`diffusers.UNet2DModel`.
        num_timesteps: Entries of the schedule it was trained on.
    """

    def __init__(self, config: dict[str, Any], num_timesteps: int) -> None:
        super().__init__()
        network = UNet2DModel.from_config({k: v for k, v in config.items() if not k.startswith("_")})
        if not can_start_from(network):
            raise ValueError("the network has skip samples or classes. Expected an unconditional UNet2DModel of plain blocks.")
        self.time_proj, self.time_embedding, self.conv_in = network.time_proj, network.time_embedding, network.conv_in
        self.down_blocks, self.mid_block = network.down_blocks, network.mid_block
        width = network.config.block_out_channels[-1]
        self.norm, self.size = nn.GroupNorm(network.config.norm_num_groups, width), width * POOLED**2
        self.register_buffer("log_sigmas", torch.zeros(num_timesteps))

    @torch.no_grad()
    def start_from(self, network: UNet2DModel, scheduler: Any) -> None:
        """Takes over a network's weights, and the noise that its timesteps stand for."""
        own, theirs = self.state_dict(), network.state_dict()
        self.load_state_dict({name: theirs.get(name, value).to(value) for name, value in own.items()})
        alphas = scheduler.alphas_cumprod.double().cpu()
        self.log_sigmas.copy_(((1 - alphas) / alphas).sqrt().log())

    def forward(self, sample: Tensor, log_sigma: Tensor) -> Tensor:
        """Features of samples y / sqrt(1 + sigma²) (B, C, H, W) at noises log sigma (B,)."""
        high = torch.searchsorted(self.log_sigmas, log_sigma.contiguous()).clamp(1, len(self.log_sigmas) - 1)
        low_value, high_value = self.log_sigmas[high - 1], self.log_sigmas[high]
        timestep = high - 1 + ((log_sigma - low_value) / (high_value - low_value)).clamp(0, 1)
        embedding = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        hidden = self.conv_in(sample)
        for block in self.down_blocks:
            hidden, _ = block(hidden_states=hidden, temb=embedding)
        hidden = functional.silu(self.norm(self.mid_block(hidden, embedding)))
        return functional.adaptive_avg_pool2d(hidden, POOLED).flatten(1)


def can_start_from(network: Any) -> bool:
    """Whether a reward can start as a copy of this network's encoder."""
    if not isinstance(network, UNet2DModel) or network.class_embedding is not None or network.config.center_input_sample:
        return False
    return network.mid_block is not None and not any(hasattr(block, "skip_conv") for block in network.down_blocks)
