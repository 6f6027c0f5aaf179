"""What a guidance study says: a row for every condition, the marks, the table, the panels of its figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from guidance_study import Study, random_direction, shift_of
from torch import Tensor

from diffusers_geometry import GeometryReward
from diffusers_geometry.objectives import FunctionObjective

MARKERS = {"shuffled labels": ("s", "#999999"), "random direction": ("^", "#33a02c"), "exact psi gradient": ("D", "#e31a1c")}
BANDS = {"lowest": "#a6cee3", "highest": "#fdbf6f"}


@dataclass
class Row:
    """A line of the table; measures are None where there are too few samples for them."""

    name: str
    scale: float | None
    shift: tuple[float, float]
    samples: int
    measures: dict[str, tuple[float, float]] | None
    found: dict[str, Tensor]


def measured_rows(study: Study, reward: GeometryReward, shuffled: GeometryReward) -> list[Row]:
    """Every condition, the unguided samples first."""
    effort, plain = study.effort, study.run("unguided", None)
    rows: list[Row] = []

    def add(name: str, scale: float | None, found: dict[str, Tensor], paired: bool = True) -> None:
        measures = study.judged(found, plain) if len(found["samples"]) == effort.samples else None
        rows.append(Row(name, scale, shift_of(found, plain, paired), len(found["psi"]), measures, found))

    add("unguided", None, plain)
    for name, found, paired in study.other_runs():
        add(name, None, found, paired)
    for scale in sorted([*effort.scales, *(-s for s in effort.scales)]):
        add("reward", scale, study.run(f"reward{scale:+g}", study.guidance(reward, scale)))
    objectives = {"shuffled labels": shuffled, "random direction": FunctionObjective(random_direction)}
    for name, objective in objectives.items():
        for scale in study.recommended:
            add(name, scale, study.run(f"{name}{scale:+g}", study.guidance(objective, scale)))
    for scale in study.recommended:
        guidance = study.guidance(study.exact_objective(), scale)
        add("exact psi gradient", scale, study.run(f"exact{scale:+g}", guidance, count=effort.exact))
    for lowest in (True, False):
        name = f"{'lowest' if lowest else 'highest'} of {effort.candidates}"
        add(name, None, study.kept(name, lambda low=lowest: study.best_of_groups(low)), paired=study.best_is_paired)
    return rows


def marks(rows: list[Row], metrics: dict[str, Any], study: Study) -> list[tuple[str, str, bool]]:
    """(mark, what was measured, whether it is met)."""
    by, dose = {(row.name, row.scale): row for row in rows}, dose_of(rows)
    low, high = study.recommended
    down, up, plain = by["reward", low], by["reward", high], by["unguided", None]
    spread = plain.found["psi"].mean(1).std()
    count = min(len(row.found["psi"]) for row in dose)
    steps = [(b.found["psi"][:count] - a.found["psi"][:count]).mean(1) / spread for a, b in itertools.pairwise(dose)]
    smallest = min(steps, key=lambda step: float(step.mean()))
    step = float(smallest.mean()), float(smallest.std() / math.sqrt(len(smallest)))
    falls = {n: [100 * (plain.measures[n][0] - r.measures[n][0]) for r in (down, up)] for n in study.prices}
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
    for name, words in study.prices.items():
        said_falls = f"{falls[name][0]:.1f} at {low:+g}, {falls[name][1]:.1f} at {high:+g}"
        found.append((f"{words} by <= 5 points", said_falls, max(falls[name]) <= 5 + 1e-9))
    for name, values in diversity.items():
        cells = ", ".join(f"{value:.3f} ± {error:.3f}" for value, error in values)
        found.append((f"{name} falls with -, rises with +", cells, values[0][0] < values[1][0] < values[2][0]))
    for row in quiet:
        small = abs(row.shift[0]) <= 2 * row.shift[1]
        found.append((f"{row.name} {row.scale:+g}: no shift beyond 2 s.e.", said(row.shift), small))
    return found


def marks_table(found: list[tuple[str, str, bool]]) -> list[str]:
    """Markdown, a line a mark."""
    head = ["| mark | measured | met |", "| --- | --- | --- |"]
    return head + [f"| {mark} | {value} | {'yes' if met else 'no'} |" for mark, value, met in found]


def said(value: tuple[float, float], digits: int = 2) -> str:
    """A signed number with its error."""
    return f"{value[0]:+.{digits}f} ± {value[1]:.{digits}f}"


def table(rows: list[Row], measures: Sequence[str]) -> list[str]:
    """Markdown, a line a row."""
    lines = ["| objective | scale | true psi, s.d. | of samples | change of x_0 | seconds | " + " | ".join(measures) + " |"]
    lines.append("| --- " * (6 + len(measures)) + "|")
    for row in rows:
        shift, seconds = row.found.get("shift"), row.found["seconds"] / len(row.found["samples"])
        cells = [row.name, "" if row.scale is None else f"{row.scale:+g}", said(row.shift), str(row.samples)]
        cells += ["" if shift is None or not shift else f"{float(shift):.1%}", f"{float(seconds):.3f}"]
        cells += ["" if row.measures is None else f"{row.measures[n][0]:.3f} ± {row.measures[n][1]:.3f}" for n in measures]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def dose_of(rows: list[Row]) -> list[Row]:
    """The rows of the reward and the unguided one, by scale."""
    return sorted((row for row in rows if row.name in ("reward", "unguided")), key=lambda row: row.scale or 0.0)


def dose_panel(axes: Any, rows: list[Row], title: str) -> None:
    """Shift of psi against the scale, with the controls beside it."""
    dose = dose_of(rows)
    positions = np.arange(len(dose)) - len(dose) // 2
    axes.errorbar(positions, *zip(*(r.shift for r in dose), strict=True), fmt="o-", color="#1f78b4", label="reward")
    place = {r.scale or 0: p for r, p in zip(dose, positions, strict=True)}
    for i, (name, (marker, colour)) in enumerate(MARKERS.items()):
        own = [r for r in rows if r.name == name]
        where = [place[r.scale] + 0.12 * (i - 1) for r in own]
        axes.errorbar(where, *zip(*(r.shift for r in own), strict=True), fmt=marker, color=colour, label=name)
    for row in (r for r in rows if r.name.split()[0] in BANDS):
        colour, (value, error) = BANDS[row.name.split()[0]], row.shift
        axes.axhspan(value - error, value + error, color=colour, alpha=0.5, label=row.name)
    for level in (-1, 1):
        axes.axhline(level, color="#333333", linewidth=0.8, linestyle="--")
    axes.set_xticks(positions, [f"{r.scale:+g}" if r.scale else "0" for r in dose])
    axes.set(xlabel="scale", ylabel="shift of true ψ (s.d. of unguided)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def quality_panel(axes: Any, series: dict[str, dict[str, Any]]) -> None:
    """Spearman within a noise level against the noise, for the metrics of one reward or several."""
    shown = []
    for name, metrics in series.items():
        levels = sorted(metrics["levels"], key=lambda level: level["sigma"])
        sigmas, values, errors = zip(*((v["sigma"], v["spearman"], v["spearman_sem"]) for v in levels), strict=True)
        axes.errorbar(sigmas, values, errors, fmt="o-", label=name, **({"color": "#1f78b4"} if len(series) == 1 else {}))
        shown += [sigma for sigma in sigmas if all(abs(math.log(sigma / other)) > 0.12 for other in shown)]
    axes.axhline(0.8, color="#333333", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="noise σ", ylabel="Spearman within the level", title="reward on unseen seeds")
    axes.set_xticks(shown, [f"{sigma:.2g}" for sigma in shown], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=8)


def contact_sheet(axes: Any, rows: list[Row], count: int, title: str) -> None:
    """The same seeds under every scale."""
    dose = dose_of(rows)
    count, size = min(count, *(len(r.found["samples"]) for r in dose)), dose[0].found["samples"].shape[-1]
    pitch = size + max(1, size // 16)
    sheet = np.full((pitch * len(dose) - 1, pitch * count - 1), 1.0)
    for i, row in enumerate(dose):
        for j, image in enumerate(row.found["samples"][:count, 0].numpy()):
            sheet[pitch * i : pitch * i + size, pitch * j : pitch * j + size] = image
    axes.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
    axes.set_yticks(pitch * np.arange(len(dose)) + size / 2 - 0.5, [f"{r.scale:+g}" if r.scale else "0" for r in dose])
    axes.set_xticks([])
    axes.set(ylabel="scale", title=title)
