"""An exact denoiser behind the loop that every pipeline has, with any scheduler."""

import diffusers
import torch
from tiny import SCALED_LINEAR, quiet

from diffusers_geometry.selfcheck import exact_network

FIXED = {**SCALED_LINEAR, "clip_sample": False, "set_alpha_to_one": True}  # DDIM that ends at x_0 itself


class Loop(diffusers.DiffusionPipeline):
    """The loop that every pipeline has, without what differs: any scheduler, a network of samples and timesteps."""

    def __init__(self, network, scheduler):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, noise, steps=8, generator=None):
        self.scheduler.set_timesteps(steps)
        scale = getattr(self.scheduler, "init_noise_sigma", 1.0)
        x_t = noise * scale
        for t in self.scheduler.timesteps:
            seen = self.scheduler.scale_model_input(x_t, t) if hasattr(self.scheduler, "scale_model_input") else x_t
            options = {"generator": generator} if "Ancestral" in type(self.scheduler).__name__ else {}
            x_t = self.scheduler.step(self.network(seen, t).sample, t, x_t, **options).prev_sample
        return x_t


class Answer(torch.nn.Module):
    """What an exact network is made in place of: a config, a dtype and a device."""

    config = None
    dtype, device = torch.float32, torch.device("cpu")


def loop(exact, scheduler):
    pipe = Loop.__new__(Loop)
    diffusers.DiffusionPipeline.__init__(pipe)
    pipe.register_modules(network=exact_network(exact, scheduler, like=Answer()), scheduler=scheduler)
    return quiet(pipe)
