"""What a guided run did: true descriptors, what the images show, price and diversity; tables and figures of it.

Stroke width is twice the area of the ink over the length of its outline, as for the zoo's captions; edge density is that of
``image_measures.py``; saturation is that of the HSV cone, mean over pixels, white having none.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from data import measure
from descriptor_bench import DESCRIPTORS, Bench, image_change
from image_measures import edge_density
from matplotlib.colors import rgb_to_hsv
from matplotlib.figure import Figure
from sample_quality import CONFIDENT, Judge, vendi
from torch import Tensor

SYMBOLS = {"psi": "ψ", "nu": "ν", "delta": "δ"}
COLOURS = {"psi": "#1f78b4", "nu": "#33a02c", "delta": "#e31a1c"}
Number = tuple[float, float]


@dataclass
class Row:
    """A line of the table: cells are (value, standard error)."""

    name: str
    scale: float | None
    cells: dict[str, Number]
    samples: Tensor


@functools.cache
def judge() -> Judge:
    """The digits' classifier, trained once."""
    return Judge()


class Reader:
    """Reads runs of one model beside its unguided one.

    Args:
        bench: The model.
        plain: Its unguided run.
    """

    def __init__(self, bench: Bench, plain: dict[str, Tensor]) -> None:
        self.bench, self.plain = bench, plain
        self.judge = judge() if bench.setting.name == "digits" else None

    def shown(self, samples: Tensor) -> dict[str, np.ndarray]:
        """What every image shows, each (n,)."""
        found = {"edge density": edge_density(samples)}
        if self.judge is not None:
            return found | {"stroke width": measure(samples)["thickness"]}
        colours = ((samples.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
        return found | {"saturation": rgb_to_hsv(colours)[..., 1].mean((1, 2))}

    def read(self, samples: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Confidence of the classifier and the digit that it reads, each (n,)."""
        sure = self.judge.network.predict_proba(samples.flatten(1).numpy())
        return sure.max(1), sure.argmax(1)

    def diversity(self, samples: Tensor) -> Number:
        """Vendi score of the classifier's features, or of the colours' distances from white, over blocks."""
        flat = samples.flatten(1).numpy()
        features = (1 - flat) / 2 if self.judge is None else self.judge.features(flat)
        return over(np.array([vendi(own) for own in np.array_split(features, self.bench.setting.blocks)]))

    def row(self, name: str, scale: float | None, found: dict[str, Tensor]) -> Row:
        """A guided run beside the unguided one of the same seeds: shifts in its standard deviations, what is shown in per cent."""
        samples, before = found["samples"], self.plain["samples"]
        cells = {"change": over(image_change(samples, before).numpy())}
        for descriptor in DESCRIPTORS:
            now, was = (run[descriptor].mean(1).numpy() for run in (found, self.plain))
            cells[descriptor] = over((now - was) / was.std(ddof=1))
        was = self.shown(before)
        cells |= {key: over(100 * (value - was[key]) / was[key].mean()) for key, value in self.shown(samples).items()}
        if self.judge is not None:
            (sure, digit), (_, own) = self.read(samples), self.read(before)
            cells |= {"confidence": over(sure), "confident": over(sure >= CONFIDENT), "same digit": over(digit == own)}
        return Row(name, scale, cells | {"Vendi": self.diversity(samples)}, samples)

    def unguided(self) -> list[str]:
        """The unguided run in its own units, as a sentence."""
        means = {SYMBOLS[d]: self.plain[d].mean(1).numpy() for d in DESCRIPTORS} | self.shown(self.plain["samples"])
        said = [f"{name} {v.mean():.4g} (standard deviation {v.std(ddof=1):.3g})" for name, v in means.items()]
        if self.judge is not None:
            said.append(f"confidence {self.read(self.plain['samples'])[0].mean():.3f}")
        vendi_score, error = self.diversity(self.plain["samples"])
        return [f"Unguided: {', '.join(said)}, Vendi {vendi_score:.2f} ± {error:.2f}."]


def over(values: np.ndarray) -> Number:
    """Mean and its standard error."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def said(value: Number, digits: int = 2, signed: bool = True) -> str:
    """A number with its error."""
    return f"{value[0]:{'+' if signed else ''}.{digits}f} ± {value[1]:.{digits}f}"


def table(rows: list[Row]) -> list[str]:
    """Markdown, a line a row."""
    keys = list(rows[0].cells)
    heads = {"change": "change of the image", **{d: f"true {SYMBOLS[d]}, s.d." for d in DESCRIPTORS}}
    heads |= {k: f"{k}, %" for k in ("edge density", "stroke width", "saturation")}
    lines = ["| objective | scale | " + " | ".join(heads.get(k, k) for k in keys) + " |", "| --- " * (len(keys) + 2) + "|"]
    for row in rows:
        cells = []
        for key in keys:
            plainly = key in ("change", "confidence", "confident", "same digit")
            shown_percent = key in ("edge density", "stroke width", "saturation")
            cells.append(said(row.cells[key], 3 if plainly else 1 if shown_percent else 2, signed=not plainly and key != "Vendi"))
        lines.append(f"| {row.name} | {'' if row.scale is None else f'{row.scale:+.3g}'} | " + " | ".join(cells) + " |")
    return lines


def label(row: Row) -> str:
    """Name on an axis."""
    if row.scale is None:
        return row.name
    return f"{SYMBOLS.get(row.name, row.name.removesuffix(' direction'))}{'+' if row.scale > 0 else '−'}"


def draw_responses(models: dict[str, list[Row]]) -> Figure:
    """Shifts of the true descriptors, and of what the images show, for every objective at equal image change."""
    figure = Figure(figsize=(13, 3.6 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), 2, squeeze=False, width_ratios=(1.3, 1))
    for (model, rows), (left, right) in zip(models.items(), grid, strict=True):
        own = [row for row in rows if row.scale is not None]
        places = np.arange(len(own))
        for i, descriptor in enumerate(DESCRIPTORS):
            values, errors = zip(*(row.cells[descriptor] for row in own), strict=True)
            style = {"color": COLOURS[descriptor], "label": f"true {SYMBOLS[descriptor]}", "error_kw": {"linewidth": 1}}
            left.bar(places + 0.26 * (i - 1), values, 0.24, yerr=errors, **style)
        left.set(ylabel="shift (s.d. of unguided, ± 1 s.e.)", title=f"{model}: true descriptors")
        shown = [key for key in ("edge density", "stroke width", "saturation") if key in own[0].cells]
        for i, key in enumerate(shown):
            values, errors = zip(*(row.cells[key] for row in own), strict=True)
            style = {"color": ("#6a3d9a", "#ff7f00")[i], "label": key, "error_kw": {"linewidth": 1}}
            right.bar(places + 0.38 * (i - 0.5), values, 0.36, yerr=errors, **style)
        right.set(ylabel="change (% of unguided mean, ± 1 s.e.)", title=f"{model}: what the images show")
        for axes in (left, right):
            axes.set_xticks(places, [label(row) for row in own])
            axes.axhline(0, color="#333333", linewidth=0.8)
            axes.grid(axis="y", alpha=0.3)
            axes.margins(y=0.2)  # room for the legend
            axes.legend(fontsize=8, ncols=3, loc="upper right")
            axes.set_xlabel("guided by")
    return figure


def draw_samples(models: dict[str, list[Row]], count: int = 20) -> Figure:
    """The same seeds under every objective."""
    figure = Figure(figsize=(11, 4.4 * len(models)), layout="constrained")
    for (model, rows), axes in zip(models.items(), figure.subplots(len(models), 1, squeeze=False)[:, 0], strict=True):
        sheet(axes, rows, min(count, len(rows[0].samples)))
        axes.set_title(f"{model}: the same seeds under every objective")
    return figure


def sheet(axes: Any, rows: list[Row], count: int) -> None:
    """A contact sheet: a line a row."""
    channels, size = rows[0].samples.shape[1:3]
    pixels = np.ones(((size + 1) * len(rows) - 1, (size + 1) * count - 1, channels))
    for i, row in enumerate(rows):
        for j, image in enumerate(row.samples[:count].permute(0, 2, 3, 1).numpy()):
            pixels[(size + 1) * i :, (size + 1) * j :][:size, :size] = (image.clip(-1, 1) + 1) / 2
    axes.imshow(pixels if channels == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks((size + 1) * np.arange(len(rows)) + size / 2, [label(row) for row in rows])
    axes.set_xticks([])
