"""Every dimension estimator on curved manifolds of known dimension, over the noise: what each says, and where it breaks.

python examples/reproduce/nonlinear_manifolds.py    # about five minutes of one core; figure and tables in results/

The denoisers are exact: a sphere, a product of circles (both carried into more dimensions), and images of a digit whose
place and angle vary, by quadrature over these three parameters. A linear manifold stands beside them as the flat control.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from arguments import parse, took
from curved import SPHERE_DIM, DigitDenoiser, Manifold, digit_images, digit_radii, laws, manifolds, seeded, spacings
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffusers_geometry import Denoiser, GeometryTrace, dense_spectrum
from diffusers_geometry.descriptors import local_rank
from diffusers_geometry.dimension import effective_dimension, gap_dim, normal_bundle_dim
from diffusers_geometry.plan import plan_probe
from diffusers_geometry.probe import PointGeometry, Probe
from diffusers_geometry.step_geometry import StepGeometry

VERDICT = """\
Every estimator is right within a window of noise, and the windows end for different reasons. Above it is curvature. tr D' of
a noised point errs at first order in σ, by the mean curvature along its noise; FLIPD of a clean point at second order, below
the truth on a sphere and above it on circles. Both laws hold at small σ, that of the digit within its standard error. The
largest gap needs no value near one: it is right up to σ = R/3 on the sphere, beyond which it counts the normal direction too,
and between the two radii of the circles it counts the wider ones or fewer: one snapshot cannot tell a manifold from a part of
it. nu takes small normal values for parts of directions and is too large from a half to two thirds of that noise on; on flat
data of one variance both are right at any noise. Algorithm 1 loses the score's gap even on flat data once σ nears the standard
deviation inside, for sampling spreads its normal values. trace.manifold_dim answers last, from a twelfth to a thirty-third of
the smallest radius down, because it waits until no value lies between 0.1 and 0.9; on a manifold it was wrong at σ = 1e-8 only,
where rounding rules. Below the windows is the rounding of float32 samples, at σ near 1e-8 to 1e-7 of the data. On flat data
FLIPD and Algorithm 1, which divide it by σ, are the first to fail, dense D' never does, and Algorithm 2 runs out of directions
that float32 can tell apart; on curved manifolds trace.manifold_dim and others fail as early. Known from a grid of images, the
digit has dimension 3 over at most two thirds of a decade of noise, around half the spacing of the images: by the largest gap
of dense D' and by Algorithm 2 at single levels (the mean at σ = 2.2 is one of other answers), by trace.manifold_dim nowhere,
of whose two answers one is wrong. Below, tr D', FLIPD, nu and the dense gap fall to 0, a point, and Algorithms 1 and 2 read
their own rounding: a grid is no manifold at that noise."""
ESTIMATORS = {
    "gap_dim, dense D'": ("#1f78b4", "-"), "gap_dim, Algorithm 1": ("#1f78b4", ":"), "gap_dim, Algorithm 2": ("#1f78b4", "--"),
    "normal_bundle_dim, Algorithm 1": ("#e31a1c", ":"), "normal_bundle_dim, Algorithm 2": ("#e31a1c", "--"),
    "effective_dimension": ("#33a02c", "-"), "flipd": ("#ff7f00", "-"), "local_rank": ("#6a3d9a", "-"),
    "trace.manifold_dim": ("#111111", "-"),
}  # fmt: skip
EXACT_SIGMAS, IMAGE_SIGMAS = (1e-8, 10.0), (1e-4, 10.0)


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    per_decade: int = 8
    points: int = 6
    image_per_decade: int = 6
    image_points: int = 4
    nodes: int = 21
    fixed: int = 24


SMOKE = Effort(per_decade=1, points=2, image_per_decade=1, image_points=2, nodes=9, fixed=8)


def probes(size: int) -> dict[str, Probe]:
    plans = {
        "dense": plan_probe(size, method="dense", flipd=True),
        "Algorithm 1": plan_probe(size, method="perturbation", of="score"),
        "Algorithm 2": plan_probe(size, method="central_difference", of="score"),
    }
    return {name: Probe(plan) for name, plan in plans.items()}


def estimates(found: dict[str, PointGeometry]) -> dict[str, float]:
    """Every estimator at one point."""
    dense = found["dense"]
    values = {
        "gap_dim, dense D'": gap_dim(dense.denoised), "effective_dimension": effective_dimension(dense.denoised),
        "flipd": dense.flipd, "local_rank": local_rank(dense.denoised),
    }  # fmt: skip
    for name in found.keys() - {"dense"}:
        values[f"gap_dim, {name}"] = gap_dim(found[name].denoised)
        values[f"normal_bundle_dim, {name}"] = normal_bundle_dim(found[name].spectrum)
    return {name: estimate.value for name, estimate in values.items()}


def step_of(position: int, sigma: float, found: list[PointGeometry]) -> StepGeometry:
    denoised = [f.denoised for f in found]
    return StepGeometry.from_spectra(
        denoised, denoised, index=position, timestep=float(position), alpha_t=1.0, sigma_t=sigma, engine="exact",
        certificate_error=0.0, refusal=None, backend=found[0].backend, products=sum(f.products for f in found),
    )  # fmt: skip


def measure(manifold: Manifold, effort: Effort) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Falling sigmas (levels,), each estimator (levels, points), and the singular values of D' (levels, points, d).

    Every point keeps its clean sample and its noise over sigma, as a run of the exact probability flow nearly does. Numbers are in
    float32 as in a pipeline; the denoiser works in float64.
    """
    points, per_decade = (effort.image_points, effort.image_per_decade) if manifold.images else (effort.points, effort.per_decade)
    low, high = IMAGE_SIGMAS if manifold.images else EXACT_SIGMAS
    sigmas = np.geomspace(high, low, round(per_decade * math.log10(high / low)) + 1)
    draws = [manifold.draw(seeded(100 + i)) for i in range(points)]
    noises = [torch.randn(len(x_0), generator=seeded(200 + i), dtype=torch.double) for i, (_, x_0) in enumerate(draws)]
    taken = probes(draws[0][0].dim)
    values = {name: np.full((len(sigmas), points), np.nan) for name in ESTIMATORS}
    steps = []
    for i, sigma in enumerate(sigmas.tolist()):
        dense = []
        for j, ((exact, x_0), noise) in enumerate(zip(draws, noises, strict=True)):
            denoiser = exact.at(1.0, sigma)
            found = {name: _probe(p, denoiser, x_0, noise, 1000 * i + j) for name, p in taken.items()}
            found = {name: point for name, point in found.items() if point is not None}
            for name, value in estimates(found).items():
                values[name][i, j] = value
            dense.append(found["dense"])
        steps.append(step_of(i, sigma, dense))
        ended = GeometryTrace(tuple(steps)).manifold_dims  # of a run that ends here
        values["trace.manifold_dim"][i] = [math.nan if d is None else d for d in ended]
    return sigmas, values, np.stack([s.denoised_singular_values for s in steps])


