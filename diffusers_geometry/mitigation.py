"""Guidance that lowers a memorisation score, for flagged samples alone.

    recited = MemorizationObjective(flagged=[True, False, False])
    with guided(pipe, GeometryGuidance(recited, scale=-4.0, start=0.0, stop=1.0)):
        pipe(["the velvet violin", "a thick seven", "a thin one"])

Where a prompt recites, the two branches of classifier-free guidance disagree by much, V = |e_c - e_u| (Wen et al. 2024,
arXiv:2407.21720; Jeon et al. 2025, arXiv:2412.04140, lower it over the initial noise). Here its gradient with respect to y = x_t /
alpha_t, taken through both branches, shifts the clean estimate at every guided step. A sample that is not flagged has the gradient
zero, and its output keeps every bit.

    follow="score"      that gradient
    follow="estimates"  D_c - D_u itself, the change of x_0 that the condition makes, which takes no evaluation of the network.
                        With ``normalize=False, trust_radius=math.inf`` a guidance of scale -c lowers the guidance_scale of these
                        samples by c, also below 1, where a pipeline's own cannot go
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .objectives import Evaluation, GuidedStep, append_dims
from .schedule import NoiseLevel

Follow = Literal["score", "estimates"]


class MemorizationObjective:
    """|e_c - e_u| of flagged samples, to be lowered by a negative scale.

    Args:
        flagged: Per sample of the pipeline's batch (prompts times images a prompt) whether it is to be touched; all if None.
        threshold: Only where V exceeds this at the step, a number or a function of sigma; none by default.
        follow: The direction, see the module docstring.
        spread: A standard deviation of V.

    Raises:
        ValueError: an unknown ``follow``, or a spread that is not positive.
    """

    needs_network = True

    def __init__(
        self,
        flagged: Sequence[bool] | None = None,
        threshold: float | Callable[[float], float] | None = None,
        follow: Follow = "score",
        spread: float = 1.0,
    ) -> None:
        if follow not in get_args(Follow) or not (spread > 0 and math.isfinite(spread)):
            raise ValueError(f"follow={follow!r}, spread={spread}. Expected one of {get_args(Follow)} and a positive spread.")
        self.flagged = None if flagged is None else torch.tensor([bool(f) for f in flagged])
        self.threshold, self.follow, self.spread = threshold, follow, float(spread)

    def covers(self, level: NoiseLevel) -> bool:
        """Whether V can differ from 0; at pure noise both branches predict the same noise."""
        return level.alpha_t > 0 or self.follow == "estimates"

    def evaluate(self, step: GuidedStep) -> Evaluation:
        """V and its direction; zero for samples that are not to be touched.

        Raises:
            ValueError: ``flagged`` is of another batch, or the step has no two branches.
        """
        chosen = self._chosen(step)
        value, gradient = torch.zeros(len(step.x_t)).to(step.x_t), torch.zeros_like(step.x_t)
        if not chosen.any():
            return Evaluation(value, gradient, self.spread)
        if self.follow == "estimates":
            difference = step.branch_denoised("conditional") - step.branch_denoised("unconditional")
        else:
            x_t = step.x_t.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                difference = step.branch("conditional").denoised(x_t) - step.branch("unconditional").denoised(x_t)
        lengths = difference.flatten(1).norm(dim=1)
        value = lengths.detach() * (step.level.alpha_t / step.level.sigma_t)
        if self.threshold is not None:
            limit = self.threshold(step.level.sigma) if callable(self.threshold) else self.threshold
            chosen = chosen & (value > limit)
        if self.follow == "estimates":  # over tau², by which a tilt is multiplied
            gradient = (
                difference if math.isinf(step.level.sigma) else difference * ((1 + step.level.sigma**2) / step.level.sigma**2)
            )
        elif chosen.any():  # V = |D_c - D_u| / sigma, and d/dy = alpha_t d/dx_t
            gradient = torch.autograd.grad(lengths.sum(), x_t)[0] * (step.level.alpha_t**2 / step.level.sigma_t)
        return Evaluation(value, torch.where(append_dims(chosen, gradient), gradient, 0.0), self.spread)

    def _chosen(self, step: GuidedStep) -> Tensor:
        if self.flagged is None:
            return torch.ones(len(step.x_t), dtype=torch.bool, device=step.x_t.device)
        if len(self.flagged) != len(step.x_t):
            raise ValueError(
                f"flagged has {len(self.flagged)} entries. Expected {len(step.x_t)}, one per sample of the batch: prompts times "
                "images a prompt."
            )
        return self.flagged.to(step.x_t.device)
