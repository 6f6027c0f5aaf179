"""Figures drawn from a trace alone; matplotlib is loaded when a figure is asked for, and no global state of it is used."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .storage import write_together

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .comparison import Comparison
    from .trajectory import GeometryTrace
    from .transition_report import TransitionReport

PHASE_COLOURS = {"trivial": "#d9d9d9", "coverage": "#9ecae1", "consolidation": "#fdae6b", "unresolved": "#ffffff"}
_MAP_NAMES = {"denoised": "D'", "score": "score Jacobian", "epsilon": "epsilon Jacobian"}


def plot_trace(trace: GeometryTrace, path: str | os.PathLike | None = None, *, sample: int = 0) -> Figure:
    """Three panels over the run, noise falling from left to right: spectra of D' with the gap, descriptors, phases.

    Args:
        trace: The run.
        path: Where to write the figure (any format of matplotlib, by suffix); not written if None.
        sample: Which sample of the batch.

    Raises:
        ValueError: no such sample.
    """
    from matplotlib.figure import Figure

    batch = len(trace.steps[0].singular_values)
    if not 0 <= sample < batch:
        raise ValueError(f"sample={sample}. Expected 0 <= sample < {batch}.")
    figure = Figure(figsize=(9, 8.5), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(3, 2.2, 0.9), width_ratios=(40, 6))
    spectra = figure.add_subplot(grid[0, 0])
    descriptors = figure.add_subplot(grid[1, 0], sharex=spectra)
    phases = figure.add_subplot(grid[2, 0], sharex=spectra)
    beside, corner = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[2, 1])
    beside.axis("off")
    corner.axis("off")
    _draw_spectra(spectra, beside.inset_axes((0, 0, 0.22, 1)), trace, sample)
    _draw_descriptors(descriptors, trace, sample)
    _draw_phases(phases, trace, sample)
    _draw_image(corner, trace.images, sample)
    names = [trace.settings[name] for name in ("pipeline", "scheduler") if name in trace.settings]
    figure.suptitle(", ".join(names) + ": geometry of the score over one generation", fontsize=12)
    if path is not None:
        write_together(Path(path).parent, {Path(path).name: figure_bytes(figure, path)})
    return figure


def plot_comparison(comparison: Comparison, path: str | os.PathLike | None = None, *, sample: int = 0) -> Figure:
    """Three panels over sigma^2, noise falling to the right: eigenvalues of D', gaps, phases; measured on predicted.

    Args:
        comparison: From :func:`~diffusers_geometry.comparison.compare`; steps at infinite noise are left out.
        path: Where to write the figure; not written if None.
        sample: Which sample of the batch.

    Raises:
        ValueError: no such sample.
    """
    from matplotlib.figure import Figure

    batch = comparison.measured.shape[1]
    if not 0 <= sample < batch:
        raise ValueError(f"sample={sample}. Expected 0 <= sample < {batch}.")
    figure = Figure(figsize=(9, 8.5), layout="constrained")
    values, gaps, phases = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 0.7))
    shown = np.isfinite(comparison.sigmas)
    times = comparison.sigmas[shown] ** 2
    values.plot(times, comparison.predicted[shown], color="#888888", linewidth=0.8)
    values.plot(times, comparison.measured[shown, sample], ".", color="#1f78b4", markersize=3)
    values.plot([], [], color="#888888", label="theory")
    values.plot([], [], ".", color="#1f78b4", label="measured")
    values.set_ylabel("singular values of D'")
    values.legend(loc="upper left", fontsize=9)
    for j, position in enumerate(comparison.gap_positions):
        colour = f"C{j + 1}"
        gaps.plot(times, comparison.predicted_gaps[shown, j], color=colour, linewidth=1.2, label=f"after {position}, theory")
        measured = comparison.measured_gaps[shown, sample, j]
        gaps.plot(times, measured, ".", color=colour, markersize=5, label=f"after {position}, measured")
    gaps.set_ylabel("gap (in units of D')")
    if comparison.gap_positions:
        gaps.legend(loc="upper left", fontsize=9)
    for row, labels in enumerate((comparison.predicted_phases, comparison.measured_phases[:, sample])):
        for t, label in zip(times, labels[shown], strict=True):
            phases.plot(t, row, "s", color=PHASE_COLOURS[str(label)], markeredgecolor="#999999", markersize=7)
    phases.set_yticks((0, 1), ("theory", "measured"))
    phases.set_ylim(-0.6, 1.6)
    phases.set_xscale("log")
    phases.invert_xaxis()
    phases.set_xlabel("noise σ² (generation runs to the right)")
    _phase_legend(phases, np.concatenate([comparison.predicted_phases, comparison.measured_phases[:, sample]]))
    for axes in (values, gaps):
        axes.grid(alpha=0.3)
    figure.suptitle("Measured spectra on the closed form of a linear manifold", fontsize=12)
    if path is not None:
        write_together(Path(path).parent, {Path(path).name: figure_bytes(figure, path)})
    return figure


def plot_transitions(report: TransitionReport, path: str | os.PathLike | None = None) -> Figure:
    """Agreement of clones over sigma with what theory says of it, and where data were given the recall, noise falling to the right.

    Args:
        report: From :func:`~diffusers_geometry.transitions.measure_transitions`; branches at infinite noise are left out.
        path: Where to write the figure; not written if None.
    """
    from matplotlib.figure import Figure

    sigmas = np.array(report.sigmas)
    shown = np.isfinite(sigmas)
    figure = Figure(figsize=(9, 8 if report.recall else 4.8), layout="constrained")
    panels = figure.subplots(2 if report.recall else 1, 1, sharex=True, squeeze=False)[:, 0]
    made = {"clones": "clones", "u_turn": "U-turns"}[report.gesture]
    _draw_estimates(panels[0], sigmas, report.agreement, shown, "#1f78b4", f"measured, {made} (± 2 s.e.)")
    if report.predicted_agreement is not None:
        grid = np.geomspace(sigmas[shown].min(), sigmas[shown].max(), 200)
        panels[0].plot(grid, report.closed_form(grid), color="#333333", linewidth=1, label="closed form of the two classes")
    panels[0].axhline(report.level, color="#999999", linewidth=0.8, linestyle="--")
    if report.speciation is not None:
        _draw_mark(panels[0], report.speciation, "#1f78b4", "speciation")
    if report.top_eigenvalue_sigma is not None:
        _draw_mark(panels[0], report.top_eigenvalue_sigma, "#ff7f00", "√Λ")
    panels[0].set_ylabel("agreement of classes")
    if report.recall:
        _draw_estimates(panels[1], sigmas, report.recall, shown, "#e31a1c", "U-turns that return to their example (± 2 s.e.)")
        _draw_estimates(panels[1], sigmas, report.exact_recall, shown, "#333333", "weight of the example in the exact score")
        for (name, mark), colour in zip(report.collapse.items(), ("#6a3d9a", "#b15928", "#33a02c"), strict=False):
            if mark is not None:
                _draw_mark(panels[1], mark, colour, f"collapse by {name.replace('_', ' ')}")
        panels[1].set_ylabel("share of returns")
    for axes in panels:
        axes.set_ylim(-0.03, 1.05)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right" if axes is panels[0] else "upper left")
    panels[0].set_xscale("log")
    panels[0].invert_xaxis()
    panels[-1].set_xlabel("noise σ (generation runs to the right)")
    names = [report.settings[name] for name in ("pipeline", "scheduler") if name in report.settings]
    figure.suptitle(", ".join(names) + ": where class and example are decided", fontsize=12)
    if path is not None:
        write_together(Path(path).parent, {Path(path).name: figure_bytes(figure, path)})
    return figure


def _draw_estimates(axes: Axes, sigmas: np.ndarray, values: list, shown: np.ndarray, colour: str, label: str) -> None:
    value, sem = (np.array([getattr(e, name) for e in values])[shown] for name in ("value", "sem"))
    axes.errorbar(sigmas[shown], value, 2 * sem, fmt="o-", color=colour, markersize=4, linewidth=0.8, label=label)


def _draw_mark(axes: Axes, mark: Any, colour: str, name: str) -> None:
    """A transition as a line with its error as a band."""
    axes.axvline(mark.value, color=colour, linestyle=":", label=f"{name}: σ = {mark.value:.3g}")
    if mark.sem:
        axes.axvspan(mark.value - mark.sem, mark.value + mark.sem, color=colour, alpha=0.15, linewidth=0)


def _phase_legend(axes: Axes, labels: np.ndarray) -> None:
    """Names the colours of phases above ``axes``; "unresolved" only where it occurs in ``labels``."""
    from matplotlib.patches import Patch

    shown = [phase for phase in PHASE_COLOURS if phase != "unresolved" or (labels == phase).any()]
    patches = [Patch(facecolor=PHASE_COLOURS[phase], edgecolor="#bbbbbb", label=phase) for phase in shown]
    axes.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=9, frameon=False)


def figure_bytes(figure: Figure, path: str | os.PathLike) -> bytes:
    """The figure in the format of the path's suffix."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png", dpi=140)
    return buffer.getvalue()