def _probe(probe: Probe, denoiser: Denoiser, x_0: Tensor, noise: Tensor, seed: int) -> PointGeometry | None:
    """What a probe finds at the noised point; None where rounding leaves Algorithm 2's directions no full rank."""
    try:
        return probe(denoiser, (x_0 + denoiser.sigma * noise).float(), x_0.float(), seeded(seed), denoiser)
    except torch.linalg.LinAlgError:
        return None


def window(sigmas: np.ndarray, values: np.ndarray, truth: int) -> tuple[float, float] | None:
    """Longest run of sigmas (low, high) where the mean over all points lies within 0.5 of the truth; None without one."""
    right = np.abs(values.mean(axis=1) - truth) < 0.5
    runs = [list(group) for good, group in itertools.groupby(range(len(right)), key=lambda i: right[i]) if good]
    longest = max(runs, key=len, default=None)
    return None if longest is None else (float(sigmas[longest[-1]]), float(sigmas[longest[0]]))


def crossing(sigmas: np.ndarray, errors: np.ndarray, level: float = 0.5) -> float:
    """Where errors that grow with sigma first reach ``level`` above sigma = 1e-4, linear in the logarithms; NaN if they do not."""
    order = np.argsort(sigmas)
    x, y = np.log(sigmas[order]), np.log(errors[order].clip(1e-12))
    beyond = np.flatnonzero((y >= math.log(level)) & (x > math.log(1e-4)))
    i = int(beyond[0])
    share = (math.log(level) - y[i - 1]) / (y[i] - y[i - 1])
    return float(np.exp(x[i - 1] + share * (x[i] - x[i - 1])))


