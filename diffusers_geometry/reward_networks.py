"""Trunks of :class:`~.reward.GeometryReward` that start as a copy of a part of the model's own network.

psi is a property of that network at x_t, and it has learnt what is needed to tell it: from its features a few hundred labels rank
psi better than thousands do from the sample. The price is its pass in every guided step.

    UNet2DModel             encoder and middle block, trained on; what they find is pooled to a grid
    UNet2DConditionModel    the same and the first layer of the decoder, given the empty prompt, frozen; channel statistics
    DiTTransformer2DModel   patches and five eighths of the blocks, given the class that stands for none, frozen; channel statistics

Statistics are the mean and the standard deviation of every channel over its places, standardised by those of the training samples:
a sixteenth of the numbers that a grid has. With 240 labels of the zoo's sd-mnist, what follows the middle ranks best, and trunks
that are trained on forget more than they learn; examples/reproduce/guidance_latents.py shows how well they rank.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

from .reward_trunks import POOLED

_TINY = 1e-5  # variance below which a channel is constant


class NetworkTrunk(nn.Module):
    """(B, C, H, W) -> (B, size): a part of a network.

    Args:
        network: Whose modules are used.
        num_timesteps: Entries of the schedule it was trained on.
    """

    size: int
    frozen = False

    def __init__(self, network: nn.Module, num_timesteps: int) -> None:
        super().__init__()
        self.register_buffer("log_sigmas", torch.zeros(num_timesteps))

    @torch.no_grad()
    def start_from(self, pipe: Any) -> None:
        """Takes over the weights of a pipeline's network, and the noise that its timesteps stand for."""
        own, theirs = self.state_dict(), copied_network(pipe).state_dict()
        self.load_state_dict({name: theirs.get(name, value).to(value) for name, value in own.items()})
        alphas = pipe.scheduler.alphas_cumprod.double().cpu()
        self.log_sigmas.copy_(((1 - alphas) / alphas).sqrt().log())

    def standardise(self, sample: Tensor, log_sigma: Tensor) -> None:
        """Takes the statistics of the features from training samples, as :meth:`forward` is given them."""

    def timestep(self, log_sigma: Tensor) -> Tensor:
        """The timestep, between two of the schedule where need be, of noises log sigma (B,)."""
        high = torch.searchsorted(self.log_sigmas, log_sigma.contiguous()).clamp(1, len(self.log_sigmas) - 1)
        low_value, high_value = self.log_sigmas[high - 1], self.log_sigmas[high]
        return high - 1 + ((log_sigma - low_value) / (high_value - low_value)).clamp(0, 1)


class EncoderTrunk(NetworkTrunk):
    """The encoder half of an unconditional UNet."""

    def __init__(self, network: UNet2DModel, num_timesteps: int) -> None:
        super().__init__(network, num_timesteps)
        self.time_proj, self.time_embedding, self.conv_in = network.time_proj, network.time_embedding, network.conv_in
        self.down_blocks, self.mid_block = network.down_blocks, network.mid_block
        width = network.config.block_out_channels[-1]
        self.norm, self.size = nn.GroupNorm(network.config.norm_num_groups, width), width * POOLED**2

    def forward(self, sample: Tensor, log_sigma: Tensor) -> Tensor:
        """Features of samples y / sqrt(1 + sigma²) (B, C, H, W) at noises log sigma (B,)."""
        embedding = self.time_embedding(self.time_proj(self.timestep(log_sigma)).to(sample.dtype))
        hidden = self.conv_in(sample)
        for block in self.down_blocks:
            hidden, _ = block(hidden_states=hidden, temb=embedding)
        hidden = functional.silu(self.norm(self.mid_block(hidden, embedding)))
        return functional.adaptive_avg_pool2d(hidden, POOLED).flatten(1)


