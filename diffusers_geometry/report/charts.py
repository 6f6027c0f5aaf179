"""Charts of a report as inline SVG: no library, no colour of their own.

Colours, fonts and both themes are the style sheet's (classes ``series-0`` and so on), so a chart prints and darkens with its page.
Charts are drawn for a place 360 wide and stand in a grid that gives them about that, so that a telephone shows readable text.
Series differ by colour and by marker. Everything that comes from outside passes through ``Markup.format``, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from .text import noise, number

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 42
MARKERS = (
    "m-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0",  # circle
    "m-3 -3h6v6h-6z",  # square
    "m0 -3.8l3.6 6.4h-7.2z",  # triangle
    "m0 -4l4 4l-4 4l-4 -4z",  # diamond
)


@dataclass(frozen=True)
class Series:
    """One line: values with standard errors (None where not known), and its name."""

    name: str
    values: Sequence[float | None]
    sems: Sequence[float | None]

    def known(self) -> list[tuple[int, float, float]]:
        """(step, value, standard error or 0) of the values that are known."""
        pairs = enumerate(zip(self.values, self.sems, strict=True))
        return [(i, v, e or 0.0) for i, (v, e) in pairs if v is not None and math.isfinite(v)]


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to coordinates."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """About ``wanted`` round numbers within the scale."""
        rough = (self.high - self.low) / wanted
        power = 10 ** math.floor(math.log10(rough))
        size = next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999) * power
        first = math.ceil(self.low / size - 1e-9)
        return [k * size for k in range(first, math.floor(self.high / size + 1e-9) + 1)]


def legend_mark(index: int) -> Markup:
    """The line and marker of a series, for a legend."""
    swatch = '<svg class="swatch series-{}" viewBox="0 0 30 14" aria-hidden="true"><path d="M0 7H30"/>{}</svg>'
    return Markup(swatch).format(index, marker(15, 7, index))


def phase_mark(name: str) -> Markup:
    """The fill of a phase, for a legend."""
    rect = Markup('<rect class="phase-{}" x="1" y="1" width="28" height="12"/>').format(name)
    return Markup('<svg class="swatch" viewBox="0 0 30 14" aria-hidden="true">{}</svg>').format(rect)


def step_chart(title: str, series: Sequence[Series], sigmas: Sequence[float | None], y_label: str, zero: bool = False) -> Markup:
    """Lines over the recorded steps, noise falling to the right, with bars of one standard error.

    Args:
        title: Read out in place of the picture.
        series: What to draw.
        sigmas: Of the steps.
        y_label: Of the axis, with its unit.
        zero: Whether the axis begins at zero.
    """
    y = vertical([v + side * e for s in series for _, v, e in s.known() for side in (-1, 1)], zero)
    x = Axis(-0.5, len(sigmas) - 0.5, LEFT, WIDTH - RIGHT)
    return svg(title, [frame(y, y_label), _step_ticks(x, sigmas), *(_line(s, i, x, y, sigmas) for i, s in enumerate(series))])


def phase_chart(title: str, phases: Sequence[dict[str, float]], sigmas: Sequence[float | None]) -> Markup:
    """Shares of units in each phase as stacked bars over the recorded steps."""
    x = Axis(-0.5, len(sigmas) - 0.5, LEFT, WIDTH - RIGHT)
    y = Axis(0, 100, HEIGHT - BOTTOM, TOP)
    body = [frame(y, "share (%)"), _step_ticks(x, sigmas), _HATCH]
    wide = max(0.86 * (x(1) - x(0)), 1.0)
    rect = Markup('<rect class="phase-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>')
    for i, shares in enumerate(phases):
        below = 0.0
        for name in ("unresolved", "trivial", "coverage", "consolidation"):
            share = 100 * (shares.get(name) or 0.0)
            if share:
                says = f"σ = {noise(sigmas[i])}: {share:.0f} % {name}"
                body.append(rect.format(name, x(i) - wide / 2, y(below + share), wide, y(below) - y(below + share), says))
            below += share
    return svg(title, body)


def spectrum_panel(title: str, middle: np.ndarray, low: np.ndarray, high: np.ndarray, top: float, index: np.ndarray) -> Markup:
    """One small spectrum: the median over units with the band that holds 80 % of them.

    Args:
        title: Read out in place of the picture.
        middle: Singular values, descending, (points,).
        low: Lower end of the band.
        high: Upper end.
        top: End of the vertical scale, the same in every panel.
        index: Which singular values these are, from 1.
    """
    wide, tall, left, bottom = 150, 104, 26, 16
    x, y = Axis(0, max(float(index[-1]), 1.0), left, wide - 6), Axis(0, top, tall - bottom, 6)
    there = [f"{x(i):.1f} {y(v):.1f}" for i, v in zip(index, high, strict=True)]
    back = [f"{x(i):.1f} {y(v):.1f}" for i, v in zip(index[::-1], low[::-1], strict=True)]
    path = [f"{x(i):.1f} {y(v):.1f}" for i, v in zip(index, middle, strict=True)]
    upper, text = y.ticks(2)[-1], Markup('<text class="small" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    body = [
        Markup('<path class="axis" d="M{} {}H{}M{} 6V{}"/>').format(left, tall - bottom, wide - 6, left, tall - bottom),
        text.format(left - 3, y(upper) + 4, "end", number(upper, 3)), text.format(left - 3, tall - bottom + 3, "end", 0),
        text.format(left, tall - 4, "start", int(index[0])),
        text.format(wide - 6, tall - 4, "end", int(index[-1])) if len(index) > 1 else "",
        Markup('<path class="band series-0" d="M{}Z"/>').format("L".join(there + back)),
        Markup('<path class="line series-0" d="M{}"/>').format("L".join(path)),
    ]  # fmt: skip
    return svg(title, body, wide, tall)


def svg(title: str, body: Sequence[Markup | str], width: float = WIDTH, height: float = HEIGHT) -> Markup:
    """A chart with its name for those who do not see it."""
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, title)
    return head + Markup("").join(body) + Markup("</svg>")


def vertical(values: Sequence[float], zero: bool = False) -> Axis:
    """A vertical scale with some room around the values."""
    found = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(found), max(found)
    low = min(low, 0.0) if zero else low
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return Axis(low - (0 if zero and low == 0 else room), high + room, HEIGHT - BOTTOM, TOP)


def frame(y: Axis, label: str) -> Markup:
    """Horizontal grid, tick labels and the name of the vertical axis."""
    body = Markup("")
    for tick in y.ticks():
        body += Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y(tick), WIDTH - RIGHT)
        body += Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 5, y(tick) + 4, number(tick, 3))
    middle = (y.start + y.stop) / 2
    body += Markup('<text transform="translate(12 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>').format(middle, label)
    return body + Markup('<path class="axis" d="M{} {:.1f}H{}"/>').format(LEFT, y.start, WIDTH - RIGHT)


def bottom_ticks(ticks: Sequence[tuple[float, str]], label: str) -> Markup:
    """Tick labels and the name of the horizontal axis."""
    body = Markup("")
    for place, text in ticks:
        body += Markup('<path class="axis" d="M{:.1f} {}v4"/>').format(place, HEIGHT - BOTTOM)
        body += Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(place, HEIGHT - BOTTOM + 16, text)
    middle = (LEFT + WIDTH - RIGHT) / 2
    return body + Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(middle, HEIGHT - 6, label)


def marker(x: float, y: float, index: int, title: str = "") -> Markup:
    """The point of a series; what the title says appears under the pointer."""
    says = Markup("<title>{}</title>").format(title) if title else ""
    return Markup('<path class="marker" d="M{:.1f} {:.1f}{}">{}</path>').format(x, y, MARKERS[index % len(MARKERS)], says)


def error_bar(x: float, y: Axis, low: float, high: float) -> str:
    """The path of a vertical bar."""
    return f"M{x:.1f} {y(low):.1f}V{y(high):.1f}"


def _step_ticks(x: Axis, sigmas: Sequence[float | None]) -> Markup:
    every = max(1, math.ceil(len(sigmas) / 7))
    return bottom_ticks([(x(i), noise(sigmas[i])) for i in range(0, len(sigmas), every)], "noise σ (generation runs to the right)")


def _line(series: Series, index: int, x: Axis, y: Axis, sigmas: Sequence[float | None]) -> Markup:
    """Line, error bars and markers of a series; a gap where a value is not known."""
    path, bars, marks, before = "", "", Markup(""), None
    for i, value, sem in series.known():
        path += f"{'L' if before == i - 1 else 'M'}{x(i):.1f} {y(value):.1f}"
        bars += error_bar(x(i), y, value - sem, value + sem) if sem else ""
        says = f"{series.name} at σ = {noise(sigmas[i])}: {number(value)}" + (f" ± {sem:.2g}" if sem else "")
        marks, before = marks + marker(x(i), y(value), index, says), i
    group = '<g class="series-{}"><path class="line" d="{}"/><path class="error" d="{}"/>{}</g>'
    return Markup(group).format(index, path, bars, marks)


_HATCH = Markup(
    '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect class="hatch-ground" width="6" height="6"/><path class="hatch-line" d="M1 0V6"/></pattern></defs>'
)
