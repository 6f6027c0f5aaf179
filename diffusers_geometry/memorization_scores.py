"""Scores that tell a recited training image from a new one, at one recorded step of a run.

A prompt that recites ties the condition c to one image x*. The conditional posterior p(x_0 | x_t, c) has then collapsed to x*
while the unconditional one has not, and every score asks for a trace of that. With epsilon_c, epsilon_u the noise that the two
branches predict at x_t, D_c the conditional clean estimate, x_0 the run's final sample and d its size:

    guidance_norm   |e_c - e_u|                                 Wen et al. 2024, arXiv:2407.21720
    guidance_shift  sigma / sqrt(1 + sigma²) |e_c - e_u|        the same as a change of x_0, bounded where sigma is large
    sharpness       |(H_c - H_u)(s_c - s_u)|                    Jeon et al. 2025, arXiv:2412.04140
    anisotropy      <e_u, e_c - e_u> / (|e_u| |e_c - e_u|)      after Asthana and Belagiannis 2026, arXiv:2601.20642
    commitment      |D_c(x_t) - x_0| / sqrt(d)                  this project: how far the run is from knowing where it ends
    flipd           tr D'_c + |D_c(x_0) - x_0|² / sigma²        Ross et al. 2025, arXiv:2411.00113 (local intrinsic dimension)
    flipd_gap       flipd of c minus flipd of u                 Ross et al. 2025
    effective_dimension  tr D'_c(x_t)                           this project: directions that the condition leaves open
    contraction     tr D'_u(x_t) - tr D'_c(x_t)                 this project: directions that the condition has closed
    psi, nuclear_norm, spectral_norm                            of the singular values in hand, at no cost, without guidance only

Scores s and their Jacobians H are those of the variance-preserving form x_t / sqrt(alpha_t² + sigma_t²), so that they are what the
papers took on Stable Diffusion and do not depend on the scheduler. Everything goes through :meth:`Denoiser.epsilon`: a network that
predicts v, x_0 or flow gives the same numbers as one that predicts epsilon.

For an exact score H is symmetric, so (H_c - H_u) v is also one reverse product; of a trained network the two differ by the
asymmetry of its Jacobian. ``sharpness`` takes the forward product, as defined; ``sharpness_reverse`` the reverse one, which needs
no second graph and no check of it, and is a third of the cost.

The spectrum in hand is that of what the sampler follows. With guidance this is D'_w = D'_u + w (D'_c - D'_u), and where D'_c has
collapsed to nothing (1 - w) D'_u is left, whose singular values for w > 2 are larger and not smaller: it tells nothing of collapse,
so its scores are left out, and effective_dimension and contraction take D'_c itself. (nu is scale free and has no direction.)

Where alpha_t = 0 the noise says nothing of x_0, both branches predict the same one, and scores of the guidance are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .denoiser import Denoiser
from .difference import require_finite
from .jacobian import Jacobian
from .stochastic import rademacher

# Plain forward passes per product, see :mod:`.jacobian`: reverse in chunks of 4 and alone; forward alone, with its check by two
# products of each kind.
REVERSE, LONE_REVERSE, LONE_FORWARD = 1.6, 3.2, 3.9 + 2 * 1.8 + 2 * 1.6
TRACE_PROBES = 8
SPECTRUM_RANK = 8  # singular values that psi and the norms count, for every step and prompt alike


@dataclass(frozen=True, eq=False)
class RunPoint:
    """One recorded step of one sample, or of a batch (every array then with the batch first).

    Attributes:
        sigma: sigma_t / alpha_t.
        x_t: The scheduler's sample, (*dims), at least float32.
        guided: What the sampler followed.
        conditional: That branch, or None where there is no guidance.
        unconditional: That branch, or None.
        singular_values: Of D', descending, (k,), or None.
    """

    sigma: float
    x_t: Tensor
    guided: Denoiser
    conditional: Denoiser | None = None
    unconditional: Denoiser | None = None
    singular_values: np.ndarray | None = None


@dataclass(frozen=True)
class Score:
    """What a score is.

    Attributes:
        name: Key in :data:`SCORES`.
        formula: In the symbols of the module docstring.
        source: Authors and year.
        url: Where it is defined; empty for this project's own.
        higher_is_memorised: Direction.
        cost: Network evaluations of one sample that it takes at a recorded step, alone.
        needs_guidance: Whether it compares the two branches.
        positive: Whether it is a size, which is compared by its logarithm.
        over_steps: How a run's number is made of its steps': their "mean", or the "first" (noisiest) or "last" of them.
    """

    name: str
    formula: str
    source: str
    url: str
    higher_is_memorised: bool
    cost: float
    needs_guidance: bool
    positive: bool
    over_steps: Literal["mean", "first", "last"] = "mean"


_WEN = ("Wen, Liu, Chen and Lyu 2024", "https://arxiv.org/abs/2407.21720")
_JEON = ("Jeon, Kim and No 2025", "https://arxiv.org/abs/2412.04140")
_ASTHANA = ("after Asthana and Belagiannis 2026", "https://arxiv.org/abs/2601.20642")
_ROSS = ("Ross, Kamkari et al. 2025", "https://arxiv.org/abs/2411.00113")
_HUMAYUN = ("after Humayun et al. 2025", "https://arxiv.org/abs/2408.08307")
_OWN = ("diffusers_geometry", "")
_TRACE = TRACE_PROBES * REVERSE
SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score("guidance_norm", "|e_c - e_u|", *_WEN, True, 2, True, True),
        Score("guidance_shift", "sigma / sqrt(1 + sigma^2) |e_c - e_u|", "after Wen et al. 2024", _WEN[1], True, 2, True, True),
        Score("sharpness", "|(H_c - H_u)(s_c - s_u)|", *_JEON, True, 2 + 2 * LONE_FORWARD, True, True),
        Score("sharpness_reverse", "|(H_c - H_u)^T (s_c - s_u)|", *_JEON, True, 2 + 2 * LONE_REVERSE, True, True),
        Score("anisotropy", "cos(e_u, e_c - e_u)", *_ASTHANA, True, 2, True, False),
        Score("commitment", "|D_c(x_t) - x_0| / sqrt(d)", *_OWN, False, 1, False, True),
        Score("flipd", "tr D'_c(x_0) + |D_c(x_0) - x_0|^2 / sigma^2", *_ROSS, False, 1 + _TRACE, False, False),
        Score("flipd_gap", "flipd_c - flipd_u", *_ROSS, False, 2 + 2 * _TRACE, True, False),
        Score("contraction", "tr D'_u(x_t) - tr D'_c(x_t)", *_OWN, True, 2 * _TRACE, True, False),
        Score("effective_dimension", "tr D'_c(x_t)", *_OWN, False, _TRACE, False, False),
        Score("psi", f"sum of log s_i, i <= {SPECTRUM_RANK}", *_HUMAYUN, False, 0, False, False),
        Score("nuclear_norm", f"sum of s_i, i <= {SPECTRUM_RANK}", *_OWN, False, 0, False, True),
        Score("spectral_norm", "s_1", *_OWN, False, 0, False, True),
    )
}
PROMPT_SCORES = {
    "agreement": Score("agreement", "mean correlation of finished samples over pairs of seeds", *_OWN, True, 0, False, False)
}


@dataclass(frozen=True)
class Measured:
    """A score of every sample of a batch at one step: value (B,) and standard error (B,)."""

    value: np.ndarray
    sem: np.ndarray


class StepProbe:
    """One step's quantities, each taken once for all scores that need it; counts network evaluations of one sample.

    Args:
        point: A :class:`RunPoint` of a batch, x_t of shape (B, *dims).
        final: The run's final samples x_0, (B, *dims).
        generator: Random probes.
    """

    def __init__(self, point: RunPoint, final: Tensor, generator: torch.Generator) -> None:
        self.point, self.final, self.generator = point, final.to(point.x_t), generator
        self.forwards = 0.0
        self._noise: dict[str, Tensor] = {}
        self._traces: dict[str, Tensor] = {}

    @property
    def has_guidance(self) -> bool:
        """Whether there are two branches, at a noise at which they can differ."""
        return self.point.conditional is not None and self.point.unconditional is not None and self.point.guided.alpha_t > 0

    def branch(self, name: str) -> Denoiser:
        """A branch; "conditional" is what the sampler followed where there is no guidance."""
        found = getattr(self.point, name)
        return self.point.guided if found is None and name == "conditional" else found

    def epsilon(self, name: str) -> Tensor:
        """Noise predicted by a branch at x_t, (B, *dims)."""
        if name not in self._noise:
            with torch.no_grad():
                found = self.branch(name).epsilon(self.point.x_t)
            self._noise[name] = require_finite(found, f"the {name} noise at sigma={self.point.sigma:.4g}")
            self.forwards += 1
        return self._noise[name]

    def guidance(self) -> Tensor:
        """e_c - e_u at x_t, (B, *dims)."""
        return self.epsilon("conditional") - self.epsilon("unconditional")

    def product(self, direction: Tensor, reverse: bool) -> Tensor:
        """(J_c - J_u) v, or its transpose's, of the branches' noise with respect to x_t; rows are independent."""
        conditional, unconditional = self.branch("conditional"), self.branch("unconditional")
        jacobian = Jacobian(lambda x: conditional.epsilon(x) - unconditional.epsilon(x), self.point.x_t)
        self.forwards += 2 * (LONE_REVERSE if reverse else LONE_FORWARD)
        return jacobian.vjp(direction) if reverse else jacobian.jvp(direction)

    def traces(self, name: str, at: Literal["x_t", "x_0"]) -> Tensor:
        """tr D' of a branch by every random probe, (probes, B); the same probes for every branch and step."""
        key = f"{name} {at}"
        if key not in self._traces:
            denoiser = self.branch(name)
            x = self.point.x_t if at == "x_t" else denoiser.alpha_t * self.final
            jacobian = Jacobian(denoiser.canonical_map("denoised"), x, chunk_size=4)
            probes = self._probes(x)
            found = (probes * jacobian.vjp(probes)).flatten(2).double().sum(dim=2).cpu()
            # All d directions instead of as many probes: exact.
            self._traces[key] = found.sum(dim=0, keepdim=True) if len(probes) == x[0].numel() else found
            self.forwards += REVERSE * len(probes)
        return self._traces[key]

    def _probes(self, x: Tensor) -> Tensor:
        """Random signs (K, B, *dims), the same for every sample of the batch; the identity where K reaches d."""
        size, shape = x[0].numel(), x.shape[1:]
        if size <= TRACE_PROBES:
            rows = torch.eye(size).reshape(size, *shape)
        else:
            state = self.generator.get_state()
            rows = rademacher(TRACE_PROBES, shape, x, self.generator)
            self.generator.set_state(state)
        return rows.to(x)[:, None].expand(-1, *x.shape)

    def residual(self, name: str) -> Tensor:
        """|D(x_0) - x_0|² / sigma² of a branch, (B,)."""
        denoiser = self.branch(name)
        with torch.no_grad():
            moved = denoiser.denoised(denoiser.alpha_t * self.final) - self.final
        self.forwards += 1
        return require_finite(moved, "the denoised final sample").flatten(1).double().square().sum(dim=1).cpu() / denoiser.sigma**2


