"""The figures of a report as PNG, for model cards and slides: spectra, descriptors, memorisation, ROC; those that a folder has."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..viz import PHASE_COLOURS, figure_bytes
from .document import QUANTITIES, Source, thinned
from .spectra import places, quantiles
from .text import interval, noise, shortened, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = ("spectra.png", "descriptors.png", "memorisation.png", "roc.png")
COLOURS = ("#1f78b4", "#33a02c", "#6a3d9a", "#e31a1c")
_MARKERS = ("o", "s", "^", "D")


def figures(source: Source) -> dict[str, bytes]:
    """File name to PNG of every figure that the folder has numbers for."""
    source = thinned(source)
    document = source.document
    drawn = dict(zip(FIGURES, (_spectra(source), _descriptors(document), _ranking(document), _roc(document)), strict=True))
    return {name: figure_bytes(figure, name) for name, figure in drawn.items() if figure is not None}


def _spectra(source: Source) -> Figure | None:
    """Median spectra, one line a recorded step, dark for much noise."""
    if not np.isfinite(source.spectra).any():
        return None
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    places_shown = places(source.spectra.shape[2])
    middle, _, _ = quantiles(source.spectra[:, :, places_shown])
    steps = source.document["steps"]
    shown = [i for i in range(len(steps)) if np.isfinite(middle[i]).any()]
    labelled = set(np.array(shown)[np.unique(np.linspace(0, len(shown) - 1, min(8, len(shown))).round().astype(int))].tolist())
    for place, i in enumerate(shown):
        colour = colormaps["viridis"](0.92 * place / max(len(shown) - 1, 1))
        label = f"σ = {noise(steps[i]['sigma'])}" if i in labelled else None
        axes.plot(places_shown + 1, middle[i], color=colour, linewidth=1.5, label=label)
    axes.set_xlabel("index of singular value")
    axes.set_ylabel("singular value (median over runs)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)
    return figure


def _descriptors(document: dict[str, Any]) -> Figure | None:
    """Counts of directions, psi, and phases over the run."""
    geometry, sigmas = document["geometry"], [step["sigma"] for step in document["steps"]]
    if not geometry:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.2), layout="constrained")
    counts, volume, phases = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 0.9))
    _draw(counts, geometry, ("nu", "effective_dimension", "gap_dim"))
    counts.set_ylabel("directions")
    counts.set_ylim(bottom=min(0.0, counts.get_ylim()[0]))
    counts.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=9, frameon=False)
    _draw(volume, geometry, ("psi",))
    volume.set_ylabel("ψ (nats)")
    below = np.zeros(len(geometry))
    for name, colour in PHASE_COLOURS.items():
        share = np.array([100 * ((g.get("phases") or {}).get(name) or 0.0) for g in geometry])
        if share.any() or name != "unresolved":
            phases.bar(range(len(geometry)), share, bottom=below, width=0.9, color=colour, edgecolor="#999999", label=name)
        below += share
    phases.set_ylabel("runs (%)")
    phases.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=9, frameon=False)
    every = range(0, len(sigmas), math.ceil(len(sigmas) / 12))
    phases.set_xticks(every, [noise(sigmas[i]) for i in every])
    phases.set_xlabel("noise σ at the recorded steps (generation runs to the right)")
    return figure


def _draw(axes: Axes, geometry: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """Means over units with one standard error."""
    headings = {name: heading for name, heading, _ in QUANTITIES}
    for name, colour, marker in zip(names, COLOURS, _MARKERS, strict=False):
        value, sem = (np.array([_number(g, name, key) for g in geometry], dtype=float) for key in ("value", "sem"))
        if np.isfinite(value).any():
            axes.errorbar(range(len(value)), value, np.nan_to_num(sem), color=colour, marker=marker, markersize=4, linewidth=1.2,
                          label=headings[name])  # fmt: skip
    axes.grid(alpha=0.3)


def _number(geometry: dict[str, Any], name: str, key: str) -> float:
    value = (geometry.get(name) or {}).get(key)
    return math.nan if value is None else value


def _ranking(document: dict[str, Any]) -> Figure | None:
    """Combined score over rank."""
    prompts = [p for p in document["prompts"] if p.get("rank") is not None and (p.get("combined") or {}).get("value") is not None]
    if not prompts:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    labelled = any(p.get("label") is not None for p in prompts)
    groups = (
        [
            ("known to be memorised", "#e31a1c", "D", True),
            ("known not to be memorised", "#33a02c", "s", False),
            ("not known", "#1f78b4", "o", None),
        ]
        if labelled
        else [("flagged", "#e31a1c", "D", True), ("not flagged", "#1f78b4", "o", False)]
    )
    for name, colour, marker, of in groups:
        mine = [p for p in prompts if (p.get("label") if labelled else bool(p.get("flagged"))) is of]
        if mine:
            value, sem = ([p["combined"].get(key) or 0.0 for p in mine] for key in ("value", "sem"))
            axes.errorbar([p["rank"] for p in mine], value, sem, fmt=marker, color=colour, markersize=4, linewidth=1, label=name)
    threshold = ((document["memorization"] or {}).get("combined") or {}).get("threshold")
    if threshold is not None:
        axes.axhline(threshold, color="#666666", linestyle="--", linewidth=1, label="flagged above")
    axes.set_xlabel("rank of the prompt (1 is most suspicious)")
    axes.set_ylabel("combined score (± 1 s.e. over seeds)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure


def _roc(document: dict[str, Any]) -> Figure | None:
    """Of the combined score and the three best single ones."""
    found = document["memorization"] or {}
    scores = [s for s in found.get("scores") or [] if s.get("roc") and (s.get("auroc") or {}).get("value") is not None]
    wanted = sorted(scores, key=lambda s: -s["auroc"]["value"])[:3]
    combined = found.get("combined") or {}
    if combined.get("roc"):
        wanted.insert(0, {"name": "all scores combined", **combined})
    if not wanted:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.plot((0, 1), (0, 1), color="#999999", linestyle="--", linewidth=1)
    for score, colour in zip(wanted, COLOURS, strict=False):
        name = shortened(words(score["name"]), 40).replace("$", r"\$")  # between two of these matplotlib reads TeX
        label = f"{name}: {interval(score.get('auroc'))}"
        axes.plot(score["roc"]["fpr"], score["roc"]["tpr"], color=colour, linewidth=1.5, label=label)
    axes.set_xlabel("share of false alarms")
    axes.set_ylabel("share of memorised prompts found")
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8, title="AUROC")
    return figure
