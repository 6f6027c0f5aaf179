"""Reproduce speciation and collapse (arXiv:2502.04339): the theory, the exact score of finite data, and a trained model.

python examples/reproduce/transitions.py            # about four minutes of one core; figure and tables in results/
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from arguments import parse, took
from diffusers import DDPMPipeline
from exact_collapse import collapse_part
from matplotlib.figure import Figure
from sklearn.svm import SVC
from torch import Tensor

from diffusers_geometry import measure_transitions
from diffusers_geometry.bundled import DIGITS
from diffusers_geometry.exact import MixtureDenoiser
from diffusers_geometry.schedule import noise_level
from diffusers_geometry.theory import (
    EmpiricalCollapse,
    clone_agreement,
    collapse_time_gaussian,
    held_out_information,
    sigma_of_time,
    speciation_time,
)

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from train_digits import digits_split  # noqa: E402

VERDICT = """\
Collapse of the exact score comes earlier in generation (at larger t) than the theory of infinite dimension says, by a share
below 3/p, and the extrapolation in 1/p comes back to it within two standard errors. Data that are a tanh of half as many
latents collapse 13 and 11 % (p = 8 and 10, by weight) above the replica-symmetric time. Two backward runs agree as often as the
closed form says. For the trained digits the information from unseen images falls to log n near the noise at which the exact
score of their training set collapses, below that of a Gaussian of their covariance, which bounds the true information. At high
noise the estimate lies above that bound: a network's error there exceeds that of the posterior mean. Clones of the trained
digits agree to 0.8 near the noise at which theory parts the closest pair of digits; the square root of the top eigenvalue, the
quick prediction, is about twice that. At the collapse of the exact score U-turns of the trained model return to their training
image less than half as often as that score would: it has not memorised its images one by one."""
TANH_SIZES = ((16, 8, 602), (20, 10, 2981))  # d, p, n: 2 alpha / beta = 1.6
SIZES = ((4, 64), (8, 64), (8, 512), (8, 4096), (16, 512), (16, 4096))


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    sets: int = 12
    draws: int = 2000
    sizes: tuple[tuple[int, int], ...] = SIZES
    tanh_sizes: tuple[tuple[int, int, int], ...] = TANH_SIZES
    tanh_curve: int = 9
    latent: tuple[int, ...] = (8, 12, 16, 24, 32)
    clones: int = 4000
    clone_steps: int = 300
    images: int = 500
    levels: int = 40
    parents: int = 100
    branches: int = 10
    model_steps: int = 100


SMOKE = Effort(
    sets=2,
    draws=200,
    sizes=SIZES[:2],
    tanh_sizes=TANH_SIZES[:1],
    tanh_curve=2,
    latent=(8, 16),
    clones=200,
    clone_steps=40,
    images=40,
    levels=8,
    parents=20,
    branches=3,
    model_steps=10,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clones(mean_norm_squared: float, within_variance: float, t: float, effort: Effort) -> tuple[float, float]:
    """How often two backward runs of the exact SDE from one point at OU time ``t`` end on the same side, with its error."""
    mean = torch.zeros(2, 2, dtype=torch.double)
    mean[:, 0] = torch.tensor([1.0, -1.0], dtype=torch.double) * math.sqrt(mean_norm_squared)
    mixture = MixtureDenoiser(mean, within_variance * torch.eye(2, dtype=torch.double).expand(2, 2, 2))
    sigma, generator = float(sigma_of_time(t)), seeded(round(1000 * t))
    side = torch.randint(0, 2, (effort.clones,), generator=generator)
    spread = torch.randn(effort.clones, 2, generator=generator, dtype=torch.double) * math.sqrt(within_variance + sigma**2)
    x = (mean[side] + spread).repeat(2, 1)
    for above, below in itertools.pairwise(torch.logspace(math.log10(sigma), -2, effort.clone_steps + 1).tolist()):
        keep = (below / above) ** 2
        noise = torch.randn(x.shape, generator=generator, dtype=torch.double)
        x = keep * x + (1 - keep) * mixture.denoised(x, 1.0, above) + below * math.sqrt(1 - keep) * noise
    first, second = (x[:, 0] > 0).split(effort.clones)
    share = (first == second).double().mean().item()
    return share, math.sqrt(share * (1 - share) / effort.clones)


@torch.no_grad()
def trained_errors(effort: Effort) -> tuple[np.ndarray, Tensor]:
    """Ascending noise levels and the bundled model's squared errors on digits it has not seen, (levels,), (levels, images)."""
    pipe = DDPMPipeline.from_pretrained(DIGITS, use_safetensors=True)
    pipe.scheduler.set_timesteps(pipe.scheduler.config.num_train_timesteps)
    images = digits_split()[2][: effort.images]
    every = np.array([noise_level(pipe.scheduler, i).sigma for i in range(len(pipe.scheduler.timesteps))])
    asked = np.geomspace(every.min(), every.max(), effort.levels)
    sigmas, errors = [], []
    for position in dict.fromkeys(np.abs(np.log(every) - np.log(asked[:, None])).argmin(1).tolist()):
        level, t = noise_level(pipe.scheduler, position), pipe.scheduler.timesteps[position]
        x_t = level.alpha_t * images + level.sigma_t * torch.randn(images.shape, generator=seeded(position))
        denoised = level.a * x_t + level.b * pipe.unet(x_t, t).sample
        sigmas.append(level.sigma)
        errors.append((denoised - images).square().flatten(1).sum(1))
    return np.array(sigmas), torch.stack(errors)