def measure(name: str, probe: StepProbe) -> Measured | None:
    """A score at one step; None where it has no meaning there (no guidance, no spectrum, alpha_t = 0)."""
    score = SCORES[name]
    if score.needs_guidance and not probe.has_guidance:
        return None
    if name in _SPECTRAL:
        values = None if probe.point.conditional is not None else probe.point.singular_values
        return None if values is None else _exact(_SPECTRAL[name](np.asarray(values)))
    return _TAKEN[name](probe)


def _norm(value: Tensor) -> Tensor:
    return value.flatten(1).double().norm(dim=1).cpu()


def _exact(value: Tensor | np.ndarray) -> Measured:
    array = value.numpy() if isinstance(value, Tensor) else value
    return Measured(array, np.zeros(len(array)))


def _sampled(samples: Tensor, shift: Tensor | float = 0.0) -> Measured:
    """Mean over probes (K, B), plus what is not random; one row is exact."""
    sem = samples.std(dim=0) / math.sqrt(len(samples)) if len(samples) > 1 else torch.zeros(samples.shape[1])
    return Measured((samples.mean(dim=0) + shift).numpy(), sem.double().numpy())


def _guidance_norm(probe: StepProbe) -> Measured:
    return _exact(_norm(probe.guidance()))


def _guidance_shift(probe: StepProbe) -> Measured:
    return _exact(_norm(probe.guidance()) * (probe.point.sigma / math.sqrt(1 + probe.point.sigma**2)))


