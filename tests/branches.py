"""Two exact distributions as the branches of classifier-free guidance behind a real pipeline."""

import tiny
import torch
from torch import nn

from diffusers_geometry.selfcheck import exact_network


class TwoBranches(nn.Module):
    """One exact network a branch: rows whose embedding is positive are conditional."""

    def __init__(self, conditional, unconditional):
        super().__init__()
        self.conditional, self.unconditional = conditional, unconditional
        self.config, self.dtype, self.device = conditional.config, conditional.dtype, conditional.device

    def forward(self, sample, timestep, encoder_hidden_states, **kwargs):
        is_conditional = (encoder_hidden_states.flatten(1).mean(dim=1) > 0).reshape(-1, 1, 1, 1)
        c, u = (n(sample, timestep, return_dict=False)[0] for n in (self.conditional, self.unconditional))
        return (torch.where(is_conditional, c, u),)


def two_branches(conditional, unconditional, scheduler):
    """A Stable Diffusion pipeline with 256-dimensional exact distributions for its network."""
    pipe = tiny.sd_pipeline(scheduler)
    exact = (exact_network(e, pipe.scheduler, like=pipe.unet, output_type=tuple) for e in (conditional, unconditional))
    pipe.unet = TwoBranches(*exact).eval()
    return pipe


def two_branch_call(batch=1, **options):
    ones = torch.ones(batch, 5, 8)
    return {
        "prompt_embeds": ones, "negative_prompt_embeds": -ones, "height": 16, "width": 16, "num_inference_steps": 6,
        "guidance_scale": 3.0, "output_type": "latent", "generator": [torch.Generator().manual_seed(i) for i in range(batch)],
        **options,
    }  # fmt: skip
