"""Dimension per digit class: of generated samples of ddpm-mnist in pixels, and of sd-mnist in its latents.

In pixels the classifier names the class, in latents the prompt does. Beside tr D' at a noised sample stands |D(x_t) - x_0|² / σ²,
from function values alone: by Tweedie's formula both have one mean where the network is the posterior mean.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from runs import ZOO, pipeline, seeded, visited
from torch import Tensor, nn

from diffusers_geometry import Denoiser, dense_spectrum
from diffusers_geometry.descriptors import local_rank
from diffusers_geometry.dimension import flipd, gap_dim
from diffusers_geometry.stochastic import estimate_trace

sys.path.append(str(ZOO))

from data import DIGIT_NAMES, digits_split
from shared import load_classifier

CONFIDENT = 0.9
COLUMNS = {
    "effective_dimension": "tr D'", "error": "squared error of D / σ²", "flipd": "FLIPD", "clean": "tr D' at the clean image",
    "gap_dim": "gap_dim", "local_rank": "local_rank", "latent effective_dimension": "latents: tr D'",
    "latent flipd": "latents: FLIPD", "latent gap_dim": "latents: gap_dim",
}  # fmt: skip
TIMESTEP, SIGMA = 40, 0.144  # of ddpm-mnist; sd-mnist is taken at the step nearest to this sigma


def digits_by_class(effort: Any) -> dict[int, Tensor]:
    """Generated digits of which the classifier is confident, up to ``per_class`` of each, (n, 1, 32, 32) in [-1, 1]."""
    pipe = pipeline("ddpm-mnist", "linear")
    made = pipe(batch_size=effort.generated, generator=seeded(2), num_inference_steps=effort.steps, output_type="np").images
    images = torch.from_numpy(made).permute(0, 3, 1, 2).float() * 2 - 1
    confidence, label = load_classifier().probabilities(images).max(1)
    return {c: images[(label == c) & (confidence >= CONFIDENT)][: effort.per_class] for c in range(10)}


def class_dimensions(effort: Any) -> dict[int, dict[str, list[float]]]:
    """Per class and column of :data:`COLUMNS`, values over the samples."""
    pipe = pipeline("ddpm-mnist", "linear")
    kept = pipe.scheduler.alphas_cumprod[TIMESTEP].item()
    network = pipe.unet.requires_grad_(False).eval()
    fn = partial(_predict, network, torch.tensor(float(TIMESTEP)))
    denoiser = Denoiser.from_function(fn, alpha_t=math.sqrt(kept), sigma_t=math.sqrt(1 - kept))
    found: dict[int, dict[str, list[float]]] = {c: {name: [] for name in COLUMNS} for c in range(10)}
    for c, images in digits_by_class(effort).items():
        for i, x_0 in enumerate(images):
            for name, value in _pixel_dimensions(denoiser, x_0, 1000 * c + i, effort, i < effort.dense_per_class).items():
                found[c][name].append(value)
    if effort.latent_per_class:
        _add_latent(found, effort)
    return found


def _pixel_dimensions(denoiser: Denoiser, x_0: Tensor, seed: int, effort: Any, dense: bool) -> dict[str, float]:
    """Of one sample: FLIPD where it is clean, the rest where it is noised; gap and nu only from a dense D'."""
    generator, budget = seeded(seed), {"num_products": effort.products, "method": "rademacher"}
    x_t = denoiser.alpha_t * x_0 + denoiser.sigma_t * torch.randn(x_0.shape, generator=generator)
    with torch.no_grad():
        error = (denoiser.denoised(x_t[None])[0] - x_0).norm().item() / denoiser.sigma
    with torch.no_grad():
        moved = (denoiser.denoised(denoiser.alpha_t * x_0[None])[0] - x_0).norm().item() / denoiser.sigma
    value = flipd(denoiser, x_0, generator=generator, **budget).value
    values = {"flipd": value, "clean": value - moved**2, "error": error**2}  # FLIPD = tr D' + |D(x_0) - x_0|² / σ²
    if not dense:
        return values | {"effective_dimension": estimate_trace(denoiser.jacobian(x_t), generator=generator, **budget).value}
    spectrum = dense_spectrum(denoiser.jacobian(x_t))
    rank, gap = local_rank(spectrum).value, gap_dim(spectrum).value
    return values | {"effective_dimension": spectrum.trace.value, "gap_dim": gap, "local_rank": rank}