def _sharpness(reverse: bool) -> Callable[[StepProbe], Measured]:
    def taken(probe: StepProbe) -> Measured:
        alpha_t, sigma_t = probe.point.guided.alpha_t, probe.point.guided.sigma_t
        # s = -(r / sigma_t) e and d/dx = r d/dx_t in the variance-preserving form, r = sqrt(alpha_t² + sigma_t²).
        scale = math.hypot(alpha_t, sigma_t) ** 3 / sigma_t**2
        return _exact(scale * _norm(probe.product(probe.guidance(), reverse)))

    return taken


def _anisotropy(probe: StepProbe) -> Measured:
    unconditional, guidance = probe.epsilon("unconditional"), probe.guidance()
    product = (unconditional * guidance).flatten(1).double().sum(dim=1).cpu()
    return _exact(product / (_norm(unconditional) * _norm(guidance)).clamp_min(torch.finfo(torch.float64).tiny))


def _commitment(probe: StepProbe) -> Measured:
    denoiser = probe.branch("conditional")
    if denoiser.alpha_t > 0:
        estimate = (probe.point.x_t - denoiser.sigma_t * probe.epsilon("conditional")) / denoiser.alpha_t
    else:
        with torch.no_grad():
            estimate = require_finite(denoiser.denoised(probe.point.x_t), "the clean estimate")
        probe.forwards += 1
    return _exact(_norm(estimate - probe.final) / math.sqrt(estimate[0].numel()))


