"""The trunks of :class:`~.reward.GeometryReward`: a sample scaled to unit variance and an embedding of its noise -> features.

Residual blocks whose normalised activations are scaled and shifted by the noise (Dhariwal and Nichol, 2021, arXiv:2105.05233), or a
transformer over tokens (Vaswani et al., 2017, arXiv:1706.03762) with one token more, which carries the noise and is read out.

Trunks that start as a copy of the model's own network are in :mod:`.reward_networks`.
"""

from __future__ import annotations

import torch
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
