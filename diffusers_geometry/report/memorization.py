"""What the page says of memorisation: the ranking of prompts with images, the scores with their quality and cost, ROC curves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .charts import legend_mark
from .document import Source
from .images import Thumbnail, thumbnails
from .quality_charts import cost_chart, rank_chart, roc_chart
from .summary import labelled
from .text import MISSING, count, estimate, interval, prompt_name, words

TOP, BOTTOM, SEEDS, ALL = 15, 3, 6, 24


@dataclass(frozen=True)
class Row:
    """One prompt with its images.

    Attributes:
        title: The prompt in words.
        units: Units whose images are shown.
        images: Their thumbnails.
        more: How many units of the prompt are not shown.
        rank: "3 (95 %: 2 to 5)", or None without a ranking.
        facts: (what, value), for prompts with scores.
        flagged: Whether the prompt is flagged.
        label: "known to be memorised", "known not to be", or None.
        gap: Whether prompts are left out before this one.
    """

    title: str
    units: list[int]
    images: dict[int, Thumbnail]
    more: int
    rank: str | None
    facts: list[tuple[str, str]]
    flagged: bool
    label: str | None
    gap: bool


def image_rows(source: Source) -> list[Row]:
    """Prompts with images: all of a small audit, else the most suspicious and the least, within the budget of images."""
    document = source.document
    prompts = document["prompts"] or [
        {"index": None, "prompt": None, "units": [unit["index"] for unit in document["units"]], "scores": {}}
    ]
    order = sorted(prompts, key=lambda p: (p.get("rank") is None, p.get("rank") or 0, p["index"] or 0))
    wanted = order if len(order) <= ALL else [*order[:TOP], *order[-BOTTOM:]]
    seeds = SEEDS if len(order) > 1 else 4 * SEEDS
    chosen = {id(p): [u for u in p["units"] if document["units"][u]["status"] == "done"][:seeds] for p in wanted}
    # The least suspicious row right after the most suspicious: a budget that is short leaves out the middle.
    first = sorted(wanted, key=lambda p: (wanted.index(p) != 0, wanted.index(p) != len(wanted) - 1))
    images = thumbnails(source.picture, [chosen[id(p)] for p in first])
    shown = [p for p in wanted if not chosen[id(p)] or any(u in images for u in chosen[id(p)])]
    if not any(t.uri or t.problem for t in images.values()) and not any(p.get("rank") is not None for p in prompts):
        return []
    rows, before = [], -1
    for prompt in shown:
        place = order.index(prompt)
        rows.append(_row(document, prompt, chosen[id(prompt)], images, gap=place != before + 1))
        before = place
    return rows


def _row(document: dict[str, Any], prompt: dict[str, Any], units: list[int], images: dict[int, Thumbnail], gap: bool) -> Row:
    kind, ranked = document["request"]["kind"], prompt.get("rank") is not None
    title = "samples" if prompt["index"] is None else prompt_name(kind, prompt["prompt"])
    facts = []
    if ranked:
        facts.append(("combined score", estimate(prompt.get("combined"), why=False)))
    if (prompt.get("agreement") or {}).get("value") is not None:
        facts.append(("agreement of seeds", estimate(prompt["agreement"], why=False)))
    if (prompt.get("manifold_dim") or {}).get("value") is not None:
        facts.append(("manifold dimension", estimate(prompt["manifold_dim"], why=False)))
    label = {True: "known to be memorised", False: "known not to be memorised", None: None}[prompt.get("label")]
    rank = rank_text(prompt) if ranked else None
    more = len(prompt["units"]) - len(units)
    return Row(title, units, images, more, rank, facts, bool(prompt.get("flagged")), label, gap)


def rank_text(prompt: dict[str, Any]) -> str:
    """ "3 (95 %: 2 to 5)"; the interval where it is known."""
    between = prompt.get("rank_interval")
    if not between:
        return str(prompt["rank"])
    return f"{prompt['rank']} (95 %: {between[0]}" + (f" to {between[1]})" if between[1] != between[0] else ")")


def memorization_view(document: dict[str, Any]) -> dict[str, Any] | None:
    """Charts and tables of the scores; None where no score was taken."""
    found = document["memorization"]
    if not found or not found.get("scores"):
        return None
    combined = found.get("combined") or {}
    scores = sorted(found.get("scores") or [], key=lambda s: -_value(s.get("auroc")))
    ranked = [p for p in document["prompts"] if p.get("rank") is not None]
    weights = combined.get("weights") or {}
    return {
        "combined": combined, "ranking": _ranking(document, combined.get("threshold")), "roc": _roc(combined, scores),
        "cost": _cost(scores), "labelled": labelled(ranked),
        "fitted_on": {"labels": "fitted on this audit's labels",
                      "robust z": "equal, every score in units of the bulk of prompts"}.get(combined.get("fitted_on"), MISSING),
        "scores": [
            s | {"weight": weights.get(s["name"]), "auroc_text": interval(s.get("auroc")),
                 "tpr_text": interval(s.get("tpr_at_1_fpr")), "auroc_value": (s.get("auroc") or {}).get("value"),
                 "tpr_value": (s.get("tpr_at_1_fpr") or {}).get("value")}
            for s in scores
        ],
        "auroc_text": interval(combined.get("auroc")), "tpr_text": interval(combined.get("tpr_at_1_fpr")),
        "has_quality": any(_value(s.get("auroc")) > -math.inf for s in [*scores, combined]),
    }  # fmt: skip


def _value(estimate: dict[str, Any] | None) -> float:
    value = (estimate or {}).get("value")
    return -math.inf if value is None else value


def _ranking(document: dict[str, Any], threshold: float | None) -> dict[str, Any] | None:
    """The chart of all prompts; series 0 are not flagged, 3 flagged; with labels 1 is known not to be memorised, 3 known to be."""
    prompts = sorted((p for p in document["prompts"] if p.get("rank") is not None), key=lambda p: p["rank"])
    prompts = [p for p in prompts if (p.get("combined") or {}).get("value") is not None]
    if not prompts:
        return None
    if any(p.get("label") is not None for p in prompts):
        groups = [{True: 3, False: 1, None: 0}[p.get("label")] for p in prompts]
        names = {3: "known to be memorised", 1: "known not to be memorised", 0: "not known"}
    else:
        groups = [3 if p.get("flagged") else 0 for p in prompts]
        names = {3: "flagged", 0: "not flagged"}
    values, sems = ([p["combined"].get(key) for p in prompts] for key in ("value", "sem"))
    chart = rank_chart(f"Combined score of {count(len(prompts), 'prompt')} by rank", values, sems, groups, threshold)
    legend: list[tuple[Markup, str]] = [(legend_mark(g), name) for g, name in names.items() if g in groups]
    return {"chart": chart, "legend": legend, "threshold": threshold}


def _roc(combined: dict[str, Any], scores: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the combined score and the three best single ones."""
    wanted = [{"name": "all scores combined", **combined}, *scores[:3]]
    curves = [(s["name"], s["roc"]["fpr"], s["roc"]["tpr"]) for s in wanted if s.get("roc")]
    if not curves:
        return None
    legend = [
        (legend_mark(i), f"{words(s['name'])}: {interval(s.get('auroc'))}") for i, s in enumerate(s for s in wanted if s.get("roc"))
    ]
    return {"chart": roc_chart("ROC curves of the combined score and the best single ones", curves), "legend": legend}


def _cost(scores: list[dict[str, Any]]) -> Markup | None:
    known = [s for s in scores if (s.get("auroc") or {}).get("value") is not None and s.get("forwards") is not None]
    points = [(s["name"], float(s["forwards"]), s["auroc"]["value"], s["auroc"].get("low"), s["auroc"].get("high")) for s in known]
    return cost_chart("AUROC of single scores against their cost", points) if len(points) > 1 else None
