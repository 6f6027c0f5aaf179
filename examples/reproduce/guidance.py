"""Steer the bundled digits by psi: labels, a reward, dose and response in the true psi, its price, and controls.

python examples/reproduce/guidance.py               # about 20 minutes on two cores; continues after a stop from a cache folder
"""

from __future__ import annotations

import itertools
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arguments import parse
from guidance_bench import (
    FIRST_SEED,
    LABELLED,
    RANK,
    RECOMMENDED,
    SMOKE,
    STEPS,
    WINDOW,
    Bench,
    Effort,
    best_of_groups,
    random_direction,
    shift_of,
)
from matplotlib.figure import Figure
from sample_quality import MEASURES
from torch import Tensor

from diffusers_geometry import GeometryDataset, GeometryGuidance, GeometryReward
from diffusers_geometry.dataset import generate_dataset
from diffusers_geometry.labels import DatasetRequest
from diffusers_geometry.objectives import FunctionObjective, PsiObjective

VERDICT = """\
The reward meets its mark, a mean Spearman above 0.8 within a noise level on unseen seeds, and guidance by it moves the true psi
both ways, further than a random direction of equal norm; most other marks are missed. At the scales chosen on other seeds psi
moves by a little less than one standard deviation up and by three quarters of one down, where it levels off; +8 passes the mark
upwards at the price of broken digits. The response is monotone only to within its errors: +0.5 and +1 do the same. The share of
confident digits falls by less than 5 points downwards and by more upwards, and many samples change their digit on the way.
Diversity goes against the mark: higher psi crowds the samples together, lower psi spreads them. A reward trained on shuffled
labels, which ranks nothing, raises psi at -8 beyond its error, where a random direction does not: a large push along what a
network has made up can move psi by itself. The other controls stay within two standard errors. The exact gradient of psi moves
it twice as far up as the reward does, and no further down to within the error. The best of eight by true psi needs no reward,
meets both marks, and costs eight generations and their Jacobians."""


@dataclass
class Row:
    """A line of the table; measures are None where there are too few samples for them."""

    name: str
    scale: float | None
    shift: tuple[float, float]
    samples: int
    measures: dict[str, tuple[float, float]] | None
    found: dict[str, Tensor]


def measured_rows(bench: Bench, reward: GeometryReward, shuffled: GeometryReward) -> list[Row]:
    """Every condition, the unguided samples first."""
    effort, plain = bench.effort, bench.run("unguided", None)
    rows: list[Row] = []

    def add(name: str, scale: float | None, found: dict[str, Tensor], paired: bool = True) -> None:
        whole = len(found["samples"]) == effort.samples
        measures = bench.judge(found["samples"], plain["samples"], effort.blocks) if whole else None
        rows.append(Row(name, scale, shift_of(found, plain, paired), len(found["psi"]), measures, found))

    add("unguided", None, plain)
    add("unguided, other seeds", None, bench.run("other-seeds", None, first=FIRST_SEED + 10_000), paired=False)
    for scale in sorted([*effort.scales, *(-s for s in effort.scales)]):
        add("reward", scale, bench.run(f"reward{scale:+g}", GeometryGuidance(reward, scale, **WINDOW)))
    objectives = {"shuffled labels": shuffled, "random direction": FunctionObjective(random_direction)}
    for name, objective in objectives.items():
        for scale in RECOMMENDED:
            add(name, scale, bench.run(f"{name}{scale:+g}".replace(" ", "-"), GeometryGuidance(objective, scale, **WINDOW)))
    for scale in RECOMMENDED:
        guidance = GeometryGuidance(PsiObjective(RANK), scale, **WINDOW)
        bench.pipe.unet.requires_grad_(False)
        add("exact psi gradient", scale, bench.run(f"exact{scale:+g}", guidance, count=effort.exact))
    for lowest in (True, False):
        name = f"{'lowest' if lowest else 'highest'} of {effort.candidates}"
        add(name, None, bench.kept(name.replace(" ", "-"), lambda low=lowest: best_of_groups(bench, low)), paired=False)
    return rows


