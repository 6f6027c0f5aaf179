"""Reproduce the linear manifolds of arXiv:2410.05898: spectra, gaps and phases in closed form, of the exact and of trained scores.

python examples/reproduce/linear_manifold.py        # about a minute of one core; figures and tables in results/
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import parse, took
from labour import labour, labour_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffusers_geometry import GeometryTrace, dense_spectrum, record
from diffusers_geometry.exact import LinearManifoldDenoiser
from diffusers_geometry.selfcheck import exact_network
from diffusers_geometry.step_geometry import StepGeometry
from diffusers_geometry.theory import LinearManifold

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "zoo"))

from load import load_basis, load_zoo  # noqa: E402
from train_linear_manifold import KEPT_STEPS, VARIANCES  # noqa: E402

VERDICT = """\
The trained spectra follow the closed form over the whole generation, with its phases, its order of gaps (that of the larger
variance first) and its division of labour: the distance to the manifold stays that of the noise, and the score turns to the
normal space as the noise falls, while the variances inside have settled. Below σ = 3 they are off by 4 to 7 %, where samples of
the exact score are off by 3 to 6 % and 1,000 draws alone by 4 %; at the largest noise they are off by 10 and 27 %. What does
not agree: gaps of one F at d = 100 are wider than the law's for d → ∞, in the exact score as in the trained one, and as in
other draws of F, because extreme eigenvalues lie inside the edges; and the trained final gap stays short of one at the
smallest noise, the more so the shorter the training. Where two gaps are nearly equal (σ² near 0.3, and above 10) Algorithm 1,
whose values sampling spreads, names another one than dense D' and Algorithm 2 do. After 100 and 300 steps of training the
network keeps every direction at low noise, which the rule calls consolidation too; after more, some directions are neither
kept nor dropped. All trained figures are of one network and one run each, and have no error bars."""
MARKERS = {"dense D'": "o", "Algorithm 1": "^", "Algorithm 2": "x"}
GAPS = {"linear-manifold": (40,), "linear-manifold-two-variances": (20, 40)}


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    steps: int = 60
    draws: int = 200
    samples: int = 1000
    kept: tuple[int, ...] = KEPT_STEPS
    algorithm_levels: int = 12


SMOKE = Effort(steps=8, draws=5, samples=50, kept=(100, 10000), algorithm_levels=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def theory_of(name: str) -> LinearManifold:
    return LinearManifold(0.4, sorted(set(VARIANCES[name])))


def pipeline(name: str, training_step: int | None = None, exact: bool = False) -> Any:
    pipe = load_zoo(name, training_step)
    pipe.set_progress_bar_config(disable=True)
    if exact:
        pipe.network = exact_network(LinearManifoldDenoiser(load_basis(name).double()), pipe.scheduler, like=pipe.network)
    return pipe


def analyse(pipe: Any, steps: int, **options: Any) -> GeometryTrace:
    options = {"record_steps": "all", "progress": False, "num_inference_steps": steps} | options
    return pipe.analyze_geometry(1, seeded(), **options)


def gaps_of(trace: GeometryTrace, position: int) -> np.ndarray:
    values = np.stack([step.denoised_singular_values[0] for step in trace.steps])
    return values[:, position - 1] - values[:, position]


def algorithms(name: str, effort: Effort) -> list[tuple[float, dict[str, StepGeometry]]]:
    """(sigma, the step by each estimator) over the noise; Algorithm 1 around the final sample, Algorithm 2 and dense at x_t."""
    pipe, levels = pipeline(name), {}
    asked = {"record_steps": effort.algorithm_levels}
    for label, method in zip(MARKERS, ("dense", "perturbation", "central_difference"), strict=True):
        for step in analyse(pipe, effort.steps, spectrum=method, **asked).steps:
            levels.setdefault(step.sigma, {})[label] = step
    return sorted(levels.items(), reverse=True)


def draw(name: str, traces: dict[str, GeometryTrace], found: dict[str, Any], effort: Effort) -> Figure:
    """Nine panels: law, density of D', spectra; gaps, algorithms, dimensions; training, division of labour, eigenvalues."""
    figure = Figure(figsize=(15, 12.5), layout="constrained")
    law, density, spectra, gaps, methods, dims, training, shares, eigen = figure.subplots(3, 3).ravel()
    times = traces["trained"].sigmas ** 2
    _draw_laws(law, density, name, effort, traces["trained"])
    comparison = traces["trained"].compare(theory_of(name))
    spectra.plot(times, comparison.predicted, color="#888888", linewidth=0.7)
    spectra.plot(times, traces["exact"].compare(theory_of(name)).measured[:, 0], "x", color="#33a02c", markersize=2)
    spectra.plot(times, comparison.measured[:, 0], ".", color="#1f78b4", markersize=2)
    for style, colour, label in (("-", "#888888", "closed form"), ("x", "#33a02c", "exact score"), (".", "#1f78b4", "trained")):
        spectra.plot([], [], style, color=colour, label=label)
    spectra.set(ylabel="singular values of D'", title="spectra over the generation")
    for position, colour in zip(GAPS[name], ("#ff7f00", "#e31a1c"), strict=False):
        j = comparison.gap_positions.index(position)
        gaps.plot(times, comparison.predicted_gaps[:, j], color=colour, label=f"after {position}: closed form")
        gaps.plot(times, gaps_of(traces["exact"], position), "--", color=colour, label="exact score of this F")
        gaps.plot(times, gaps_of(traces["trained"], position), ".", color=colour, label="trained")
    gaps.set(ylabel="gap in units of D'", title="gaps")
    sigma, steps = min(found["algorithms"], key=lambda level: abs(np.log(level[0] ** 2 / 0.1)))
    for (label, marker), colour in zip(MARKERS.items(), ("#1f78b4", "#ff7f00", "#33a02c"), strict=True):
        methods.plot(np.arange(1, 101), steps[label].denoised_singular_values[0], marker, color=colour, markersize=4, label=label)
        dimensions = [by_label[label].gap_dim.value[0] for _, by_label in found["algorithms"]]
        dims.plot([s**2 for s, _ in found["algorithms"]], dimensions, marker, color=colour, label=label, alpha=0.8)
    methods.set(xlabel="index", ylabel="singular values of D'", title=f"Algorithms 1 and 2 beside dense, σ² = {sigma**2:.2g}")
    dims.axhline(40, color="#888888", linewidth=0.8)
    dims.set(ylabel="position of the largest gap", title="dimension by the largest gap")
    for i, (step, trace) in enumerate(found["training"].items()):
        for position, style in zip(GAPS[name][::-1], ("-", ":"), strict=False):
            label = f"{step:,} steps" if position == 40 else None
            training.plot(trace.sigmas**2, gaps_of(trace, position), style, color=f"C{i}", label=label)
    dotted = " (dotted: after 20)" if 20 in GAPS[name] else ""
    training.set(ylabel="gap in units of D'", title="gap after 40 over the training" + dotted)
    for label, colour, width in (("exact", "#33a02c", 3.5), ("trained", "#1f78b4", 1.2)):
        run = found["labour"][label]
        shares.plot(
            run["sigma"] ** 2, run["normal_share"], color=colour, linewidth=width, label=f"|score|² in the normal space, {label}"
        )
        shares.plot(
            run["sigma"] ** 2, run["variance_error"], "--", color=colour, linewidth=width, label=f"error of variances, {label}"
        )
    run = found["labour"]["trained"]
    shares.plot(
        run["sigma"] ** 2, run["distance"] / run["distance"].max(), color="#888888", label="distance to the manifold, relative"
    )
    shares.set(ylabel="share", title="who works when", ylim=(-0.03, 1.75))
    for sigma, values, singular in found["eigenvalues"]:
        eigen.plot(values, singular, ".", markersize=4, label=f"σ² = {sigma**2:.2g}")
    eigen.plot([0, 1], [0, 1], color="#888888", linewidth=0.7)
    eigen.set(
        xlabel="eigenvalues of the symmetric part of D'", ylabel="singular values of D'", title="eigenvalues beside singular values"
    )
    for axes in (spectra, gaps, dims, training, shares):
        axes.set(xscale="log", xlabel="noise σ² (generation runs to the right)")
        axes.set_xlim(times.max() * 1.3, times.min() / 1.3)
    for axes in figure.axes:
        axes.legend(fontsize=7.5, loc="upper center" if axes is shares else "best")
    figure.suptitle(f"{name}: x_0 = F z, d = 100, m = 40", fontsize=13)
    return figure


