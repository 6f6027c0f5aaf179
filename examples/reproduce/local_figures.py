"""The figures of the study of images."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from delta_stability import COMPARED_K, RADII, between_all, settings_of, stability
from local_probe import DESCRIPTORS, RADIUS
from local_tables import SIMPLE, named
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from resampling import interval, spearman

PAIRED = (*DESCRIPTORS, *SIMPLE)
COLOURS = ("#1f78b4", "#d95f02", "#1b9e77", "#7570b3")
SHEET = 28  # images in a row
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)


def draw_pairs(measured: dict[str, Any]) -> Figure:
    """Every score of the generated images against every other, their own distributions, and rank correlations."""
    scores = measured["generated"].scores
    figure = Figure(figsize=(15, 14))
    panels = figure.subplots(len(PAIRED), len(PAIRED))
    figure.subplots_adjust(left=0.055, right=0.99, bottom=0.05, top=0.96, wspace=0.1, hspace=0.1)
    for i, row in enumerate(PAIRED):
        for j, column in enumerate(PAIRED):
            axes = panels[i, j]
            if i == j:
                axes.hist(scores[row], bins=30, color="#888888")
                axes.set_yticks([])
            elif i > j:
                axes.plot(scores[column], scores[row], ".", color=COLOURS[0], markersize=2, alpha=0.5)
            else:
                say_correlation(axes, scores[row], scores[column])
            if i < len(PAIRED) - 1 or j > i:
                axes.set_xticklabels([])
            if j > 0 or i == j:
                axes.set_yticklabels([])
            axes.tick_params(labelsize=8)
            axes.locator_params(nbins=4)
    for i, name in enumerate(PAIRED):
        panels[-1, i].set_xlabel(UNITS[name], fontsize=9.5)
        panels[i, 0].set_ylabel(UNITS[name], fontsize=9.5)
    figure.suptitle(f"{len(scores['psi']):,} generated digits: joint distribution, and Spearman's correlation with 95 % interval")
    return figure


UNITS = {
    "psi": "ψ (nats)",
    "nu": "ν (directions)",
    "delta": "δ (share of knots)",
    "variation": "relative change of D'",
    "file size": "file size (bytes)",
    "edge density": "edge density (per pixel)",
    "denoising error": "denoising error",
}


def say_correlation(axes: Axes, first: np.ndarray, second: np.ndarray) -> None:
    found = interval(spearman, first, second)
    colour = "#b2182b" if found.value > 0 else "#2166ac"
    axes.set_facecolor((*[1 - abs(found.value) * (1 - c) for c in ((0.94, 0.54, 0.38) if found.value > 0 else (0.4, 0.66, 0.81))],))
    axes.text(0.5, 0.6, f"{found.value:+.2f}", ha="center", va="center", transform=axes.transAxes, fontsize=15, color="black")
    axes.text(0.5, 0.3, f"[{found.low:+.2f}, {found.high:+.2f}]", ha="center", va="center", transform=axes.transAxes, fontsize=9)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(colour)


def draw_sheet(measured: dict[str, Any]) -> Figure:
    """Lowest, middle and highest images by each score, a row of each."""
    made = measured["generated"]
    orders = {"ψ": made.scores["psi"], "reward": measured["reward"]} | {
        named(s): made.scores[s] for s in ("nu", "delta", "variation", "file size")
    }
    count = min(SHEET, len(made.images) // 3)
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(len(orders), 1), orders.items(), strict=True):
        order = np.argsort(values, kind="stable")
        middle = (len(order) - count) // 2
        side = made.images.shape[-1]
        sheet = np.full((3 * (side + 1) - 1, count * (side + 1) - 1), np.nan)  # nothing between images
        for i, chosen in enumerate((order[:count], order[middle : middle + count], order[-count:])):
            for j, image in enumerate(made.images[chosen.copy(), 0].numpy()):
                sheet[i * (side + 1) : i * (side + 1) + side, j * (side + 1) : j * (side + 1) + side] = image
        axes.imshow(sheet, cmap=matplotlib.colormaps["gray"].with_extremes(bad="#7fb2d9"), vmin=-1, vmax=1)
        axes.set_yticks([(side + 1) * i + side / 2 - 0.5 for i in range(3)], ["lowest", "middle", "highest"], fontsize=9)
        axes.set_xticks([])
        axes.set_title(f"ranked by {name}", fontsize=11, loc="left")
    return figure


def draw_delta(measured: dict[str, Any]) -> Figure:
    """Knots met over the radius, and how far rankings agree over radii and over k."""
    figure = Figure(figsize=(16, 4.6), layout="constrained")
    met, radii, over_k, matrix = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.05))
    for colour, (name, sweep) in zip(COLOURS, measured["radii"].items(), strict=False):
        settings = settings_of(sweep)
        means = np.array([own.mean(1) for own in settings])
        label = f"{name}, {means.shape[1]} images"
        met.errorbar(RADII, means.mean(1), means.std(1, ddof=1), fmt="o-", color=colour, capsize=3, label=label)
        agreement(radii, RADII, settings, RADII.index(RADIUS), colour, name)
    met.set(xscale="log", yscale="log", xlabel="radius / √d", ylabel="δ, share of knots met", title="mean ± s.d. over images")
    radii.set(xscale="log", xlabel="radius / √d", title=f"agreement with radius {RADIUS:g} √d")
    for axis in (met.xaxis, radii.xaxis):
        axis.set_ticks(RADII, [f"{r:g}" for r in RADII], fontsize=8)
        axis.set_ticks([], minor=True)
    met.yaxis.set_ticks(SHARES, [f"{s:g}" for s in SHARES])
    met.yaxis.set_ticks([], minor=True)
    counts = list(measured["directions"])
    settings = [settings_of(s)[0] for s in measured["directions"].values()]
    agreement(over_k, counts, settings, counts.index(COMPARED_K), COLOURS[0], "digits")
    over_k.set_xscale("log", base=2)
    over_k.set_xticks(counts, [f"{k}" + ("\n(axes)" if k == max(counts) else "") for k in counts])
    over_k.set(xlabel="directions k", title=f"agreement with k = {COMPARED_K}")
    for axes in (radii, over_k):
        axes.set(ylabel="Spearman of the rankings of images", ylim=(min(0.5, axes.get_ylim()[0]), 1.02))
    for axes in (met, radii, over_k):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    found = between_all(settings_of(measured["radii"]["digits"]))
    image = matrix.imshow(found, vmin=0, vmax=1, cmap="Blues")
    for (i, j), value in np.ndenumerate(found):
        matrix.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color="white" if value > 0.6 else "black")
    labels = [f"{r:g}" for r in RADII]
    matrix.set_xticks(range(len(RADII)), labels, fontsize=8)
    matrix.set_yticks(range(len(RADII)), labels, fontsize=8)
    matrix.set(xlabel="radius / √d", ylabel="radius / √d", title="digits: Spearman between radii")
    figure.colorbar(image, ax=matrix, shrink=0.8)
    return figure


def agreement(axes: Axes, at: Any, settings: list[np.ndarray], reference: int, colour: str, name: str) -> None:
    """Rank correlation with a reference setting, with its interval; dotted, between halves of the draws of one setting."""
    found = stability(settings, reference)
    values = np.array([[own.value, own.low, own.high] for own, _ in found]).T
    bars = np.abs(values[1:] - values[0])
    axes.errorbar(at, values[0], bars, fmt="o-", color=colour, capsize=3, label=f"{name}, 95 % interval")
    drawn = [i for i, own in enumerate(settings) if own.shape[1] > 1]
    axes.plot([at[i] for i in drawn], [found[i][1] for i in drawn], ":", color=colour, label=f"{name}, between halves of the draws")


def draw_separation(measured: dict[str, Any]) -> Figure:
    """Distributions of the descriptors over sets of emoji; areas under ROC of every score for every corruption."""
    sets = measured["emoji"] if measured.get("compared") else {}
    figure = Figure(figsize=(15, 9 if sets else 5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(0.8, 1)) if sets else (None, figure.subfigures(1, 1))
    for axes, name in zip(top.subplots(1, len(DESCRIPTORS)) if sets else (), DESCRIPTORS, strict=False):
        for colour, (group, own) in zip(COLOURS, sets.items(), strict=False):
            values = np.sort(own.scores[name])
            axes.step(values, np.arange(1, len(values) + 1) / len(values), color=colour, label=group)
        axes.set(xlabel=UNITS[name], ylabel="share of images below" if name == "psi" else None, ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    if sets:
        top.suptitle("one group of emoji against all groups: cumulative distributions")
    found = measured["separation"]
    scores = list(next(iter(found.values())).areas)
    areas = np.array([[result.areas[s].value for s in scores] for result in found.values()])
    axes = bottom.subplots(1, 1)
    image = axes.imshow(areas, vmin=0, vmax=1, cmap="RdYlBu", aspect="auto")
    for i, result in enumerate(found.values()):
        for j, score in enumerate(scores):
            own = result.areas[score]
            text, colour = f"{own.value:.2f}\n[{own.low:.2f}, {own.high:.2f}]", "white" if abs(own.value - 0.5) > 0.4 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=8.5, color=colour)
    axes.axvline(sum(s in DESCRIPTORS for s in scores) - 0.5, color="black", linewidth=2)
    axes.set_xticks(range(len(scores)), [named(s) for s in scores])
    axes.set_yticks(range(len(found)), list(found))
    axes.set_title("digits: area under the ROC curve, direction chosen on other images (left descriptors, right baselines)")
    bottom.colorbar(image, ax=axes, shrink=0.8)
    return figure