def _predict(network: nn.Module, timestep: Tensor, x_t: Tensor) -> Tensor:
    return network(x_t, timestep).sample


def _add_latent(found: dict[int, dict[str, list[float]]], effort: Any) -> None:
    """The same in the latents of sd-mnist, whose prompt gives the class, where the samples' own run passes sigma 0.15."""
    pipe = pipeline("sd-mnist")
    position = int(np.abs(np.log(visited(pipe, effort.steps) / SIGMA)).argmin())
    for c, name in enumerate(DIGIT_NAMES):
        prompts = [f"{'an' if name == 'eight' else 'a'} {name}"] * effort.latent_per_class
        options = {"num_inference_steps": effort.steps, "guidance_scale": 1.0, "generator": seeded(3), "progress": False}
        step = pipe.analyze_geometry(prompts, record_steps=[position], spectrum="dense", flipd=True, **options).steps[0]
        for column in ("effective_dimension", "gap_dim", "flipd"):
            found[c][f"latent {column}"] = getattr(step, column).value.tolist()


def class_gaussians() -> np.ndarray:
    """tr C (C + sigma²)^-1 of each class's covariance over the training digits, (10,)."""
    train, sigma = digits_split()[0], SIGMA
    found = []
    for c in range(10):
        eigenvalues = torch.linalg.eigvalsh(train.images[train.labels == c].flatten(1).double().T.cov()).clamp_min(0)
        found.append((eigenvalues / (eigenvalues + sigma**2)).sum().item())
    return np.array(found)


def draw_classes(axes: Axes, classes: dict[int, dict[str, list[float]]]) -> None:
    styles = {
        "effective_dimension": ("^", "#33a02c", "pixels: tr D'"), "error": ("o", "#ff7f00", "pixels: squared error of D / σ²"),
        "latent effective_dimension": ("v", "#b2df8a", "latents: tr D'"), "latent flipd": ("s", "#fdbf6f", "latents: FLIPD"),
    }  # fmt: skip
    for i, (column, (marker, colour, label)) in enumerate(styles.items()):
        shown = [(c, np.array(found[column])) for c, found in classes.items() if found[column]]
        errors = [v.std(ddof=1) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for _, v in shown]
        places, means = [c + 0.12 * (i - 1.5) for c, _ in shown], [v.mean() for _, v in shown]
        axes.errorbar(places, means, errors, fmt=marker, color=colour, markeredgecolor="#555555", label=label)
    axes.set(xlabel="digit", ylabel="dimension", title=f"dimension per class near σ = {SIGMA} (± 1 s.e.)", xticks=range(10))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9, ncols=2)


def class_table(classes: dict[int, dict[str, list[float]]]) -> list[str]:
    lines = ["## Dimension per class", "", "| digit | Gaussian of the class | " + " | ".join(COLUMNS.values()) + " |"]
    lines += ["| --- " * (2 + len(COLUMNS)) + "|"]
    for c, gaussian in enumerate(class_gaussians()):
        cells = ((listed if "gap_dim" in name else mean_error)(classes[c][name]) for name in COLUMNS)
        lines.append(f"| {c} | {gaussian:.0f} | " + " | ".join(cells) + " |")
    count = sum(len(found["error"]) for found in classes.values())
    excess, of_ones = _excess(classes), _excess({1: classes[1]})
    note = (
        f"*{count} samples of ddpm-mnist at σ = {SIGMA} of which the classifier is confident; sd-mnist at the step of its runs "
        "nearest to it. Means over samples ± standard errors, of gap_dim all values; FLIPD at clean samples, the rest at noised "
        "ones but where said. The Gaussian is tr C / (C + σ²) of the class's real digits.*"
    )
    over = f"Squared error over σ² less tr D': {excess} over all samples in pixels, {of_ones} over ones."
    return [*lines, "", note, "", over, ""]


def _excess(classes: dict[int, dict[str, list[float]]]) -> str:
    pairs = [zip(found["error"], found["effective_dimension"], strict=True) for found in classes.values()]
    return mean_error([error - trace for found in pairs for error, trace in found])


def listed(values: list[float]) -> str:
    """All values, ascending."""
    return ", ".join(f"{v:.0f}" for v in sorted(values)) or "no sample"


def mean_error(values: list[float]) -> str:
    """Mean ± standard error, or how few there are."""
    if len(values) < 2:
        return f"{values[0]:.0f} (one sample)" if values else "no sample"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.1f}"
