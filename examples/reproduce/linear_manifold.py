"""Reproduce the linear manifolds of arXiv:2410.05898: spectra, gaps and phases in closed form, of the exact and of trained scores.

python examples/reproduce/linear_manifold.py        # about two minutes on two cores; figures and tables in results/
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import parse
from matplotlib.figure import Figure
from torch import Tensor

from diffusers_geometry import GeometryTrace, record
from diffusers_geometry.exact import LinearManifoldDenoiser
from diffusers_geometry.selfcheck import exact_network
from diffusers_geometry.theory import LinearManifold

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "zoo"))

from load import load_basis, load_zoo  # noqa: E402
from train_linear_manifold import KEPT_STEPS, VARIANCES  # noqa: E402

VERDICT = """The trained spectra follow the closed form over the whole
generation, with its phases, its order of gaps (the one of the larger variance first) and its division of labour. What does not
agree: gaps of one F at d = 100 are wider than the law's for d → ∞, because extreme eigenvalues lie inside the edges by a few
Tracy-Widom deviations, in the exact score as in the trained one; and the trained final gap stays short of one at the smallest
noise, the more so the shorter the training. The variances' error falls only to the sampling error of 1,000 generations."""

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


def algorithms(name: str, effort: Effort) -> list[tuple[float, dict[str, int]]]:
    """(sigma, dimension by each estimator) over the noise; Algorithm 1 around the final sample, Algorithm 2 and dense at x_t."""
    pipe, levels = pipeline(name), {}
    asked = {"record_steps": effort.algorithm_levels}
    methods = {"dense D'": "dense", "Algorithm 1": "perturbation", "Algorithm 2": "central_difference"}
    for label, method in methods.items():
        for step in analyse(pipe, effort.steps, spectrum=method, **asked).steps:
            levels.setdefault(step.sigma, {})[label] = int(step.gap_dim.value[0])
    return sorted(levels.items(), reverse=True)


@torch.no_grad()
def labour(name: str, effort: Effort, exact: bool) -> dict[str, np.ndarray]:
    """Over the noise: share of |score|^2 in the normal space, error of the variances of D(x_t) inside, distance of x_t outside."""
    manifold = LinearManifoldDenoiser(load_basis(name).double())
    inside = manifold.directions.double()
    pipe = pipeline(name, exact=exact)
    with record(pipe, "all") as recording:
        pipe(effort.samples, seeded(), num_inference_steps=effort.steps)
    rows = []
    for step in recording:
        x, score = step.sample.double(), step.denoiser.score(step.sample).double()
        denoised = step.denoiser.denoised(step.sample).double()
        tangent = score @ inside
        variance = (denoised @ inside).var(0)
        rows.append((
            step.sigma,
            1 - (tangent.square().sum() / score.square().sum()).item(),
            ((variance - manifold.variances) / manifold.variances).abs().mean().item(),
            (x - x @ inside @ inside.T).norm(dim=1).mean().item(),
        ))  # fmt: skip
    return dict(zip(("sigma", "normal_share", "variance_error", "distance"), np.array(rows).T, strict=True))