class StatisticsTrunk(NetworkTrunk):
    """Frozen, and read out as standardised channel statistics."""

    frozen = True

    def __init__(self, network: nn.Module, num_timesteps: int, channels: int) -> None:
        super().__init__(network, num_timesteps)
        self.size = 2 * channels
        self.register_buffer("feature_mean", torch.zeros(self.size))
        self.register_buffer("feature_std", torch.ones(self.size))

    def hidden(self, sample: Tensor, log_sigma: Tensor) -> Tensor:
        """What the network finds, (B, channels, places)."""
        raise NotImplementedError

    @torch.no_grad()
    def standardise(self, sample: Tensor, log_sigma: Tensor) -> None:
        """As :meth:`NetworkTrunk.standardise`."""
        found = torch.cat([_statistics(self.hidden(*part)) for part in zip(sample.split(64), log_sigma.split(64), strict=True)])
        self.feature_mean.copy_(found.mean(dim=0))
        self.feature_std.copy_(found.std(dim=0) + _TINY)

    def forward(self, sample: Tensor, log_sigma: Tensor) -> Tensor:
        """Features of samples y / sqrt(1 + sigma²) (B, C, H, W) at noises log sigma (B,)."""
        return (_statistics(self.hidden(sample, log_sigma)) - self.feature_mean) / self.feature_std


class TextUNetTrunk(StatisticsTrunk):
    """A text-conditional UNet up to the first layer of its decoder, given what its pipeline makes of the empty prompt."""

    def __init__(self, network: UNet2DConditionModel, num_timesteps: int, num_tokens: int) -> None:
        decoder = network.up_blocks[0]
        super().__init__(network, num_timesteps, decoder.resnets[0].out_channels)
        self.time_proj, self.time_embedding, self.conv_in = network.time_proj, network.time_embedding, network.conv_in
        self.down_blocks, self.mid_block, self.resnet = network.down_blocks, network.mid_block, decoder.resnets[0]
        self.attention = decoder.attentions[0] if getattr(decoder, "has_cross_attention", False) else None
        self.register_buffer("conditioning", torch.zeros(1, num_tokens, network.config.cross_attention_dim))

    @torch.no_grad()
    def start_from(self, pipe: Any) -> None:
        """Takes over weights, noises and the embedding of the empty prompt."""
        super().start_from(pipe)
        decoder = pipe.unet.up_blocks[0]
        self.resnet.load_state_dict(decoder.resnets[0].state_dict())
        if self.attention is not None:
            self.attention.load_state_dict(decoder.attentions[0].state_dict())
        self.conditioning.copy_(empty_prompt(pipe))

    def hidden(self, sample: Tensor, log_sigma: Tensor) -> Tensor:
        """As :meth:`StatisticsTrunk.hidden`."""
        embedding = self.time_embedding(self.time_proj(self.timestep(log_sigma)).to(sample.dtype))
        conditioning = {"encoder_hidden_states": self.conditioning.expand(len(sample), -1, -1)}
        hidden = self.conv_in(sample)
        skipped = hidden
        for block in self.down_blocks:
            own = conditioning if getattr(block, "has_cross_attention", False) else {}
            hidden, found = block(hidden_states=hidden, temb=embedding, **own)
            skipped = found[-1]
        hidden = self.mid_block(hidden, embedding, **conditioning)
        hidden = self.resnet(torch.cat([hidden, skipped], dim=1), embedding)
        if self.attention is not None:
            hidden = self.attention(hidden, **conditioning, return_dict=False)[0]
        return hidden.flatten(2)