def errors_of(measured: tuple, truth: int) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square error of tr D' over points and absolute mean error of FLIPD, over sigma."""
    _, values, _ = measured
    trace = np.sqrt(((values["effective_dimension"] - truth) ** 2).mean(axis=1))
    return trace, np.abs(values["flipd"].mean(axis=1) - truth)


def draw(known: dict[str, Manifold], measured: dict[str, tuple], effort: Effort) -> Figure:
    """One panel a manifold, and the errors that curvature makes beside their laws."""
    figure = Figure(figsize=(16, 10.5), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, (name, manifold) in zip(panels, known.items(), strict=False):
        sigmas, values, _ = measured[name]
        axes.axhline(manifold.dim, color="#bbbbbb", linewidth=6, zorder=0, label="truth")
        for estimator, (colour, style) in ESTIMATORS.items():
            width = 3 if estimator == "trace.manifold_dim" else 1.3
            axes.plot(sigmas, values[estimator].mean(axis=1), style, color=colour, linewidth=width, label=estimator)
        for radius in sorted(set(manifold.radii)):
            axes.axvline(radius, color="#888888", linestyle=":", linewidth=1)
        if name == "grid":
            axes.axvline(max(spacings(effort.fixed)) / 2, color="#a6761d", linestyle="-.", linewidth=1)
        axes.set(xscale="log", ylim=(-0.3, 2 * manifold.dim + 2), title=f"{manifold.title}: dimension {manifold.dim}")
        axes.set(xlabel="noise σ (generation runs to the right)", ylabel="estimated dimension")
        axes.set_xlim(sigmas.max() * 1.3, sigmas.min() / 1.3)
    draw_curvature(panels[-1], known, measured, effort)
    handles, labels = panels[0].get_legend_handles_labels()
    dotted = "  dotted: radii of curvature; dash-dotted: half the largest spacing of the images; higher values are off the panels"
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=10, title=dotted.strip())
    for axes in panels:
        axes.grid(alpha=0.25)
    figure.suptitle("Estimated dimension of manifolds of known dimension, mean over points; exact denoisers, float32 samples")
    return figure


def draw_curvature(axes: Axes, known: dict[str, Manifold], measured: dict[str, tuple], effort: Effort) -> None:
    for (name, (first, second)), colour in zip(laws(effort.image_points).items(), ("#1b9e77", "#d95f02", "#7570b3"), strict=True):
        sigmas = measured[name][0]
        shown = (sigmas >= 1e-4) & (sigmas <= 1)
        trace, flipd = errors_of(measured[name], known[name].dim)
        axes.plot(sigmas[shown], trace[shown], "o", color=colour, markersize=4, label=f"{name}: tr D', root mean square")
        axes.plot(sigmas[shown], first * sigmas[shown], "-", color=colour, linewidth=1)
        if second is not None:
            axes.plot(sigmas[shown], flipd[shown], "x", color=colour, markersize=5, label=f"{name}: FLIPD, mean")
            axes.plot(sigmas[shown], abs(second) * sigmas[shown] ** 2, "--", color=colour, linewidth=1)
    axes.axhline(0.5, color="#888888", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="noise σ", ylabel="|estimate - truth|", title="what curvature does (lines: laws)")
    axes.set(xlim=(1.3, 0.8e-4), ylim=(1e-6, 20))
    axes.legend(fontsize=8)