def crossing(sigmas: np.ndarray, values: np.ndarray, level: float) -> float:
    """Largest sigma at which falling ``values`` meet ``level``, linear in log sigma."""
    i = int(np.flatnonzero(values >= level).max())
    share = (values[i] - level) / (values[i] - values[i + 1])
    return float(np.exp(np.log(sigmas[i]) + share * (np.log(sigmas[i + 1]) - np.log(sigmas[i]))))


def speciation_part(effort: Effort, axes: object, lines: list[str]) -> None:
    mean_norm_squared, within = 16.0, 1.0
    t = np.linspace(0.5, 3.2, 200)
    decay = np.exp(-2 * t)
    axes.plot(
        t, clone_agreement(mean_norm_squared * decay / (decay * within + 1 - decay)), color="#333333", label="closed form φ(a)"
    )
    lines += ["| t | clones measured | closed form |", "| --- | --- | --- |"]
    for time in (0.8, 1.1, 1.386, 1.73, 2.1, 2.6):
        share, error = clones(mean_norm_squared, within, time, effort)
        decayed = math.exp(-2 * time)
        expected = float(clone_agreement(mean_norm_squared * decayed / (decayed * within + 1 - decayed)))
        axes.errorbar(time, share, 2 * error, fmt="o", color="#1f78b4", label="two runs of the exact SDE" if time == 0.8 else None)
        lines.append(f"| {time} | {share:.3f} ± {error:.3f} | {expected:.3f} |")
    for criterion, colour in (("saddle", "#ff7f00"), ("drift", "#33a02c"), ("clones", "#6a3d9a")):
        when = speciation_time(mean_norm_squared, within, criterion)
        axes.axvline(when, color=colour, linestyle=":", label=f"{criterion}: t_S = {when:.2f}")
        lines.append(f"| speciation by {criterion} | t_S = {when:.3f} | |")
    axes.set(xlabel="OU time t", ylabel="agreement of two clones", title="speciation, |μ|² = 16, variance 1 inside")


def trained_part(effort: Effort, axes: object, lines: list[str]) -> None:
    train = digits_split()[0]
    sigmas, errors = trained_errors(effort)
    eigenvalues = torch.linalg.eigvalsh(train.flatten(1).double().T.cov()).clamp_min(0).numpy()
    information = held_out_information(sigmas, errors, eigenvalues)
    values, sems = (np.array([getattr(i, name) for i in information]) for name in ("value", "sem"))
    bound = 0.5 * np.log1p(eigenvalues / sigmas[:, None] ** 2).sum(1)
    log_n = math.log(len(train))
    exact = EmpiricalCollapse(train.flatten(1).unique(dim=0), num_draws=effort.draws, generator=seeded())
    ends = [crossing(sigmas, values + shift * sems, log_n) for shift in (-1, 0, 1)]
    marks = {
        "information from held-out errors = log n": (ends[1], (ends[2] - ends[0]) / 2),
        "covariance bound = log n": (float(sigma_of_time(collapse_time_gaussian(eigenvalues, log_n))), None),
    }
    for criterion, label in (("weight", "E w = 1/2"), ("log_odds", "log odds")):
        found = exact.sigma(criterion)
        marks[f"exact score of the training set, {label}"] = (found.value, found.sem)
    axes.plot(sigmas, bound, color="#888888", label="Gaussian of the data's covariance (bound)")
    axes.fill_between(sigmas, values - 2 * sems, values + 2 * sems, color="#1f78b4", alpha=0.3)
    axes.plot(sigmas, values, color="#1f78b4", label="trained digits, from errors on unseen images (± 2 s.e.)")
    axes.axhline(log_n, color="#333333", linewidth=0.8, label=f"log n, n = {len(train):,}")
    for name, (colour, style) in zip(list(marks)[2:], (("#e31a1c", ":"), ("#6a3d9a", "--")), strict=True):
        axes.axvline(marks[name][0], color=colour, linestyle=style, linewidth=1, label=f"{name}: σ = {marks[name][0]:.3f}")
    axes.set(xscale="log", yscale="log", xlabel="noise σ", ylabel="I(x_0; x_σ) in nats", title="collapse of the bundled 8x8 digits")
    lines += [
        "",
        "| collapse of the bundled digits by | σ_C |",
        "| --- | --- |",
        *(f"| {k} | {v:.3f}" + ("" if e is None else f" ± {e:.3f}") + " |" for k, (v, e) in marks.items()),
        "",
        "*The bound is that of the covariance of the training images themselves: its error is not known.*",
        "",
    ]