def draw(name: str, traces: dict[str, GeometryTrace], found: dict[str, Any], effort: Effort) -> Figure:
    """Six panels: the law, spectra, gaps, dimension by estimator, gaps over the training, division of labour."""
    theory, figure = theory_of(name), Figure(figsize=(15, 8.4), layout="constrained")
    law, spectra, gaps, dims, training, shares = figure.subplots(2, 3).ravel()
    times = traces["trained"].sigmas ** 2
    draws = torch.cat([_eigenvalues(name, seed) for seed in range(effort.draws)]).numpy()
    edges = np.logspace(np.log10(draws.min() / 1.3), np.log10(draws.max() * 1.3), 60)
    weights, label = np.full(len(draws), 0.4 / len(draws)), f"{effort.draws} draws of F, d = 100"
    law.hist(draws, edges, weights=weights, color="#9ecae1", label=label)
    grid = np.sqrt(edges[1:] * edges[:-1])
    law.plot(grid, theory.density(grid) * np.diff(edges), color="#08306b", label="law for d → ∞")
    law.set(
        xscale="log",
        xlabel="eigenvalue of F Fᵀ",
        ylabel="share of all eigenvalues a bin",
        title="eigenvalues of F Fᵀ (and 60 % zeros)",
    )
    comparison = traces["trained"].compare(theory)
    spectra.plot(times, comparison.predicted, color="#888888", linewidth=0.7)
    spectra.plot(times, comparison.measured[:, 0], ".", color="#1f78b4", markersize=2)
    spectra.set(ylabel="singular values of D'", title="trained network (dots) on the closed form")
    for position, colour in zip(GAPS[name], ("#ff7f00", "#e31a1c"), strict=False):
        j = comparison.gap_positions.index(position)
        gaps.plot(times, comparison.predicted_gaps[:, j], color=colour, label=f"after {position}: closed form")
        gaps.plot(times, gaps_of(traces["exact"], position), "--", color=colour, label="exact score of this F")
        gaps.plot(times, gaps_of(traces["trained"], position), ".", color=colour, label="trained")
    gaps.set(ylabel="gap in units of D'", title="gaps")
    for label, marker in (("dense D'", "o"), ("Algorithm 1", "^"), ("Algorithm 2", "x")):
        dims.plot([s**2 for s, _ in found["dims"]], [d[label] for _, d in found["dims"]], marker, label=label, alpha=0.8)
    dims.axhline(40, color="#888888", linewidth=0.8)
    dims.set(ylabel="position of the largest gap", title="dimension by the largest gap")
    for i, (step, trace) in enumerate(found["training"].items()):
        for position, style in zip(GAPS[name][::-1], ("-", ":"), strict=False):
            label = f"{step:,} steps" if position == 40 else None
            training.plot(trace.sigmas**2, gaps_of(trace, position), style, color=f"C{i}", label=label)
    training.set(
        ylabel="gap in units of D'", title="gap after 40 over the training" + (" (dotted: after 20)" if 20 in GAPS[name] else "")
    )
    for label, colour in (("trained", "#1f78b4"), ("exact", "#33a02c")):
        run = found["labour"][label]
        shares.plot(run["sigma"] ** 2, run["normal_share"], color=colour, label=f"|score|² in the normal space, {label}")
        shares.plot(run["sigma"] ** 2, run["variance_error"], "--", color=colour, label=f"error of variances inside, {label}")
    run = found["labour"]["trained"]
    shares.plot(
        run["sigma"] ** 2, run["distance"] / run["distance"].max(), color="#888888", label="distance to the manifold, relative"
    )
    shares.set(ylabel="share", title="who works when", ylim=(-0.03, 1.75))
    for axes in (spectra, gaps, dims, training, shares):
        axes.set(xscale="log", xlabel="noise σ² (generation runs to the right)")
        axes.set_xlim(times.max() * 1.3, times.min() / 1.3)
    for axes in (law, gaps, dims, training, shares):
        axes.legend(fontsize=7.5, loc="upper center" if axes is shares else "best")
    figure.suptitle(f"{name}: x_0 = F z, d = 100, m = 40", fontsize=13)
    return figure


def _eigenvalues(name: str, seed: int) -> Tensor:
    scale = torch.tensor(VARIANCES[name]).sqrt() / 40**0.5
    basis = torch.randn(100, 40, generator=seeded(seed)) * scale
    return torch.linalg.eigvalsh(basis.T @ basis)


def report(name: str, traces: dict[str, GeometryTrace], found: dict[str, Any]) -> str:
    """The table of one manifold, and what agrees."""
    theory, times = theory_of(name), traces["exact"].sigmas ** 2
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
    middle = traces["trained"].steps[len(times) // 2]
    lines += ["", f"Asymmetry of the trained D' at σ = {middle.sigma:.2f}: {middle.asymmetry[0]:.4f}.", ""]
    low = [dims for sigma, dims in found["dims"] if sigma**2 < 0.05]
    read = ", ".join(f"{label} at {sum(dims[label] == 40 for dims in low)} of {len(low)}" for label in low[0])
    lines += [f"Noise levels below σ² = 0.05 whose largest gap is after 40: {read}.", ""]
    over = [f"{gaps_of(trace, 40).max():.2f} after {step:,}" for step, trace in found["training"].items()]
    lines += [f"Largest gap after 40 over the training (steps): {', '.join(over)}.", ""]
    return "\n".join(lines)


def _first_above(times: np.ndarray, values: np.ndarray) -> str:
    above = times[values >= 0.1]
    return f"{above.max():.2f}" if len(above) else "never"


def main() -> None:
    output, smoke = parse(__doc__)
    effort = SMOKE if smoke else Effort()
    text = ["# Linear manifolds", "", f"Written by `examples/reproduce/linear_manifold.py`. {VERDICT}", ""]
    for name in GAPS:
        traces = {"trained": analyse(pipeline(name), effort.steps), "exact": analyse(pipeline(name, exact=True), effort.steps)}
        kept = {step: analyse(pipeline(name, step), effort.steps) for step in effort.kept}
        found = {
            "dims": algorithms(name, effort), "training": kept | {30_000: traces["trained"]},
            "labour": {label: labour(name, effort, label == "exact") for label in ("trained", "exact")},
        }  # fmt: skip
        draw(name, traces, found, effort).savefig(output / f"{name}.png", dpi=90)
        text += [f"![{name}]({name}.png)", "", report(name, traces, found)]
    (output / "linear_manifold.md").write_text("\n".join(text))
    print(output / "linear_manifold.md")


if __name__ == "__main__":
    main()