def marks(rows: list[Row], metrics: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(mark, what was measured, whether it is met)."""
    by = {(row.name, row.scale): row for row in rows}
    dose = [row for row in rows if row.name in ("reward", "unguided")]
    dose.sort(key=lambda row: row.scale or 0.0)
    low, high = RECOMMENDED
    down, up, plain = by["reward", low], by["reward", high], by["unguided", None]
    spread = plain.found["psi"].mean(1).std()
    steps = [(b.found["psi"] - a.found["psi"]).mean(1) / spread for a, b in itertools.pairwise(dose)]
    smallest = min(steps, key=lambda step: float(step.mean()))
    step = float(smallest.mean()), float(smallest.std() / math.sqrt(len(smallest)))
    falls = {n: [100 * (plain.measures[n][0] - r.measures[n][0]) for r in (down, up)] for n in ("confident", "same digit")}
    diversity = {n: [r.measures[n] for r in (down, plain, up)] for n in ("Vendi", "recall")}
    quiet = [row for row in rows if row.name in ("shuffled labels", "random direction")]
    sigmas = [level["sigma"] for level in metrics["levels"]]
    window = f"sigma {min(sigmas):.3g} to {max(sigmas):.3g}, all guided"
    found = [
        ("mean within-level Spearman on unseen seeds >= 0.8", f"{metrics['spearman']:.3f} ({window})", metrics["spearman"] >= 0.8),
        ("psi rises with every scale", f"smallest step {said(step)} s.d.", step[0] > 0),
        (f"psi moves by >= +1 s.d. at {high:+g}", said(up.shift), up.shift[0] >= 1),
        (f"psi moves by <= -1 s.d. at {low:+g}", said(down.shift), down.shift[0] <= -1),
    ]  # fmt: skip
    for name, words in (("confident", "confident share falls"), ("same digit", "share that keeps its digit falls")):
        said_falls = f"{falls[name][0]:.1f} at {low:+g}, {falls[name][1]:.1f} at {high:+g}"
        found.append((f"{words} by <= 5 points", said_falls, max(falls[name]) <= 5))
    for name, values in diversity.items():
        cells = ", ".join(f"{value:.3f} ± {error:.3f}" for value, error in values)
        found.append((f"{name} falls with -, rises with +", cells, values[0][0] < values[1][0] < values[2][0]))
    for row in quiet:
        small = abs(row.shift[0]) <= 2 * row.shift[1]
        found.append((f"{row.name} {row.scale:+g}: no shift beyond 2 s.e.", said(row.shift), small))
    return found


def said(value: tuple[float, float], digits: int = 2) -> str:
    """A signed number with its error."""
    return f"{value[0]:+.{digits}f} ± {value[1]:.{digits}f}"


def table(rows: list[Row]) -> list[str]:
    """Markdown, a line a row."""
    lines = ["| objective | scale | true psi, s.d. | of samples | change of x_0 | seconds | " + " | ".join(MEASURES) + " |"]
    lines.append("| --- " * (6 + len(MEASURES)) + "|")
    for row in rows:
        shift, seconds = row.found.get("shift"), row.found["seconds"] / len(row.found["samples"])
        cells = [row.name, "" if row.scale is None else f"{row.scale:+g}", said(row.shift), str(row.samples)]
        cells += ["" if shift is None or not shift else f"{float(shift):.1%}", f"{float(seconds):.3f}"]
        cells += ["" if row.measures is None else f"{row.measures[n][0]:.3f} ± {row.measures[n][1]:.3f}" for n in MEASURES]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(rows: list[Row], metrics: dict[str, Any], output: Path) -> None:
    """Dose and response, the reward's quality, and a contact sheet."""
    figure = Figure(figsize=(12, 10), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    axes, quality = top.subplots(1, 2, width_ratios=(1.4, 1))
    dose = sorted((r for r in rows if r.name == "reward" or (r.scale is None and r.name == "unguided")), key=lambda r: r.scale or 0)
    positions = np.arange(len(dose)) - len(dose) // 2
    axes.errorbar(positions, *zip(*(r.shift for r in dose), strict=True), fmt="o-", color="#1f78b4", label="reward")
    place = {r.scale or 0: p for r, p in zip(dose, positions, strict=True)}
    styles = {"shuffled labels": ("s", "#999999"), "random direction": ("^", "#33a02c"), "exact psi gradient": ("D", "#e31a1c")}
    for i, (name, (marker, colour)) in enumerate(styles.items()):
        own = [r for r in rows if r.name == name]
        where = [place[r.scale] + 0.12 * (i - 1) for r in own]
        axes.errorbar(where, *zip(*(r.shift for r in own), strict=True), fmt=marker, color=colour, label=name)
    bands = {"low": "#a6cee3", "hig": "#fdbf6f"}
    for row in (r for r in rows if " of " in r.name):
        axes.axhspan(row.shift[0] - row.shift[1], row.shift[0] + row.shift[1], color=bands[row.name[:3]], alpha=0.5, label=row.name)
    for level in (-1, 1):
        axes.axhline(level, color="#333333", linewidth=0.8, linestyle="--")
    axes.set_xticks(positions, [f"{r.scale:+g}" if r.scale else "0" for r in dose])
    axes.set(xlabel="scale", ylabel="shift of true ψ (s.d. of unguided)", title="dose and response (± 1 s.e.)")
    axes.legend(fontsize=8)
    levels = sorted(metrics["levels"], key=lambda level: level["sigma"])
    sigmas, values, errors = zip(*((level["sigma"], level["spearman"], level["spearman_sem"]) for level in levels), strict=True)
    quality.errorbar(sigmas, values, errors, fmt="o-", color="#1f78b4")
    quality.axhline(0.8, color="#333333", linewidth=0.8, linestyle="--")
    quality.set(xscale="log", xlabel="noise σ", ylabel="Spearman within the level", title="reward on unseen seeds")
    quality.set_xticks(sigmas, [f"{sigma:.2g}" for sigma in sigmas], minor=False)
    quality.set_xticks([], minor=True)
    for panel in (axes, quality):
        panel.grid(alpha=0.3)
    contact_sheet(dose, bottom)
    figure.savefig(output / "guidance.png", dpi=90)


def contact_sheet(dose: list[Row], figure: Any) -> None:
    """The same seeds under every scale."""
    axes = figure.subplots(1, 1)
    count = min(24, *(len(r.found["samples"]) for r in dose))
    sheet = np.full((9 * len(dose) - 1, 9 * count - 1), 1.0)
    for i, row in enumerate(dose):
        for j, image in enumerate(row.found["samples"][:count, 0].numpy()):
            sheet[9 * i : 9 * i + 8, 9 * j : 9 * j + 8] = image
    axes.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
    axes.set_yticks(9 * np.arange(len(dose)) + 3.5, [f"{r.scale:+g}" if r.scale else "0" for r in dose])
    axes.set_xticks([])
    axes.set(ylabel="scale", title="the same seeds under every scale")


def main() -> None:
    """Labels, rewards, runs, and what they say."""
    output, smoke = parse(__doc__)
    effort = SMOKE if smoke else Effort()
    bench = Bench(effort, None if smoke else Path(tempfile.gettempdir()) / "diffusers_geometry_guidance")
    request = DatasetRequest(
        seeds=range(effort.label_seeds), record_steps=LABELLED, psi_rank=RANK, batch_size=48, held_out=effort.held_out,
        call={"num_inference_steps": STEPS, "output_type": "np"},
    )  # fmt: skip
    dataset = generate_dataset(bench.pipe, bench.labels, request, progress=not smoke)
    (reward, metrics), (shuffled, control) = bench.reward(False), bench.reward(True)
    rows = measured_rows(bench, reward, shuffled)
    psi = rows[0].found["psi"]
    lines = [
        "# Guidance by psi",
        "",
        f"Written by `examples/reproduce/guidance.py`. {VERDICT}",
        "",
        "![guidance](guidance.png)",
        "",
    ]
    lines += ["| mark | measured | met |", "| --- | --- | --- |"]
    lines += [f"| {mark} | {value} | {'yes' if met else 'no'} |" for mark, value, met in marks(rows, metrics)]
    lines += ["", *explained(bench, metrics, control, dataset, psi), "", *table(rows), ""]
    draw(rows, metrics, output)
    (output / "guidance.md").write_text("\n".join(lines))
    print(output / "guidance.md")


def explained(bench: Bench, metrics: dict, control: dict, dataset: GeometryDataset, psi: Tensor) -> list[str]:
    """How the numbers were taken."""
    effort, scatter = bench.effort, float(psi.std(dim=1).mean())
    labels = (
        f"Labels: {len(dataset):,} points of {effort.label_seeds:,} runs at {len(LABELLED)} noises, "
        f"{dataset.seconds_per_label:.3f} s each. The reward, a copy of the model's encoder, kept step {metrics['best_step']} of "
        f"{metrics['steps']} ({metrics['seconds']:.0f} s); the control of shuffled labels reached a Spearman of "
        f"{control['spearman']:.3f}. Guidance acts from {WINDOW['start']:.0%} to {WINDOW['stop']:.0%} of the run at the noises of "
        f"the labels, trust radius {WINDOW['trust_radius']:g} of the noise; scales were chosen on other seeds."
    )
    truth = (
        f"True psi is that of a dense D' over its {RANK} largest singular values at sigma {bench.sigma_ref / bench.alpha_ref:.3f}, "
        f"below every noise of the labels, mean over {effort.noises} noises common to all samples: {float(psi.mean()):.2f} nats "
        f"unguided, standard deviation {float(psi.mean(1).std()):.2f} over samples and {scatter:.2f} over the noises of one. "
        "Shifts are paired by seed, those of the best of N and of other seeds are not."
    )
    price = (
        f"Measures are means over {effort.blocks} blocks of {effort.samples // effort.blocks} samples with standard errors, in the "
        f"features of a multilayer perceptron that is right on {bench.judge.accuracy:.1%} of unseen digits. The model has no "
        "classes to be accurate about: *confident* is the share read with a confidence of at least 0.9, *same digit* the share "
        "read as the unguided sample of the same seed is. There is no classifier-free guidance whose scale could be a control. "
        "*Change of x_0* is the mean length of a shift beside that of the model's estimate; *seconds* are per sample."
    )
    return [labels, "", truth, "", price]


if __name__ == "__main__":
    main()
