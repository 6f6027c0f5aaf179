"""Reproduce arXiv:2410.05898 on image models: spectra over the noise, dimension per digit class, phases under four schedules.

python examples/reproduce/image_models.py           # about nine minutes of one core; figure and tables in results/

A network trained under one schedule is a function of x_t and of its own timestep. Under another schedule it is asked at the
(fractional) training timestep of equal sigma, where both schedules mean the same x_t; only the sigmas that are visited differ.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from arguments import parse, took
from digit_classes import class_dimensions, class_table, draw_classes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from runs import KEPT, SCHEDULES, SEEN, ZOO, Run, boundaries, in_run, pipeline, rising, run, shares

from diffusers_geometry import GeometryTrace

sys.path.append(str(ZOO))

from data import digits_split

VERDICT = """\
What agrees with the papers: directions are kept one after another as the noise falls, those of large variance first, and ones
have fewer dimensions than any other digit, in pixels as in latents. tr D' near σ = 0.14 is 0.3 to 0.45 times that of a
Gaussian with the covariance of the class, and in the mean over classes agrees to a tenth with the squared error of D over σ²,
as Tweedie's formula wants; of ones alone that error is 38 % larger. Phases belong to σ, not to steps: under three schedules
the emoji network keeps its first direction at the same σ, within 11 %, of two samples each, and its shares of kept directions
fall on one curve; the latent models of diffusion and of flow matching, trained apart on the same latents, nearly do so too.
What a schedule moves is where in the run this happens, and where the run stops: linear betas spend more than twice the steps
of the others before the first direction, and the scaled-linear runs end above the σ at which half of the directions are kept.
What does not agree: the eigenvalue rule (Δ = 0.1) calls every recorded step of every diffusion run coverage, neither trivial
nor consolidated. Flow matching is trivial at its first step, of pure noise, and the consolidation of its last keeps all 256
directions, so it is that of no manifold. At large σ the errors of the pixel networks stand as singular values of 0.25 to 0.5
where a Gaussian of the data has almost none, and D' is far from symmetric; at small σ values lie everywhere between 0 and 1.
The largest gap lies anywhere from 1 to the whole space, so it names no dimension of these images. The first direction of the
digits is kept at three times the σ of a Gaussian, and D' exceeds one: the data are modes, not one linear manifold. FLIPD is
negative in pixels, with tr D' at the clean image, where no covariance could be; a clean image is also an input that no
network has seen at that timestep. In latents FLIPD is positive, and lowest for ones as well."""
COLOURS = {
    "ddpm-mnist": "#666666",
    "linear": "#1b9e77",
    "scaled-linear": "#d95f02",
    "cosine": "#7570b3",
    "sd-mnist": "#1f78b4",
    "sd3-mnist": "#e31a1c",
}


PARTS = ("ddpm-mnist", *SCHEDULES, "sd-mnist", "sd3-mnist", "classes")


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    steps: int = 50
    digit_sigmas: tuple[float, ...] = (20, 7, 3, 1.5, 0.7, 0.3, 0.1)
    sigmas: tuple[float, ...] = (7, 3, 1.5, 0.7, 0.3, 0.1)
    samples: int = 2
    prompts: tuple[str, ...] = ("a seven", "a zero", "a four")
    generated: int = 100
    per_class: int = 4
    dense_per_class: int = 1
    latent_per_class: int = 3
    products: int = 64
    options: dict[str, Any] = field(default_factory=dict)


FEW = {"spectrum": "golub_kahan", "num_singular_values": 4, "max_products": 68}
SMOKE = Effort(2, (), (), 1, ("a seven",), 4, 1, 0, 0, 8, FEW)


def measure(effort: Effort) -> dict[str, Any]:
    """Everything that takes time: runs by name, and the dimensions per class."""
    timed = {name: timed_part(name, effort) for name in PARTS}
    runs = {name: found for name, (found, _) in timed.items()}
    seconds = sum(spent for _, spent in timed.values())
    return {"classes": runs.pop("classes"), "runs": runs, "weights": weights_digest(), "seconds": seconds}


def timed_part(name: str, effort: Effort) -> tuple[Any, float]:
    """One part of the measurement, and the seconds of processor time that it takes."""
    start, options = time.process_time(), effort.options
    if name == "ddpm-mnist":
        found = run(pipeline(name, "linear"), effort.steps, effort.digit_sigmas, **options)
    elif name in SCHEDULES:
        found = run(pipeline("ddpm-emoji", name), effort.steps, effort.sigmas, **options, batch_size=effort.samples)
    elif name == "classes":
        found = class_dimensions(effort)
    else:
        found = run(pipeline(name), effort.steps, effort.sigmas, list(effort.prompts), **options, guidance_scale=1.0)
    return found, time.process_time() - start


def draw(measured: dict[str, Any]) -> Figure:
    """Nine panels: two spectra and the classes; the schedules over sigma and over the run; flow matching beside diffusion."""
    figure = Figure(figsize=(16.5, 14), layout="constrained")
    panels, runs = figure.subplots(3, 3), measured["runs"]
    draw_spectra(panels[0, 0], runs["ddpm-mnist"], "ddpm-mnist, d = 1024", digit_eigenvalues())
    draw_spectra(panels[0, 1], runs["linear"], "ddpm-emoji, d = 768")
    draw_classes(panels[0, 2], measured["classes"])
    for row, names, title in ((1, tuple(SCHEDULES), "ddpm-emoji"), (2, ("sd-mnist", "sd3-mnist"), "latents of digits")):
        for name in names:
            draw_run(panels[row], name, runs[name])
        panels[row, 0].set(title=f"{title}: directions kept over σ", ylabel="share of the directions seen that are kept")
        panels[row, 1].set(title=f"{title}: the same over the run", ylabel="share of the directions seen that are kept")
        for axes in panels[row, :2]:
            axes.set(ylim=(-0.03, 1.03))
            axes.legend(fontsize=9)
        log_sigma(panels[row, 0], 0.0008, 150)
        panels[row, 1].set(xlabel="share of the run's steps", xlim=(0, 1))
    draw_first(panels[1, 2], runs)
    draw_phases(panels[2, 2], runs)
    for axes in panels.ravel():
        axes.grid(alpha=0.25)
    figure.suptitle("Image models: D' over the noise, per class, and under other schedules", fontsize=13)
    return figure


def log_sigma(axes: Axes, low: float, high: float) -> None:
    axes.set(xscale="log", xlabel="noise σ (generation runs to the right)", xlim=(high, low))


def digit_eigenvalues() -> np.ndarray:
    """Of the covariance of the training digits, descending."""
    return torch.linalg.eigvalsh(digits_split()[0].images.flatten(1).double().T.cov()).flip(0).clamp_min(0).numpy()


def draw_spectra(axes: Axes, found: Run, title: str, variances: np.ndarray | None = None) -> None:
    """Singular values of D' of the first sample by index over sigma; dashed, those of a Gaussian of the data's covariance."""
    sigmas, values = found.trace.sigmas, found.values[:, 0]
    grid = np.geomspace(sigmas.min(), sigmas.max(), 100)
    indices = [index for index in (1, 4, 16, 64, 256, 700) if index <= values.shape[1]]
    for i, index in enumerate(indices):
        axes.plot(sigmas, values[:, index - 1], ".-", color=f"C{i}", label=f"{index}")
        if variances is not None and variances[index - 1] > 1e-9:
            axes.plot(grid, variances[index - 1] / (variances[index - 1] + grid**2), "--", color=f"C{i}", linewidth=0.8)
    axes.axhspan(SEEN, KEPT, color="#eeeeee", zorder=0)
    dashed = " (dashed: Gaussian data)" if variances is not None else ""
    axes.set(ylabel="singular value of D'", title=f"{title}, one sample{dashed}")
    axes.legend(title="index", fontsize=9, ncols=2)
    log_sigma(axes, 0.007, 150)


def draw_run(panels: Any, name: str, found: Run) -> None:
    """The kept share over sigma (mean and each sample) and over the run."""
    sigmas, kept = found.trace.sigmas, shares(found.values)
    places = np.array([step.index for step in found.trace.steps]) / (len(found.visited) - 1)
    for axes, x in ((panels[0], sigmas), (panels[1], places)):
        axes.plot(x, kept.mean(axis=1), "o-", color=COLOURS[name], markersize=4, label=name)
        axes.plot(x, kept, "-", color=COLOURS[name], linewidth=0.5, alpha=0.6)


def title_of(name: str) -> str:
    return f"emoji, {name}" if name in SCHEDULES else name


def draw_first(axes: Axes, runs: dict[str, Run]) -> None:
    for name, found in runs.items():
        largest, colour = found.values[:, :, 0].mean(axis=1), COLOURS[name]
        axes.plot(found.trace.sigmas, largest, "o-", color=colour, markersize=4, label=title_of(name))
    axes.axhline(KEPT, color="#888888", linewidth=0.8)
    axes.set(ylabel="largest singular value of D'", title="the first direction")
    axes.legend(fontsize=9)
    log_sigma(axes, 0.0008, 150)


def draw_phases(axes: Axes, runs: dict[str, Run]) -> None:
    parts = np.array([in_run(found) for found in runs.values()])
    labels = ("before the first direction is kept", "until half of those seen are", "after")
    for i, (label, colour) in enumerate(zip(labels, ("#d9d9d9", "#9ecae1", "#fdae6b"), strict=True)):
        axes.barh(range(len(runs)), parts[:, i], left=parts[:, :i].sum(axis=1), color=colour, label=label)
    axes.set_yticks(range(len(runs)), [title_of(name) for name in runs])
    axes.invert_yaxis()
    axes.set(xlabel="share of the run's steps", title="where in the run", xlim=(0, 1))
    axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3)


def spectra_table(title: str, found: Run) -> list[str]:
    """The first sample's spectra over the run."""
    coarse = GeometryTrace(found.trace.steps, found.trace.settings | {"phase_resolution": 0.3})
    heads = ("σ", "largest u", "tr D'", "seen", "kept", "largest gap after", "asymmetry", "Δ = 0.1", "Δ = 0.3", "gap rule")
    lines = [f"## {title}", "", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for i, step in enumerate(found.trace.steps):
        u, asymmetry = step.denoised_singular_values[0], "-" if step.asymmetry is None else f"{step.asymmetry[0]:.2f}"
        phases = (found.trace.phases, coarse.phases, found.trace.phases_by_gap)
        cells = (
            f"{step.sigma:.3g}", f"{u[0]:.2f}", f"{step.effective_dimension.value[0]:.1f}", f"{(u >= SEEN).sum()}",
            f"{(u > KEPT).sum()}", f"{step.gap_dim.value[0]:.0f}", asymmetry, *(str(p[i][0]) for p in phases),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", "*u: singular values of D'; seen: u ≥ 0.1; kept: u > 0.9; then the phase by the eigenvalue rule at two "
            "resolutions, and by the gap rule.*", ""]  # fmt: skip


def mean_mark(sigmas: np.ndarray) -> str:
    """Mean ± standard error of a mark over the samples for which it was met."""
    met = sigmas[np.isfinite(sigmas) & (sigmas > 0)]
    if not len(met):
        return "before the run" if np.isinf(sigmas).all() else "not met"
    error = f" ± {met.std(ddof=1) / math.sqrt(len(met)):.2g}" if len(met) > 1 else " (one sample)"
    return f"{met.mean():.3g}{error}" + (f" ({len(met)} of {len(sigmas)})" if len(met) < len(sigmas) else "")


def gaussian_marks() -> tuple[float, float]:
    """Both marks of a Gaussian of the training digits' covariance."""
    variances, sigmas = digit_eigenvalues(), np.geomspace(20, 1e-3, 400)
    values = variances / (variances + sigmas[:, None] ** 2)
    return rising(sigmas, values[:, 0], KEPT), rising(sigmas, shares(values), 0.5)


def schedule_table(runs: dict[str, Run]) -> list[str]:
    lines = ["## Where the phases lie", "", "| run | visits σ | first direction kept at σ | half of those seen kept at σ | "
             "share of the steps before, between, after |", "| --- " * 5 + "|"]  # fmt: skip
    for name, found in runs.items():
        marks, title = boundaries(found), title_of(name)
        finite = found.visited[np.isfinite(found.visited)]
        top = "∞" if len(finite) < len(found.visited) else f"{finite.max():.3g}"
        parts = ", ".join(f"{100 * part:.0f} %" for part in in_run(found))
        lines.append(
            f"| {title} | {top} .. {finite.min():.2g} | {mean_mark(marks['first'])} | {mean_mark(marks['half'])} | {parts} |"
        )
    first, half = gaussian_marks()
    lines.append(f"| Gaussian of the digits' covariance | | {first:.3g} | {half:.3g} | |")
    note = (
        "*Means over samples ± standard errors (one sample of ddpm-mnist, two of emoji, three of latents), linear in log σ between "
        "the recorded steps, which are a decade or more apart for the second mark. Kept: u > 0.9; seen: u ≥ 0.1. The last cosine "
        "step lies below the σ of the training, and is asked at the smallest of it.*"
    )
    return [*lines, "", note, ""]


def phase_table(runs: dict[str, Run]) -> list[str]:
    """Which phases the eigenvalue rule finds, at two resolutions, over all samples and recorded steps of every run."""
    lines = ["## Phases by the eigenvalue rule", "", "| run | directions | Δ = 0.1 | Δ = 0.3 | smallest u at the last step |"]
    lines += ["| --- " * 5 + "|"]
    for name, found in runs.items():
        cells = [phases_found(found, resolution) for resolution in (0.1, 0.3)]
        least = ", ".join(f"{u:.2g}" for u in found.values[-1].min(axis=1))
        lines.append(f"| {title_of(name)} | {found.values.shape[2]} | {cells[0]} | {cells[1]} | {least} |")
    note = (
        "*Phases in the order of the run with the σ at which they are recorded; of samples that differ, all phases. Where no u is "
        "small at the last step, no direction is normal: that is consolidation on no manifold.*"
    )
    return [*lines, "", note, ""]


def phases_found(found: Run, resolution: float) -> str:
    """Every phase with its range of sigma, over all samples."""
    trace = GeometryTrace(found.trace.steps, found.trace.settings | {"phase_resolution": resolution})
    labels, sigmas, cells = np.asarray(trace.phases.labels), trace.sigmas, []
    for phase in ("trivial", "coverage", "consolidation", "unresolved"):
        steps = np.flatnonzero((labels == phase).any(axis=1))
        if len(steps):
            ends = ["∞" if math.isinf(sigmas[i]) else f"{sigmas[i]:.3g}" for i in (steps[0], steps[-1])]
            cells.append(f"{phase} {ends[0]}" + (f" .. {ends[1]}" if len(steps) > 1 else ""))
    return ", ".join(cells)


def weights_digest() -> str:
    """Of the network of ddpm-mnist that was measured."""
    path = ZOO / "ddpm-mnist" / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def report(measured: dict[str, Any]) -> list[str]:
    runs = measured["runs"]
    lines = ["# Image models", "", f"Written by `examples/reproduce/image_models.py`. {VERDICT}", ""]
    lines += ["![image_models](image_models.png)", "", f"Weights of ddpm-mnist: sha256 {measured['weights']}.", ""]
    lines += spectra_table("ddpm-mnist, one sample", runs["ddpm-mnist"])
    lines += spectra_table("ddpm-emoji, one sample of two", runs["linear"])
    lines += phase_table(runs) + class_table(measured["classes"]) + schedule_table(runs)
    return [*lines, took(measured["seconds"]), ""]


def main() -> None:
    output, smoke = parse(__doc__)
    measured = measure(SMOKE if smoke else Effort())
    draw(measured).savefig(output / "image_models.png", dpi=90)
    (output / "image_models.md").write_text("\n".join(report(measured)))
    print(output / "image_models.md")


if __name__ == "__main__":
    main()