def rounded(text: str) -> str:
    """Numbers with errors, rounded to two digits of the error."""

    def rounding(found: re.Match) -> str:
        value, error = float(found[1]), float(found[2])
        digits = max(1 - math.floor(math.log10(error)), 0)
        return f"{value:.{digits}f} ± {error:.{digits}f}"

    return re.sub(r"([\d.]+) ± ([\d.]+)", rounding, text)


def measured_part(effort: Effort, axes: list, lines: list[str]) -> None:
    """The bundled digits by clones and U-turns of their own DDPM loop; classes are digits, told by a support vector machine."""
    train, labels, unseen, unseen_labels = digits_split()
    machine = SVC(gamma=0.02, C=10).fit(train.flatten(1).numpy(), labels.numpy())
    right = machine.score(unseen.flatten(1).numpy(), unseen_labels.numpy())

    def digit(images: np.ndarray) -> np.ndarray:
        return machine.predict(2 * images.reshape(len(images), -1) - 1)

    pipe = DDPMPipeline.from_pretrained(DIGITS, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    report = measure_transitions(
        pipe, batch_size=effort.parents, num_inference_steps=effort.model_steps, generator=seeded(), data=train.unique(dim=0),
        classify=digit, branch_positions=effort.branches, num_parents=effort.parents, num_clones=2, progress=False,
    )  # fmt: skip
    sigmas = np.array(report.sigmas)
    series = ((axes[0], report.agreement, "o-", "#1f78b4", "clones of the trained model (± 2 s.e.)"),
              (axes[1], report.recall, "o-", "#e31a1c", "U-turns that return to their training image (± 2 s.e.)"),
              (axes[1], report.exact_recall, "s--", "#333333", "weight of that image in the exact score"))  # fmt: skip
    for panel, values, style, colour, label in series:
        value, sem = (np.array([getattr(e, name) for e in values]) for name in ("value", "sem"))
        panel.errorbar(sigmas, value, 2 * sem, fmt=style, color=colour, markersize=4, linewidth=0.8, label=label)
    how = f"{effort.model_steps} DDPM steps, {effort.parents} runs and as many U-turns of training images, two clones each"
    lines += [f"The bundled digits through their own loop of {how}. Classes are digits, told by a machine that is right on "]
    lines[-1] += f"{right:.1%} of unseen ones."
    lines += ["", "| σ | agreement of clones | return to the image | exact score |", "| --- | --- | --- | --- |"]
    for sigma, *cells in zip(report.sigmas, report.agreement, report.recall, report.exact_recall, strict=True):
        lines.append(f"| {sigma:.3g} | " + " | ".join(f"{e.value:.3f} ± {e.sem:.3f}" for e in cells) + " |")
    lines += ["", "| transition of the bundled digits | σ |", "| --- | --- |"]
    lines += [f"| {what} | {rounded(value)} |" for what, value in report.findings()]
    if report.speciation is not None:
        axes[0].axvline(report.speciation.value, color="#1f78b4", linestyle=":", label=f"σ_S = {rounded(str(report.speciation))}")
    root = report.top_eigenvalue_sigma
    axes[0].axvline(root.value, color="#ff7f00", linestyle=":", label=f"√Λ = {rounded(str(root))}")
    axes[0].axhline(report.level, color="#999999", linewidth=0.8, linestyle="--")
    axes[0].set(xscale="log", xlabel="noise σ", ylabel="share of clones of one digit", title="speciation of the bundled 8x8 digits")
    axes[1].set(xscale="log", xlabel="noise σ", ylabel="share of returns", title="U-turns of their training images")


def main() -> None:
    output, smoke = parse(__doc__)
    effort = SMOKE if smoke else Effort()
    figure = Figure(figsize=(12, 13), layout="constrained")
    axes = figure.subplots(3, 2).ravel()
    lines = ["# Speciation and collapse", "", f"Written by `examples/reproduce/transitions.py`. {VERDICT}", ""]
    lines += ["![transitions](transitions.png)", ""]
    collapse_part(effort, list(axes[:2]), lines)
    speciation_part(effort, axes[2], lines)
    trained_part(effort, axes[3], lines)
    measured_part(effort, list(axes[4:]), lines)
    for panel in axes:
        panel.legend(fontsize=8, loc={axes[1]: "upper left", axes[3]: "upper right"}.get(panel, "best"))
        panel.grid(alpha=0.3)
    figure.savefig(output / "transitions.png", dpi=90)
    (output / "transitions.md").write_text("\n".join([*lines, "", took(), ""]))
    print(output / "transitions.md")


if __name__ == "__main__":
    main()