def _draw_spectra(axes: Axes, colourbar: Axes, trace: GeometryTrace, sample: int) -> None:
    values = np.stack([step.denoised_singular_values[sample] for step in trace.steps], axis=1)  # (k, steps)
    top = max(1.0, float(values.max()))
    image = axes.imshow(
        values, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=top, interpolation="nearest",
        extent=(-0.5, len(trace.steps) - 0.5, 0.5, len(values) + 0.5),
    )  # fmt: skip
    gaps = np.array([step.gap_dim.value[sample] for step in trace.steps])
    certain = np.array([step.denoised_complete or step.gap_dim.converged[sample] for step in trace.steps])
    axes.plot(gaps + 0.5, "o-", color="#e31a1c", markersize=4, linewidth=1.2, label="largest gap")
    if not certain.all():
        places = np.flatnonzero(~certain)
        label = "largest gap in hand"
        axes.plot(places, gaps[places] + 0.5, "o", color="#e31a1c", markersize=5, markerfacecolor="white", label=label)
    axes.legend(loc="upper left", fontsize=9)
    axes.set_ylabel("index of singular value")
    axes.tick_params(labelbottom=False)
    axes.figure.colorbar(image, cax=colourbar, label="singular value of D'")


def _draw_descriptors(axes: Axes, trace: GeometryTrace, sample: int) -> None:
    position = np.arange(len(trace.steps))
    name = _MAP_NAMES.get(trace.settings.get("of", "denoised"), "map")
    handles = [_errorbar(axes, position, [s.local_rank for s in trace.steps], sample, "#1f78b4", "s", f"ν of {name}")]
    if all(s.effective_dimension is not None for s in trace.steps):
        estimates = [s.effective_dimension for s in trace.steps]
        handles.append(_errorbar(axes, position, estimates, sample, "#33a02c", "^", "effective dimension tr D'"))
    axes.set_ylabel("directions")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.tick_params(labelbottom=False)
    right = axes.twinx()
    scaling = [s.local_scaling for s in trace.steps]
    counted = np.array([s.local_scaling_rank[sample] > 0 for s in trace.steps])  # psi of no directions is a sum of nothing
    handles.append(_errorbar(right, position, scaling, sample, "#6a3d9a", "o", f"ψ of {name}", counted))
    right.set_ylabel("ψ (nats)", color="#6a3d9a")
    right.tick_params(axis="y", colors="#6a3d9a")
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=9, frameon=False)
    axes.grid(alpha=0.3)


