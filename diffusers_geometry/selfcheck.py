"""A known answer behind a real pipeline: an exact denoiser dressed as the pipeline's network.

``pipe.unet = exact_network(exact, pipe.scheduler, like=pipe.unet)`` makes the pipeline generate from a distribution whose geometry
is known in closed form, through its own loop and scheduler; what the library then measures must be that.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .exact import ExactDenoiser, working
from .schedule import NoiseLevel, noise_level


class ExactNetwork(nn.Module):
    """A network that answers with an exact denoiser, in the scheduler's prediction type; made by :func:`exact_network`.

    It sees what any network sees, the scaled sample c_in x and the timestep, and must find the noise level from these: timesteps
    are looked up in the schedule of the running generation.
    """

    def __init__(self, exact: ExactDenoiser, scheduler: Any, like: nn.Module) -> None:
        super().__init__()
        self.exact, self.scheduler, self.config = exact, scheduler, like.config
        self.dtype, self.device = like.dtype, like.device
        self._levels: dict[float, NoiseLevel] = {}
        self._steps: int | None = None

    def forward(self, sample: Tensor, timestep: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """The prediction for ``sample`` (B, *dims), with an empty learned variance where the imitated network has one."""
        level = self._level(torch.as_tensor(timestep).flatten())
        # In float64 to the end: where b is large, rounding x_0 first would leave little of the prediction.
        x_t = working(sample) / level.c_in
        x_0 = self.exact.denoised(x_t, level.alpha_t, level.sigma_t)
        prediction = ((x_0 - level.a * x_t) / level.b).to(sample.dtype)
        if getattr(self.config, "out_channels", None) == 2 * sample.shape[1]:
            prediction = torch.cat([prediction, torch.zeros_like(prediction)], dim=1)
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)

    def _level(self, timesteps: Tensor) -> NoiseLevel:
        timestep = float(timesteps[0])
        steps = getattr(self.scheduler, "num_inference_steps", None)
        if timestep not in self._levels or steps != self._steps:
            self._levels, self._steps = {}, steps
            for i, t in enumerate(self.scheduler.timesteps):
                level = noise_level(self.scheduler, i)
                known = self._levels.setdefault(float(t), level)
                if abs(known.sigma_t - level.sigma_t) > 1e-6 * level.sigma_t:
                    raise ValueError(
                        f"{type(self.scheduler).__name__} gives the noise levels sigma_t={known.sigma_t:.6g} and "
                        f"{level.sigma_t:.6g} the same timestep {float(t):g}. Expected one level a timestep: a network that sees "
                        "only the timestep cannot be exact there."
                    )
        if timestep not in self._levels:
            raise ValueError(f"timestep={timestep:g} is not in the schedule. Expected one of scheduler.timesteps.")
        return self._levels[timestep]


def exact_network(exact: ExactDenoiser, scheduler: Any, like: nn.Module) -> ExactNetwork:
    """A drop-in network for a pipeline that answers with ``exact``, in the prediction type of ``scheduler``.

    Args:
        exact: The data distribution, of as many dimensions as the pipeline's sample.
        scheduler: The pipeline's own scheduler.
        like: The network it stands in for; its config, dtype and device are taken over.
    """
    return ExactNetwork(exact, scheduler, like).eval()
