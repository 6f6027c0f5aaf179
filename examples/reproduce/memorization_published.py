"""Memorisation scores by the formulas that their authors' code has, defects included, beside the same quantity as it should be.

All take the raw outputs of the two branches, o_u and o_c, at x_T of the run (pure noise) and a training timestep; a and s are
alpha_t and sigma_t there. Written from reading and running the public repositories, with the defects described beside each.

    Wen        YuxinWenRick/diffusion_memorization            mean over all steps of |o_c - o_u|; right for epsilon
    Jeon       Dongjae0324/sharpness_memorization_diffusion   |(H_c - H_u)(s_c - s_u)| at the first step; scores of a v-prediction
                                                              are coded (a v - x) / s² instead of -x - a v / s
    Asthana    rohanasthana/memorization-anisotropy           |o_c - o_u| at the first step plus g times the cosine of o_u and
                                                              o_c - o_u at x_T but timestep 41, over channels at every latent pixel,
                                                              then averaged; g set by hand, 2 for epsilon, 0.1 for v, whose raw
                                                              outputs are taken for scores
    FLIPD      layer6ai-labs/diffusion_memorization           -s wᵀJw + |o_g|² at x_T for the guided o_g, with one Gaussian w and
                                                              the unconditional branch a constant in J
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_geometry.jacobian import Jacobian

FIRST, LOW = 981, 41  # timesteps of 50 steps of Stable Diffusion's schedule: the first, and the third from the end
HAND_SET = {"epsilon": 2.0, "v_prediction": 0.1}
PROBE_SEED = 42


@dataclass(frozen=True)
class Published:
    """A formula as coded: its value grows with memorisation, or falls; ``forwards`` are network evaluations of one sample."""

    name: str
    higher_is_memorised: bool
    forwards: float


@dataclass(frozen=True)
class Branches:
    """Raw outputs at one timestep: ``outputs`` maps x (B, *dims) to (o_u, o_c)."""

    outputs: Callable[[Tensor], tuple[Tensor, Tensor]]
    alpha_t: float
    sigma_t: float
    prediction: str

    def epsilons(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The noise that the outputs mean."""
        pair = self.outputs(x)
        return pair if self.prediction == "epsilon" else tuple(self.alpha_t * v + self.sigma_t * x for v in pair)

    def coded_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores as Jeon et al. and Asthana and Belagiannis code them."""
        if self.prediction == "epsilon":
            return tuple(-o / self.sigma_t for o in self.outputs(x))
        return tuple((self.alpha_t * v - x) / self.sigma_t**2 for v in self.outputs(x))

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores as they are."""
        return tuple(-e / self.sigma_t for e in self.epsilons(x))


def norms(value: Tensor) -> Tensor:
    return value.flatten(1).norm(dim=1)


def sharpness(pair: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """|(H_c - H_u)(s_c - s_u)| of a pair of scores (unconditional, conditional), (B,)."""

    def difference(x: Tensor) -> Tensor:
        unconditional, conditional = pair(x)
        return conditional - unconditional

    with torch.no_grad():
        direction = difference(x)
    return norms(Jacobian(difference, x).jvp(direction))


@torch.no_grad()
def anisotropy_as_coded(first: Branches, low: Branches, x: Tensor) -> Tensor:
    """The sum with hand-set weights of a norm and a mean of cosines over channels, (B,)."""
    scores, raw = first.coded_scores(x), low.outputs(x)
    norm = norms(scores[1] - scores[0]) * (first.sigma_t if first.prediction == "epsilon" else 1.0)
    cosines = torch.nn.functional.cosine_similarity(raw[0], raw[1] - raw[0], dim=1)
    return norm + HAND_SET[first.prediction] * cosines.flatten(1).mean(dim=1)


@torch.no_grad()
def cosine(pair: tuple[Tensor, Tensor], per_pixel: bool) -> Tensor:
    """Of the unconditional one and the guidance: over channels, then averaged, or of the whole vectors, (B,)."""
    unconditional, guidance = pair[0], pair[1] - pair[0]
    if per_pixel:
        return torch.nn.functional.cosine_similarity(unconditional, guidance, dim=1).flatten(1).mean(dim=1)
    return torch.nn.functional.cosine_similarity(unconditional.flatten(1), guidance.flatten(1), dim=1)


def flipd_as_coded(branches: Branches, x: Tensor, guidance_scale: float, missing: bool = True) -> Tensor:
    """FLIPD without its dimension, of the guided noise at x, (B,); ``missing`` leaves out the unconditional branch's Jacobian."""
    with torch.no_grad():
        constant = branches.outputs(x)[0]

    def guided(x: Tensor) -> Tensor:
        unconditional, conditional = branches.outputs(x)
        return (constant if missing else unconditional) + guidance_scale * (conditional - unconditional)

    probe = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(PROBE_SEED)).expand_as(x)
    jacobian = Jacobian(guided, x)
    trace = (probe * jacobian.vjp(probe)).flatten(1).sum(dim=1)
    return -branches.sigma_t * trace + norms(jacobian.value).square()