def _errorbar(
    axes: Axes,
    position: np.ndarray,
    estimates: list,
    sample: int,
    colour: str,
    marker: str,
    label: str,
    shown: np.ndarray | None = None,
) -> Any:
    """Values with their standard errors; hollow markers where the error is not known."""
    value = np.array([e.value[sample] for e in estimates])
    value = np.where(np.isfinite(value) & (True if shown is None else shown), value, np.nan)
    sem = np.array([e.sem[sample] for e in estimates])
    unknown = np.isnan(sem)
    bar = axes.errorbar(
        position, value, yerr=np.nan_to_num(sem), color=colour, marker=marker, markersize=4, linewidth=1.2, label=label
    )
    axes.plot(position[unknown], value[unknown], marker, color=colour, markersize=5, markerfacecolor="white", zorder=3)
    return bar


def _draw_phases(axes: Axes, trace: GeometryTrace, sample: int) -> None:
    rules = (("gap rule", trace.phases_by_gap), ("eigenvalue rule", trace.phases))
    for row, (_, phases) in enumerate(rules):
        colours = [PHASE_COLOURS[str(label)] for label in phases.labels[:, sample]]
        axes.bar(range(len(colours)), 0.86, width=1.0, bottom=row - 0.43, color=colours)
    axes.set_yticks(range(len(rules)), [name for name, _ in rules])
    axes.set_xlim(-0.5, len(trace.steps) - 0.5)
    shown = range(0, len(trace.steps), math.ceil(len(trace.steps) / 12))
    axes.set_xticks(shown, [_sigma_label(trace.sigmas[i]) for i in shown])
    axes.set_xlabel("noise σ at the recorded steps (generation runs to the right)")
    _phase_legend(axes, np.concatenate([phases.labels for _, phases in rules]))


def _sigma_label(sigma: float) -> str:
    return ("∞" if math.isinf(sigma) else f"{sigma:.0f}") if sigma >= 100 else f"{sigma:.2g}"


def _draw_image(axes: Axes, images: Any, sample: int) -> None:
    """The generated image, where the run has made one that can be shown."""
    if not isinstance(images, (list, np.ndarray)) or sample >= len(images):
        return
    image = np.squeeze(np.asarray(images[sample]))
    if image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4)):
        axes.imshow(image, cmap="gray")
        axes.set_title("sample", fontsize=9)
