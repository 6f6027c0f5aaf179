"""Units unlike those of a reference audit: out of distribution, with a false-alarm rate that holds without assumptions on shape.

Per step and quantity, a unit's distance from the reference is |value - median| / (1.4826 MAD), with median and MAD of the
reference's units *and the unit itself*. Its score is the largest of these distances. Were it a unit like the reference's, all n + 1
scores would be exchangeable, so that the conformal p-value

    p = (1 + #{reference units whose score is at least as large}) / (n + 1)

is at most a with a probability of at most a, whatever the distribution (Vovk et al., Algorithmic Learning in a Random World, 2005).
Exchangeable means that prompts and seeds were drawn alike. Where this audit asks for the reference's own prompts, with other seeds
or of another model, its units are like the reference's. Where it has others, units that share a prompt are one observation: it is G
prompts that count, not n units, and each unit counts as the share that it has of its prompt (Lee, Barber and Willett,
Distribution-free inference with hierarchical data, 2023, section 2)

    p = (1 + sum over prompts of the share of their units whose score is at least as large) / (G + 1)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

QUANTITIES = ("psi", "nu", "effective_dimension", "spectral_norm")
FALSE_ALARMS = 0.01  # per unit, where the reference is large enough to tell it


def reference_document(audit: dict[str, Any], sha256: str) -> dict[str, Any]:
    """What an audit keeps of the reference's ``audit.json``."""
    units = [unit for unit in audit["units"] if unit["status"] == "done"]
    if not units:
        raise ValueError(f"the reference of {audit['model']['name']} has no finished unit. Expected at least one.")
    values = [[[step[name] for name in QUANTITIES] for step in unit["steps"]] for unit in units]
    return {
        "sha256": sha256, "name": audit["model"]["name"], "positions": [step["position"] for step in audit["steps"]],
        "quantities": list(QUANTITIES), "prompts": len({unit["prompt"] for unit in units}), "values": values,
        "unit_prompts": [audit["prompts"][unit["prompt"]]["sha256"] for unit in units],
    }  # fmt: skip


def out_of_distribution(
    units: list[dict[str, Any]], steps: list[dict[str, Any]], reference: dict[str, Any], prompts: list[str]
) -> dict[str, Any]:
    """The ``out_of_distribution`` of docs/audit.md.

    Args:
        units: Of this audit.
        steps: Its recorded steps.
        reference: As :func:`reference_document` made it.
        prompts: SHA-256 of this audit's prompts.

    Raises:
        ValueError: the two audits record different steps.
    """
    positions = [step["position"] for step in steps]
    if steps and positions != reference["positions"]:
        raise ValueError(
            f"this audit records the steps {positions}, the reference {reference['positions']}. Expected the same --steps and "
            "--record-steps."
        )
    known = _array(reference["values"])  # (n, steps, quantities)
    weights, counted = _weights(reference["unit_prompts"], prompts)
    groups = round(weights.sum())
    level = max(FALSE_ALARMS, 1 / (groups + 1))
    rows = []
    for unit in (unit for unit in units if unit["status"] == "done"):
        mine = _array([[[step[name] for name in QUANTITIES] for step in unit["steps"]]])[0]
        distances = _distances(np.concatenate([known, mine[None]]))
        further = np.where(np.isfinite(mine), (distances[:-1] >= distances[-1]).mean(axis=0), np.nan)
        scores = np.nan_to_num(distances, nan=0.0).reshape(len(distances), -1).max(axis=1)
        p_value = float((1 + weights @ (scores[:-1] >= scores[-1])) / (groups + 1))
        shares = [{n: None if math.isnan(v) else float(v) for n, v in zip(QUANTITIES, row, strict=True)} for row in further]
        rows.append({"index": unit["index"], "p_value": p_value, "score": float(scores[-1]), "steps": shares})
    text = (
        f"A unit is flagged when at most {level:.3g} of units like the reference's would be as far out: of {len(rows)} such units "
        f"at most {level * len(rows):.2g} would be flagged falsely. The reference has {len(known)} units of {reference['prompts']} "
        f"prompts; {counted}."
    )
    return {
        "reference": {"name": reference["name"], "sha256": reference["sha256"], "units": len(known)},
        "quantities": list(QUANTITIES), "false_alarm_rate": level, "expected_false_alarms": level * len(rows), "explanation": text,
        "units": rows, "flagged": [row["index"] for row in rows if row["p_value"] <= level + 1e-12],
    }  # fmt: skip


def _weights(known: list[str], asked: list[str]) -> tuple[np.ndarray, str]:
    """What every unit of the reference counts (n,), from its prompt and those of this audit, and why."""
    if set(asked) <= set(known):
        return np.ones(len(known)), "this audit asks for the same prompts, so units count"
    return np.array([1 / known.count(prompt) for prompt in known]), "this audit asks for others, so prompts count"


def _distances(values: np.ndarray) -> np.ndarray:
    """|value - median| / (1.4826 MAD) over the first axis; 0 or infinity where half of the values are equal, NaN for NaN."""
    values = np.where(np.isfinite(values).any(axis=0), values, 0.0)  # what no unit has is no distance
    centre = np.nanmedian(values, axis=0)
    away = np.abs(values - centre)
    spread = 1.4826 * np.nanmedian(away, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(away == 0, 0.0, np.where(np.isnan(away), np.nan, away / spread))


def _array(values: list) -> np.ndarray:
    return np.array([[[math.nan if v is None else v for v in step] for step in unit] for unit in values], dtype=np.float64)
