"""Charts of memorisation: prompts by rank, ROC curves, quality against cost. See :mod:`.charts` for how charts are made."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from .charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, bottom_ticks, error_bar, frame, marker, svg, vertical
from .text import number


def rank_chart(
    title: str, values: Sequence[float], sems: Sequence[float | None], groups: Sequence[int], threshold: float | None
) -> Markup:
    """Combined scores of prompts, most suspicious first, with one standard error and the threshold of flags.

    Args:
        title: Read out in place of the picture.
        values: In the order of ranks.
        sems: Their standard errors.
        groups: Which series each belongs to (flagged or not, known to be memorised or not).
        threshold: Above which prompts are flagged.
    """
    known = [e or 0.0 for e in sems]
    ends = [v + side * e for v, e in zip(values, known, strict=True) for side in (-1, 1)]
    y = vertical([*ends, *([] if threshold is None else [threshold])])
    x = Axis(0.5, len(values) + 0.5, LEFT, WIDTH - RIGHT)
    places = [int(t) for t in x.ticks(6) if float(t).is_integer() and 1 < t < 0.93 * len(values)]
    ticks = [(x(t), number(t)) for t in sorted({1, *places, len(values)})]
    body = [frame(y, "combined score"), bottom_ticks(ticks, "rank (1 is most suspicious)")]
    if threshold is not None:
        body.append(Markup('<path class="reference" d="M{} {:.1f}H{}"/>').format(LEFT, y(threshold), WIDTH - RIGHT))
    point = Markup('<g class="series-{}"><path class="error" d="{}"/>{}</g>')
    for rank, (value, sem, group) in enumerate(zip(values, known, groups, strict=True), start=1):
        bar = error_bar(x(rank), y, value - sem, value + sem) if sem else ""
        body.append(point.format(group, bar, marker(x(rank), y(value), group)))
    return svg(title, body)


def roc_chart(title: str, curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Markup:
    """Receiver operating characteristics, share of false against share of true alarms.

    Args:
        title: Read out in place of the picture.
        curves: (name, false positive rates, true positive rates).
    """
    x, y = Axis(0, 1, LEFT, WIDTH - RIGHT), Axis(0, 1, HEIGHT - BOTTOM, TOP)
    body = [frame(y, "share of memorised found"), bottom_ticks([(x(t), number(t)) for t in x.ticks()], "share of false alarms")]
    body.append(Markup('<path class="reference" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(x(0), y(0), x(1), y(1)))
    for i, (name, false, true) in reversed(list(enumerate(curves))):
        path = "L".join(f"{x(f):.1f} {y(t):.1f}" for f, t in zip(false, true, strict=True))
        body.append(Markup('<path class="line roc series-{}" d="M{}"><title>{}</title></path>').format(i, path, name))
    return svg(title, body)


def cost_chart(title: str, points: Sequence[tuple[str, float, float, float | None, float | None]]) -> Markup:
    """AUROC against cost: (name, cost in forwards, AUROC, low, high)."""
    y = vertical([v for p in points for v in p[2:] if v is not None])
    x = Axis(-0.05 * max(p[1] for p in points), 1.1 * max(1.0, *(p[1] for p in points)), LEFT, WIDTH - RIGHT)
    ticks = [(x(t), number(t)) for t in x.ticks() if t >= 0]
    body = [frame(y, "AUROC"), bottom_ticks(ticks, "cost (network evaluations per run)")]
    for name, cost, value, low, high in points:
        bar = "" if low is None or high is None else error_bar(x(cost), y, low, high)
        says = f"{name}: AUROC {value:.3f} for {number(cost)} evaluations"
        body.append(
            Markup('<g class="series-0"><path class="error" d="{}"/>{}</g>').format(bar, marker(x(cost), y(value), 0, says))
        )
    return svg(title, body)
