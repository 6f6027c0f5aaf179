"""What guidance raises or lowers: a reward, the exact psi, any function of the clean estimate, or a weighted sum of several.

An objective gives, per sample, a value V, its gradient g with respect to y = x_t / alpha_t, and the spread that one standard
deviation of V has at this noise. The clean estimate x_0 depends on y too; the gradient of a function of x_0 is passed on as if
dx_0/dy were the identity, which spares a pass back through the network: D' is close to it along the directions the model keeps.

The exact gradient of psi at rank R, Σ log s_i over the R largest singular values of D' = U S Vᵀ, is that of
x -> Σ <u_i, D'(x) v_i> / s_i with u, v, s held fixed, since singular vectors turn to first order without changing their value
(s_R > s_{R+1} is needed). It takes the R leading triplets, R reverse products and their derivative: for small models, and for
checking a reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .denoiser import Denoiser
from .difference import require_finite
from .forward_mode import forward_mode
from .golub_kahan import golub_kahan_spectrum
from .reward import GeometryReward
from .schedule import NoiseLevel


@dataclass(frozen=True)
class GuidedStep:
    """A step as an objective sees it.

    Attributes:
        x_t: The scheduler's sample, (B, *dims), at least float32.
        denoised: The model's clean estimate there, (B, *dims).
        level: The noise level.
        denoiser: Maps a sample's index to its denoiser; only for objectives with ``needs_network``.
        branch: Maps "conditional" or "unconditional" to that branch's denoiser of the whole batch; only for these too.
        branch_denoised: Maps these names to that branch's clean estimate at x_t, (B, *dims), which the step has computed already.
    """

    x_t: Tensor
    denoised: Tensor
    level: NoiseLevel
    denoiser: Callable[[int], Denoiser] | None = None
    branch: Callable[[str], Denoiser] | None = None
    branch_denoised: Callable[[str], Tensor] | None = None


@dataclass(frozen=True)
class Evaluation:
    """Value (B,), gradient with respect to y (B, *dims), and spread, a number or (B,), of an objective at one step."""

    value: Tensor
    gradient: Tensor
    spread: Tensor | float = 1.0


class Objective(Protocol):
    """What :class:`~.guidance.GeometryGuidance` accepts."""

    needs_network: bool

    def covers(self, level: NoiseLevel) -> bool:
        """Whether the objective has a meaning at this noise."""

    def evaluate(self, step: GuidedStep) -> Evaluation:
        """Value and gradient; samples must not influence one another."""


class RewardObjective:
    """The expected label of a reward, or the log probability of one of its bins.

    Args:
        reward: Trained; its device is the pipeline's.
        target_bin: A bin of the labels at each noise, 0 the lowest.
    """

    needs_network = False

    def __init__(self, reward: GeometryReward, target_bin: int | None = None) -> None:
        if target_bin is not None and (reward.config.head != "bins" or not 0 <= target_bin < reward.config.num_bins):
            bins = reward.config.num_bins
            raise ValueError(
                f"target_bin={target_bin}, head={reward.config.head!r} with {bins} bins. Expected head='bins' and 0 to {bins - 1}."
            )
        self.reward, self.target_bin = reward.eval(), target_bin

    def covers(self, level: NoiseLevel) -> bool:
        """Whether the noise is one the reward was trained on."""
        return 0 < level.sigma < float("inf") and self.reward.covers(level.sigma)

    def evaluate(self, step: GuidedStep) -> Evaluation:
        """Prediction and its gradient; the spread is that of the training labels at this noise, 1 for a log probability."""
        level, x_t = step.level, step.x_t.detach().clone().requires_grad_(True)
        if self.target_bin is None:
            value = self.reward.predict(x_t, level.sigma, level.alpha_t)
            spread: Tensor | float = float(self.reward.spread(level.sigma))
        else:
            value, spread = self.reward.bin_log_probability(x_t, level.sigma, self.target_bin, level.alpha_t), 1.0
        gradient = torch.autograd.grad(value.sum(), x_t)[0]  # the sum is for autograd only, rows are independent
        return Evaluation(value.detach(), level.alpha_t * gradient, spread)


class FunctionObjective:
    """Any differentiable function of the clean estimate, such as a CLIP scorer of the decoded x_0.

    Args:
        function: (x_0 (B, *dims), x_t (B, *dims), sigma) -> (B,); rows must not influence one another.
        spread: A standard deviation of its values.
    """

    needs_network = False

    def __init__(self, function: Callable[[Tensor, Tensor, float], Tensor], spread: float = 1.0) -> None:
        self.function, self.spread = function, float(spread)

    def covers(self, level: NoiseLevel) -> bool:
        """True: a function is asked everywhere."""
        return True

    def evaluate(self, step: GuidedStep) -> Evaluation:
        """Value and gradient, see the module docstring for x_0."""
        x_0, x_t = (v.detach().clone().requires_grad_(True) for v in (step.denoised, step.x_t))
        value = self.function(x_0, x_t, step.level.sigma)
        if not isinstance(value, Tensor) or value.shape != (len(x_t),) or not value.requires_grad:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the objective returned {found}. Expected a differentiable tensor of shape ({len(x_t)},), one per sample."
            )
        by_x_0, by_x_t = torch.autograd.grad(value.sum(), (x_0, x_t), allow_unused=True)
        gradient = torch.zeros_like(step.x_t)
        gradient = gradient if by_x_0 is None else gradient + by_x_0
        gradient = gradient if by_x_t is None else gradient + step.level.alpha_t * by_x_t
        return Evaluation(value.detach(), gradient, self.spread)


class PsiObjective:
    """psi of the model itself at a fixed rank, with its exact gradient; the network must replay linearly (no guidance_rescale).

    Args:
        rank: Singular values that psi sums.
        method: "dense", or "golub_kahan" for the largest ones by products.
        spread: A standard deviation of psi, in nats.
    """

    needs_network = True

    def __init__(self, rank: int, method: Literal["dense", "golub_kahan"] = "dense", spread: float = 1.0) -> None:
        if rank < 1 or method not in ("dense", "golub_kahan"):
            raise ValueError(f"rank={rank}, method={method!r}. Expected a positive rank and 'dense' or 'golub_kahan'.")
        self.rank, self.method, self.spread = rank, method, float(spread)

    def covers(self, level: NoiseLevel) -> bool:
        """Whether D' is not zero."""
        return level.alpha_t > 0

    def evaluate(self, step: GuidedStep) -> Evaluation:
        """One sample after another."""
        found = [self._sample(step.denoiser(i), x_t) for i, x_t in enumerate(step.x_t)]
        return Evaluation(torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found]), self.spread)

    def _sample(self, denoiser: Denoiser, x_t: Tensor) -> tuple[Tensor, Tensor]:
        left, values, right = self._factors(denoiser, x_t)
        fn = denoiser.canonical_map("denoised")
        with forward_mode(twice_reversed=True), torch.enable_grad():
            points = x_t.detach().expand(self.rank, *x_t.shape).clone().requires_grad_(True)
            cotangents = (left / values).T.reshape(self.rank, *x_t.shape).to(points)
            pulled = torch.autograd.grad(fn(points), points, cotangents, create_graph=True)[0]
            total = (pulled.flatten(1) * right.T.to(points)).sum()
            gradient = torch.autograd.grad(total, points)[0].sum(dim=0)
        return values.log().sum().to(x_t), denoiser.alpha_t * gradient

    def _factors(self, denoiser: Denoiser, x_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The R leading singular triplets: (d, R), (R,), (d, R)."""
        jacobian = denoiser.jacobian(x_t)
        if self.rank > x_t.numel():
            raise ValueError(f"rank={self.rank}. Expected at most {x_t.numel()}, the numbers of one sample.")
        if self.method == "golub_kahan":
            spectrum = golub_kahan_spectrum(jacobian, self.rank, vectors=True)
            left, values, right = spectrum.left, spectrum.singular_values, spectrum.right
        else:
            left, values, right = torch.linalg.svd(jacobian.dense().double())
            left, values, right = left[:, : self.rank], values[: self.rank], right[: self.rank].T
        if not values[-1] > jacobian.rounding(values[0].item()) or left.shape[1] < self.rank:
            raise ValueError(f"rank={self.rank}, but s_{self.rank}={values[-1]:.2e} is rounding. Expected a smaller rank.")
        return left, values, right


class WeightedObjective:
    """Σ weight V / spread: several objectives, each in units of its own standard deviation.

    Args:
        parts: (objective, weight) pairs.
    """

    def __init__(self, parts: Sequence[tuple[Any, float]]) -> None:
        if not parts:
            raise ValueError("no objectives. Expected at least one (objective, weight) pair.")
        self.parts = [(as_objective(part), float(weight)) for part, weight in parts]
        self.needs_network = any(part.needs_network for part, _ in self.parts)

    def covers(self, level: NoiseLevel) -> bool:
        """Whether all parts do."""
        return all(part.covers(level) for part, _ in self.parts)

    def evaluate(self, step: GuidedStep) -> Evaluation:
        """The sum; its spread is 1."""
        value, gradient = torch.zeros(len(step.x_t)).to(step.x_t), torch.zeros_like(step.x_t)
        for part, weight in self.parts:
            found = part.evaluate(step)
            spread = torch.as_tensor(found.spread).to(value).expand(len(value))
            value = value + weight * found.value / spread
            gradient = gradient + weight * found.gradient / append_dims(spread, gradient)
        return Evaluation(value, gradient)


def as_objective(given: Any, target_bin: int | None = None) -> Objective:
    """An objective from a reward, an objective, a function, or a sequence of (one of these, weight) pairs.

    Raises:
        TypeError: none of these.
        ValueError: ``target_bin`` with something that has no bins.
    """
    if isinstance(given, GeometryReward):
        return RewardObjective(given, target_bin)
    if target_bin is not None:
        raise ValueError(f"target_bin={target_bin} with a {type(given).__name__}. Expected a GeometryReward with head='bins'.")
    if hasattr(given, "evaluate") and hasattr(given, "needs_network"):
        return given
    if isinstance(given, Sequence) and not isinstance(given, str):
        return WeightedObjective(given)
    if callable(given):
        return FunctionObjective(given)
    raise TypeError(
        f"objective is a {type(given).__name__}. Expected a GeometryReward, an objective, a function (x_0, x_t, sigma) -> (B,), or "
        "a list of (objective, weight) pairs."
    )


def append_dims(value: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1), to multiply ``like`` (B, *dims)."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def checked(evaluation: Evaluation, step: GuidedStep) -> Evaluation:
    """The evaluation; FloatingPointError when it is not finite."""
    require_finite(evaluation.value, "the objective's value")
    require_finite(evaluation.gradient, f"the objective's gradient at sigma={step.level.sigma:.4g}")
    return evaluation