def refinement(effort: Effort) -> float:
    """Largest change of tr D' of a noised digit over sigma when the quadrature takes half as many nodes again."""
    parameters, noise = torch.tensor([0.2, -0.3, 0.25]), torch.randn(DigitDenoiser.dim, generator=seeded(3), dtype=torch.double)
    changes = []
    for sigma in np.geomspace(*IMAGE_SIGMAS, 6).tolist():
        x_t = digit_images(parameters.double()[None])[0] + sigma * noise
        traces = [
            effective_dimension(dense_spectrum(DigitDenoiser(parameters, nodes).at(1.0, sigma).jacobian(x_t))).value
            for nodes in (effort.nodes, effort.nodes * 3 // 2)
        ]
        changes.append(abs(traces[1] - traces[0]))
    return max(changes)


def report(known: dict[str, Manifold], measured: dict[str, tuple], effort: Effort) -> list[str]:
    lines = ["# Curved manifolds", "", f"Written by `examples/reproduce/nonlinear_manifolds.py`. {VERDICT}", ""]
    lines += ["![nonlinear_manifolds](nonlinear_manifolds.png)", "", "## Where the mean over points is within 0.5 of the truth", ""]
    lines += ["| estimator | " + " | ".join(f"{m.title} ({m.dim})" for m in known.values()) + " |"]
    lines += ["| --- " * (1 + len(known)) + "|"]
    for estimator in ESTIMATORS:
        cells = []
        for name, manifold in known.items():
            sigmas, values, _ = measured[name]
            found = window(sigmas, values[estimator], manifold.dim)
            ends = [] if found is None else [f"{s:.2g}{'*' if s in (sigmas.min(), sigmas.max()) else ''}" for s in found]
            cells.append(" .. ".join(ends) or "nowhere")
        lines.append(f"| {estimator} | " + " | ".join(cells) + " |")
    cells = [answered(measured[name], manifold.dim) for name, manifold in known.items()]
    lines.append("| trace.manifold_dim: single answers, of these wrong (largest σ of them) | " + " | ".join(cells) + " |")
    lines += [
        "",
        "*σ from .. to; \\* is the end of what was scanned. The longest window where there are several, the first of equal ones.*",
        "",
    ]
    lines += ["## What curvature does", "", "| error reaches 0.5 at σ | tr D', law | measured | FLIPD, law | measured |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for name, (first, second) in laws(effort.image_points).items():
        trace, flipd = errors_of(measured[name], known[name].dim)
        law = "not known" if second is None else f"{math.sqrt(0.5 / abs(second)):.3f}"
        at = [f"{crossing(measured[name][0], e):.3f}" for e in (trace, flipd)]
        lines.append(f"| {known[name].title} | {0.5 / first:.3f} | {at[0]} | {law} | {at[1]} |")
    unsure = [f"{1 / math.sqrt(2 * points):.0%}" for points in (effort.points, effort.image_points)]
    lines += [
        "",
        f"*The law of tr D' is a root mean square over noise. Measured at {effort.points} points ({effort.image_points} of the "
        f"digit) it has a standard error of 1/√(2 points), {unsure[0]} ({unsure[1]}), if errors are Gaussian. FLIPD's is the first "
        "term of a series in σ/R.*",
    ]
    lines += ["", "| largest normal singular value of D' of the sphere at σ | measured, at noised points | (d - 1) σ² / 2 R² |"]
    lines += ["| --- | --- | --- |"]
    sigmas, _, spectra = measured["sphere"]
    for wanted in (1e-3, 1e-2, 1e-1):
        i = int(np.abs(np.log(sigmas / wanted)).argmin())
        normal = spectra[i, :, SPHERE_DIM - 1]
        sem = normal.std(ddof=1) / math.sqrt(len(normal))
        lines.append(f"| {sigmas[i]:.2g} | {normal.mean():.3g} ± {sem:.1g} | {(SPHERE_DIM - 1) * sigmas[i] ** 2 / 2:.3g} |")
    listed = ", ".join(f"{r:.2f}" for r in digit_radii())
    apart = ", ".join(f"{s:.2f}" for s in spacings(effort.fixed))
    lines += ["", f"Radii of curvature of the digits along x, y and the angle: {listed}. Neighbouring images of the fixed grid are "
              f"{apart} apart. Half as many nodes again in the quadrature change tr D' of one by at most "
              f"{refinement(effort):.1g}.", ""]  # fmt: skip
    return lines


def answered(measured: tuple, truth: int) -> str:
    """How often trace.manifold_dim answered, over points and noise, how often wrongly, and up to which noise that was."""
    answers = measured[1]["trace.manifold_dim"]
    wrong = np.isfinite(answers) & (answers != truth)
    largest = f" ({measured[0][wrong.any(axis=1)].max():.2g})" if wrong.any() else ""
    return f"{np.isfinite(answers).sum()}, {wrong.sum()}{largest}"


def main() -> None:
    output, smoke = parse(__doc__)
    effort = SMOKE if smoke else Effort()
    known = manifolds(effort.nodes, effort.fixed)
    measured = {name: measure(manifold, effort) for name, manifold in known.items()}
    draw(known, measured, effort).savefig(output / "nonlinear_manifolds.png", dpi=90)
    (output / "nonlinear_manifolds.md").write_text("\n".join([*report(known, measured, effort), took(), ""]))
    print(output / "nonlinear_manifolds.md")


if __name__ == "__main__":
    main()