def cumulative(theory: LinearManifold, eigenvalues: np.ndarray) -> np.ndarray:
    """Share of all d eigenvalues of F F^T between zero, exclusive, and each of ``eigenvalues``: the integral of the density."""
    angles, total = np.linspace(0, math.pi, 4001), np.zeros(len(eigenvalues))
    for (low, high), mass in zip(theory.bulk_edges(), theory.bulk_masses(), strict=True):
        places = (low + high) / 2 - (high - low) / 2 * np.cos(angles)  # close at the edges, where the density is a square root
        heights = theory.density(places) * np.sin(angles)
        below = np.append(0.0, np.cumsum((heights[1:] + heights[:-1]) / 2))
        total += mass * np.interp(eigenvalues, places, below / below[-1])
    return total


def _draw_laws(law: Axes, density: Axes, name: str, effort: Effort, trained: GeometryTrace) -> None:
    """Eigenvalues of many draws of F F^T and of their D' at three noise levels, on the theory's share of every bin."""
    theory, draws = theory_of(name), torch.cat([_eigenvalues(name, seed) for seed in range(effort.draws)]).numpy()
    weights = np.full(len(draws), 0.4 / len(draws))
    edges = np.logspace(np.log10(draws.min() / 1.3), np.log10(draws.max() * 1.3), 60)
    law.hist(draws, edges, weights=weights, color="#9ecae1", label=f"{effort.draws} draws of F, d = 100")
    grid = np.sqrt(edges[1:] * edges[:-1])
    law.plot(grid, np.diff(cumulative(theory, edges)), color="#08306b", label="law for d → ∞")
    law.set(xscale="log", xlabel="eigenvalue of F Fᵀ", ylabel="share of all a bin", title="eigenvalues of F Fᵀ (and 60 % zeros)")
    bins = np.linspace(0, 1, 61)
    for t, colour in ((5.0, "#9ecae1"), (0.6, "#fdae6b"), (0.05, "#a1d99b")):
        density.hist(draws / (draws + t), bins, weights=weights, color=colour, alpha=0.8, label=f"σ² = {t:g}")
        ends = np.append(t * bins[:-1] / (1 - bins[:-1]), np.inf)
        density.stairs(np.diff(cumulative(theory, ends)), bins, color="#333333", linewidth=0.9)
        step = min(trained.steps, key=lambda s: abs(math.log(s.sigma**2 / t)))
        values = step.denoised_singular_values[0][:40]
        density.hist(values, bins[::4], weights=np.full(40, 0.01 / 4), histtype="step", color=colour, linewidth=1.6, linestyle=":")
    density.plot([], [], color="#333333", label="law for d → ∞")
    density.plot([], [], ":", color="#777777", label="trained, the 40 largest of one D' (wider bins)")
    density.set(xlabel="eigenvalue of D'", ylabel="share of all a bin", title="density of D' (and 60 % zeros)")


