"""A known answer behind a real pipeline: an exact denoiser dressed as the pipeline's network.

``pipe.unet = exact_network(exact, pipe.scheduler, like=pipe.unet)`` makes the pipeline generate from a distribution whose geometry
is known in closed form, through its own loop and scheduler; what the library then measures must be that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .exact import ExactDenoiser, working
from .schedule import NoiseLevel, noise_level

TIMESTEP_TOLERANCE = 1e-4  # of num_train_timesteps; bfloat16 pipelines round t / 1000
CONVERSIONS = (  # how pipelines show their networks the scheduler's timestep
    lambda t, total: t,
    lambda t, total: t * total,
    lambda t, total: total - t,
    lambda t, total: total * (1 - t),
)


class ExactNetwork(nn.Module):
    """A network that answers with an exact denoiser, in the scheduler's prediction type; made by :func:`exact_network`.

    It sees what any network sees, the scaled sample c_in x and the timestep, and must find the noise level from these: timesteps
    are looked up in the schedule of the running generation. Everything else a pipeline asks of its network (``config``, ``dtype``,
    ``cache_context``) is asked of the one it stands in for.
    """

    def __init__(
        self,
        exact: ExactDenoiser,
        scheduler: Any,
        like: nn.Module,
        sign: float,
        output_type: type,
        doubled: bool | None,
        conversion: Callable[[float, float], float] | None,
    ) -> None:
        super().__init__()
        self.exact, self.scheduler, self.sign, self.output_type = exact, scheduler, sign, output_type
        self._doubled, self._conversion = doubled, conversion
        self.__dict__["like"] = like  # not a submodule: its weights are not ours
        self.dummy = nn.Parameter(torch.zeros((), dtype=like.dtype), requires_grad=False)  # pipelines ask the first weight's dtype
        self.config, self.dtype, self.device = like.config, like.dtype, like.device
        self._levels: dict[float, NoiseLevel] = {}
        self._steps: int | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["like"], name)

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """The prediction, with an empty learned variance where the imitated network has one."""
        given = list(_tensors([*args, *kwargs.values()]))
        sample, as_list = next(((s, False) for s in given if self._fits(s)), (None, False))
        if sample is None:  # one tensor a sample, in a list
            items = [s for s in given if s.numel() == self.exact.dim]
            sample, as_list = torch.stack(items), True
        level = self._level(shown_timestep(args, kwargs))
        # In float64 to the end: where b is large, rounding x_0 first would leave little of the prediction.
        x_t = working(sample) / level.c_in
        x_0 = self.exact.denoised(x_t, level.alpha_t, level.sigma_t)
        prediction = (self.sign * (x_0 - level.a * x_t) / level.b).to(sample.dtype)
        doubled = getattr(self.config, "out_channels", None) == 2 * prediction.shape[1] if self._doubled is None else self._doubled
        if doubled:
            prediction = torch.cat([prediction, torch.zeros_like(prediction)], dim=1)
        result = list(prediction.unbind(0)) if as_list else prediction
        return self._answer(result) if return_dict else (result,)

    def _answer(self, result: Any) -> Any:
        if issubclass(self.output_type, tuple):
            return (result,)
        return self.output_type(**{next(iter(self.output_type.__dataclass_fields__)): result})

    def _fits(self, value: Tensor) -> bool:
        return value.ndim > 1 and value.is_floating_point() and value[0].numel() == self.exact.dim

    def _level(self, timestep: float) -> NoiseLevel:
        steps = getattr(self.scheduler, "num_inference_steps", None)
        if timestep not in self._levels or steps != self._steps:
            if steps != self._steps:
                self._levels, self._steps = {}, steps
            self._levels[timestep] = noise_level(self.scheduler, self._position(timestep))
        return self._levels[timestep]

    def _position(self, timestep: float) -> int:
        """The one loop position of a timestep, in whatever form the pipeline shows it."""
        total = getattr(self.scheduler.config, "num_train_timesteps", 1000)
        timesteps = torch.as_tensor(self.scheduler.timesteps).double().cpu()
        for conversion in CONVERSIONS if self._conversion is None else (self._conversion,):
            distance = (timesteps - conversion(timestep, total)).abs()
            if distance.min() <= TIMESTEP_TOLERANCE * total:
                self._conversion = conversion
                break
        else:
            raise ValueError(f"timestep={timestep:g} is not in the schedule. Expected one of scheduler.timesteps.")
        positions = (timesteps == timesteps[distance.argmin()]).nonzero().flatten().tolist()
        levels = [noise_level(self.scheduler, i).sigma_t for i in positions]
        if max(levels) - min(levels) > 1e-6 * max(levels):
            raise ValueError(
                f"{type(self.scheduler).__name__} gives the noise levels sigma_t={levels[0]:.6g} and {levels[-1]:.6g} the same "
                f"timestep {timestep:g}. Expected one level a timestep: from the timestep alone no network can be exact there."
            )
        return positions[0]


def shown_timestep(args: tuple, kwargs: dict[str, Any]) -> float:
    """The timestep among a network's arguments.

    Raises:
        ValueError: there is none where diffusers' networks have theirs.
    """
    named = next((kwargs[name] for name in ("timestep", "timesteps", "t", "timestep_ratio", "r") if name in kwargs), None)
    if named is None:
        named = next((a for a in args[1:] if a is not None), None)
    if named is None:
        raise ValueError(f"no timestep among {list(kwargs)}. Expected timestep=, t= or r=, or the second argument.")
    return float(torch.as_tensor(named).flatten()[0])


def _tensors(values: list[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))


def exact_network(
    exact: ExactDenoiser,
    scheduler: Any,
    like: nn.Module,
    *,
    sign: float = 1.0,
    output_type: type = Transformer2DModelOutput,
    doubled: bool | None = None,
    conversion: Callable[[float, float], float] | None = None,
) -> ExactNetwork:
    """A drop-in network for a pipeline that answers with ``exact``, in the prediction type of ``scheduler``.

    Args:
        exact: The data distribution, of as many dimensions as the pipeline's sample.
        scheduler: The pipeline's own scheduler.
        like: The network it stands in for; its config, dtype and device are taken over.
        sign: -1 for pipelines that negate what their network predicts.
        output_type: What the imitated network returns: an output class whose first field is the prediction, or tuple.
        doubled: Whether the output has twice the sample's channels, a learned variance after the prediction; by default what
            the config of ``like`` says.
        conversion: (timestep shown, number of training timesteps) -> the scheduler's timestep; by default the first of
            ``CONVERSIONS`` that fits the first timestep seen.
    """
    return ExactNetwork(exact, scheduler, like, sign, output_type, doubled, conversion).eval()