def _flipd(probe: StepProbe) -> Measured | None:
    if probe.point.guided.alpha_t == 0:
        return None
    return _sampled(probe.traces("conditional", "x_0"), probe.residual("conditional"))


def _flipd_gap(probe: StepProbe) -> Measured:
    difference = probe.traces("conditional", "x_0") - probe.traces("unconditional", "x_0")
    return _sampled(difference, probe.residual("conditional") - probe.residual("unconditional"))


def _effective_dimension(probe: StepProbe) -> Measured | None:
    if probe.point.guided.alpha_t == 0:  # D' is zero for every distribution
        return None
    return _sampled(probe.traces("conditional", "x_t"))


def _contraction(probe: StepProbe) -> Measured:
    return _sampled(probe.traces("unconditional", "x_t") - probe.traces("conditional", "x_t"))


def _leading(values: np.ndarray) -> np.ndarray:
    return np.maximum(values[:, :SPECTRUM_RANK], np.finfo(np.float32).tiny)


_TAKEN: dict[str, Callable[[StepProbe], Measured | None]] = {
    "guidance_norm": _guidance_norm, "guidance_shift": _guidance_shift, "sharpness": _sharpness(False),
    "sharpness_reverse": _sharpness(True), "anisotropy": _anisotropy, "commitment": _commitment, "flipd": _flipd,
    "flipd_gap": _flipd_gap, "effective_dimension": _effective_dimension, "contraction": _contraction,
}  # fmt: skip
_SPECTRAL: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "psi": lambda values: np.log(_leading(values)).sum(axis=1),
    "nuclear_norm": lambda values: _leading(values).sum(axis=1), "spectral_norm": lambda values: values[:, 0],
}  # fmt: skip