def eigenvalues_of(name: str, effort: Effort) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """(sigma, eigenvalues of the symmetric part, singular values) of the trained D' at three noise levels."""
    pipe, found = pipeline(name), []
    with record(pipe, [effort.steps // 4, effort.steps // 2, 3 * effort.steps // 4]) as recording:
        pipe(1, seeded(), num_inference_steps=effort.steps)
    for step in recording:
        spectrum = dense_spectrum(step.denoiser.jacobian(step.sample[0]))
        found.append((step.sigma, spectrum.eigenvalues.numpy(), spectrum.singular_values.numpy()))
    return found


def _eigenvalues(name: str, seed: int) -> Tensor:
    scale = torch.tensor(VARIANCES[name]).sqrt() / 40**0.5
    basis = torch.randn(100, 40, generator=seeded(seed)) * scale
    return torch.linalg.eigvalsh(basis.T @ basis)


def widest_gaps(name: str, position: int, times: np.ndarray, draws: int) -> np.ndarray:
    """Of many draws of F, the widest gap of D' after ``position`` directions over the noise, (draws,)."""
    found = []
    for seed in range(draws):
        values = _eigenvalues(name, seed).flip(0).numpy()
        shares = values[:, None] / (values[:, None] + times)
        found.append((shares[position - 1] - shares[position]).max())
    return np.array(found)


def report(name: str, traces: dict[str, GeometryTrace], found: dict[str, Any], effort: Effort) -> str:
    """The table of one manifold, and what agrees."""
    theory, times, of_draws = theory_of(name), traces["exact"].sigmas ** 2, ""
    lines = [f"## {name}", "", "| figure | closed form | exact score of this F | trained |", "| --- | --- | --- | --- |"]

    def row(label: str, closed: str, cells: dict[str, str]) -> None:
        lines.append(f"| {label} | {closed} | {cells['exact']} | {cells['trained']} |")

    rms = {label: float(np.sqrt((trace.compare(theory).residuals ** 2).mean())) for label, trace in traces.items()}
    row("rms residual of the singular values of D'", "0", {label: f"{value:.4f}" for label, value in rms.items()})
    for position in GAPS[name]:
        gaps = {label: gaps_of(trace, position) for label, trace in traces.items()}
        opening = theory.final_gap_opening()
        if position == 20:
            ((_, opening),), (peak,), (at,) = theory.gap_window(), theory.gap_peaks(), theory.gap_peak_times()
            widest = {label: f"{values.max():.3f} at {times[values.argmax()]:.2f}" for label, values in gaps.items()}
            row("widest gap after 20, at σ²", f"{peak:.3f} at {at:.2f}", widest)
            spread = widest_gaps(name, 20, times, effort.draws)
            of_draws = (
                f"Widest gap after 20 of {effort.draws} draws of F at d = 100: {spread.mean():.3f} ± {spread.std(ddof=1):.3f} "
            )
            of_draws += "(mean and standard deviation)."
        opened = {label: _first_above(times, values) for label, values in gaps.items()}
        row(f"σ² below which the gap after {position} exceeds 0.1", f"{opening:.2f}", opened)
    for which, label in (
        ("trivial_boundary", "trivial phase ends at σ²"),
        ("consolidation_boundary", "consolidation starts at σ²"),
    ):
        pairs = {key: getattr(trace.phases, which)[0] for key, trace in traces.items()}
        cells = {key: "not met" if p is None else f"{p[1] ** 2:.3g} .. {p[0] ** 2:.3g}" for key, p in pairs.items()}
        row(label, f"{theory.phase_times()[which == 'trivial_boundary']:.3g}", cells)
    last = {label: f"{run['normal_share'][-1]:.4f}" for label, run in found["labour"].items()}
    row("share of the squared score in the normal space at the smallest σ", "1", last)
    (low, low_sd), (high, high_sd) = theory.edge_fluctuations(100)[0][0], theory.edge_fluctuations(100)[-1][1]
    extremes = LinearManifoldDenoiser(load_basis(name).double()).variances.sort().values[[0, -1]].tolist()
    lines += ["", f"Extreme eigenvalues of this F Fᵀ: {extremes[0]:.3f} and {extremes[1]:.3f}; Tracy and Widom's law expects "
              f"{low:.3f} ± {low_sd:.3f} and {high:.3f} ± {high_sd:.3f}, the edges are {theory.bulk_edges()[0][0]:.3f} and "
              f"{theory.bulk_edges()[-1][1]:.3f}. {of_draws}".rstrip(), ""]  # fmt: skip
    lines += labour_table(found["labour"], effort.samples)
    middle = traces["trained"].steps[len(times) // 2]
    apart = max(np.abs(values - singular).max() for _, values, singular in found["eigenvalues"])
    lines += [f"Asymmetry of the trained D' at σ = {middle.sigma:.2f}: {middle.asymmetry[0]:.4f}; its eigenvalues and singular "
              f"values differ by at most {apart:.4f}.", ""]  # fmt: skip
    lines += ["| σ² | " + " | ".join(MARKERS) + " |", "| --- " * (1 + len(MARKERS)) + "|"]
    for sigma, by_label in found["algorithms"]:
        lines.append(f"| {sigma**2:.3g} | " + " | ".join(f"{by_label[label].gap_dim.value[0]:.0f}" for label in MARKERS) + " |")
    lines += ["", "*Position of the largest gap, by each estimator.*", ""]
    over = [f"{gaps_of(trace, 40).max():.2f} after {step:,}" for step, trace in found["training"].items()]
    lines += [f"Largest gap after 40 over the training (steps): {', '.join(over)}.", ""]
    begun = [f"{_consolidation(trace)} after {step:,}" for step, trace in found["training"].items()]
    lines += [f"Consolidation starts below σ² over the training: {', '.join(begun)}.", ""]
    sums = [f"{trace.steps[-1].effective_dimension.value[0]:.1f} after {step:,}" for step, trace in found["training"].items()]
    lines += [f"tr D' at the smallest σ over the training, of 40: {', '.join(sums)}.", ""]
    return "\n".join(lines)


def _consolidation(trace: GeometryTrace) -> str:
    pair = trace.phases.consolidation_boundary[0]
    return "not met" if pair is None else f"{pair[0] ** 2:.3g}"


def _first_above(times: np.ndarray, values: np.ndarray) -> str:
    above = times[values >= 0.1]
    return f"{above.max():.2f}" if len(above) else "never"


def main() -> None:
    output, smoke = parse(__doc__)
    effort = SMOKE if smoke else Effort()
    text = ["# Linear manifolds", "", f"Written by `examples/reproduce/linear_manifold.py`. {VERDICT}", ""]
    for name in GAPS:
        traces = {"trained": analyse(pipeline(name), effort.steps), "exact": analyse(pipeline(name, exact=True), effort.steps)}
        manifold = LinearManifoldDenoiser(load_basis(name).double())
        kept = {step: analyse(pipeline(name, step), effort.steps) for step in effort.kept}
        found = {
            "algorithms": algorithms(name, effort), "eigenvalues": eigenvalues_of(name, effort),
            "training": kept | {30_000: traces["trained"]},
            "labour": {
                label: labour(pipeline(name, exact=label == "exact"), manifold, effort.samples, effort.steps) for label in traces
            },
        }  # fmt: skip
        draw(name, traces, found, effort).savefig(output / f"{name}.png", dpi=90)
        text += [f"![{name}]({name}.png)", "", report(name, traces, found, effort)]
    text += [took(), ""]
    (output / "linear_manifold.md").write_text("\n".join(text))
    print(output / "linear_manifold.md")


if __name__ == "__main__":
    main()