class TransformerTrunk(StatisticsTrunk):
    """The first blocks of a class-conditional transformer, given the class that stands for none."""

    def __init__(self, network: DiTTransformer2DModel, num_timesteps: int) -> None:
        super().__init__(network, num_timesteps, network.inner_dim)
        self.pos_embed, count = network.pos_embed, len(network.transformer_blocks)
        self.transformer_blocks, self.nothing = network.transformer_blocks[: -(-5 * count // 8)], network.config.num_embeds_ada_norm

    def hidden(self, sample: Tensor, log_sigma: Tensor) -> Tensor:
        """As :meth:`StatisticsTrunk.hidden`."""
        nothing = torch.full((len(sample),), self.nothing, device=sample.device)
        hidden, timestep = self.pos_embed(sample), self.timestep(log_sigma)
        for block in self.transformer_blocks:
            hidden = block(hidden, timestep=timestep, class_labels=nothing)
        return hidden.transpose(1, 2)


def copied_network(pipe: Any) -> nn.Module | None:
    """The network of a pipeline that a reward can start as a copy of; None where there is none.

    Its schedule must be one of alphas_cumprod, whose timesteps stand for a noise.
    """
    if not hasattr(getattr(pipe, "scheduler", None), "alphas_cumprod"):
        return None
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    kinds = {UNet2DModel: _is_plain_unet, UNet2DConditionModel: _is_plain_text_unet, DiTTransformer2DModel: lambda *_: True}
    fits = kinds.get(type(network))
    return network if fits is not None and fits(network, pipe) else None


def network_config(pipe: Any) -> dict[str, Any]:
    """What :func:`network_trunk` builds the trunk of this pipeline from."""
    network = copied_network(pipe)
    own = {k: v for k, v in network.config.items() if not k.startswith("_")} | {"_class_name": type(network).__name__}
    return own | ({"_num_tokens": empty_prompt(pipe).shape[1]} if isinstance(network, UNet2DConditionModel) else {})


def network_trunk(config: dict[str, Any], num_timesteps: int) -> NetworkTrunk:
    """The trunk of a network's config, with random weights.

    Raises:
        ValueError: a network that has no trunk here.
    """
    name = config.get("_class_name", "UNet2DModel")
    if name not in ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"):
        raise ValueError(f"network is a {name}. Expected a UNet2DModel, a UNet2DConditionModel or a DiTTransformer2DModel.")
    network = getattr(diffusers, name).from_config({k: v for k, v in config.items() if not k.startswith("_")})
    if name == "UNet2DModel" and not _is_plain_unet(network):
        raise ValueError("the network has skip samples or classes. Expected an unconditional UNet2DModel of plain blocks.")
    if name == "UNet2DConditionModel":
        return TextUNetTrunk(network, num_timesteps, config["_num_tokens"])
    return {"UNet2DModel": EncoderTrunk, "DiTTransformer2DModel": TransformerTrunk}[name](network, num_timesteps)


@torch.no_grad()
def empty_prompt(pipe: Any) -> Tensor:
    """What a text-conditional UNet is given for the empty prompt, (1, L, C)."""
    return pipe.encode_prompt("", pipe.text_encoder.device, 1, False)[0].float().cpu()


def _is_plain_unet(network: UNet2DModel, pipe: Any = None) -> bool:
    if network.class_embedding is not None or network.config.center_input_sample:
        return False
    return network.mid_block is not None and not any(hasattr(block, "skip_conv") for block in network.down_blocks)


def _is_plain_text_unet(network: UNet2DConditionModel, pipe: Any) -> bool:
    """Whether one text encoder and the timestep are all that conditions it, and its input is the sample."""
    config, components = network.config, getattr(pipe, "components", {})
    others = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "num_class_embeds")
    if any(config.get(name) is not None for name in others) or not isinstance(config.cross_attention_dim, int):
        return False
    plain = network.mid_block is not None and config.in_channels == config.out_channels and not config.center_input_sample
    return plain and components.get("text_encoder") is not None and "text_encoder_2" not in components


def _statistics(hidden: Tensor) -> Tensor:
    """Mean and standard deviation of every channel, (B, C, N) -> (B, 2 C)."""
    return torch.cat([hidden.mean(dim=2), (hidden.var(dim=2, correction=0) + _TINY).sqrt()], dim=1)
