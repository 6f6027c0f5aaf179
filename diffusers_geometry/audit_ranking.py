"""The memorisation part of an audit: prompts ranked by their scores, and how well the scores separate what is labelled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .audit_request import AuditRequest
from .memorization import PROMPT_SCORES, SCORES, Ranking, Score, rank_prompts
from .memorization_detector import Quality
from .memorization_metrics import Interval
from .storage import finite

LEAST_PROMPTS = 3  # that can be compared
_UNRANKED = {"combined": None, "rank": None, "rank_interval": None, "flagged": None}


def memorization(request: AuditRequest, units: list[dict[str, Any]], prompts: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The ``memorization`` of docs/audit.md; fills ``combined``, ``rank``, ``rank_interval`` and ``flagged`` of the prompts in.

    Args:
        request: Of the audit.
        units: As ``audit.json`` has them.
        prompts: As ``audit.json`` has them, with their scores.
        steps: How many are recorded.
    """
    values = _values(request, units, prompts)
    ranking, reason = _ranking(request, values)
    for prompt, place in zip(prompts, ranking.prompts if ranking else [None] * len(prompts), strict=True):
        prompt |= _UNRANKED if place is None else {
            "combined": {"value": place.combined.value, "sem": finite(place.combined.sem), "n": _done(units, prompt)},
            "rank": place.rank, "rank_interval": place.rank_interval and list(place.rank_interval), "flagged": place.flagged,
        }  # fmt: skip
    return {
        "scores": [_score(known(name), steps, ranking) for name in values],
        "combined": {
            "weights": ranking.weights, "fitted_on": ranking.fitted_on, "threshold": finite(ranking.threshold),
            "certainty": ranking.certainty, **_quality(ranking.combined_quality),
        } if ranking else {"weights": {}, "fitted_on": None, "threshold": None, "certainty": reason, **_quality(None)},
    }  # fmt: skip


def known(name: str) -> Score:
    """A score of a run, or one of a whole prompt."""
    return SCORES[name] if name in SCORES else PROMPT_SCORES[name]


def _values(request: AuditRequest, units: list[dict[str, Any]], prompts: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Per score that some unit has, (prompts, seeds), NaN where a unit has none; agreement is (prompts,)."""
    shape = len(request.prompts), len(request.seeds)

    def of_units(name: str) -> np.ndarray:
        found = [unit["scores"].get(name, {}).get("value") for unit in units]
        return np.array([math.nan if v is None else v for v in found]).reshape(shape)

    names = [name for name in request.scores if any(name in unit["scores"] for unit in units)]
    agreement = np.array([math.nan if p["agreement"] is None else p["agreement"]["value"] for p in prompts])
    return {name: of_units(name) for name in names} | ({"agreement": agreement} if np.isfinite(agreement).any() and names else {})


def _ranking(request: AuditRequest, values: dict[str, np.ndarray]) -> tuple[Ranking | None, str]:
    """The ranking, or why there is none."""
    if not values:
        reason = "No score was asked for" if not request.scores else "No unit has scores"
        return None, f"{reason}, so prompts are not compared."
    compared = np.any([np.isfinite(v.reshape(len(v), -1)).any(axis=1) for v in values.values()], axis=0).sum()
    common = [n for n, v in values.items() if np.isfinite(v.reshape(len(v), -1)).any(axis=1).sum() == compared]
    if compared < LEAST_PROMPTS or not common:
        have = "1 prompt has" if compared == 1 else f"{compared} prompts have"
        return None, f"{have} scores; at least {LEAST_PROMPTS} are needed to compare prompts with one another."
    labels = request.labels if any(label is not None for label in request.labels) else None
    return rank_prompts(values, labels), ""


def _done(units: list[dict[str, Any]], prompt: dict[str, Any]) -> int:
    return sum(units[i]["status"] == "done" for i in prompt["units"])


def _score(score: Score, steps: int, ranking: Ranking | None) -> dict[str, Any]:
    return {
        "name": score.name, "formula": score.formula, "source": score.source, "url": score.url,
        "higher_is_memorised": score.higher_is_memorised, "forwards": score.cost * steps,
        **_quality(ranking.quality.get(score.name) if ranking else None),
        "correlation_with_combined": finite(ranking.correlation.get(score.name)) if ranking else None,
    }  # fmt: skip


def _quality(quality: Quality | None) -> dict[str, Any]:
    if quality is None:
        return {"auroc": None, "tpr_at_1_fpr": None, "roc": None}
    roc = {"fpr": quality.false_positive_rates, "tpr": quality.true_positive_rates}
    return {"auroc": _interval(quality.auroc), "tpr_at_1_fpr": _interval(quality.tpr_at_1_fpr), "roc": roc}


def _interval(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "low": finite(interval.low), "high": finite(interval.high)}
