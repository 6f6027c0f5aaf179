"""Units unlike those of a reference audit: out of distribution, with a false-alarm rate that holds without assumptions on shape.

Per step and quantity, a unit's distance from the reference is |value - median| / (1.4826 MAD), with median and MAD of the
reference's units *and the unit itself*. Its score is the largest of these distances. Were it a unit like the reference's, all n + 1
scores would be exchangeable, so that the conformal p-value

    p = (1 + #{reference units whose score is at least as large}) / (n + 1)

is at most a with a probability of at most a, whatever the distribution (Vovk et al., Algorithmic Learning in a Random World, 2005).
Exchangeable means that prompts and seeds were drawn alike; units that share a prompt are alike, so that it is prompts that count.
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
    }  # fmt: skip


def out_of_distribution(units: list[dict[str, Any]], steps: list[dict[str, Any]], reference: dict[str, Any]) -> dict[str, Any]:
    """The ``out_of_distribution`` of docs/audit.md.

    Args:
        units: Of this audit.
        steps: Its recorded steps.
        reference: As :func:`reference_document` made it.

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
    level = max(FALSE_ALARMS, 1 / (len(known) + 1))
    rows = []
    for unit in (unit for unit in units if unit["status"] == "done"):
        mine = _array([[[step[name] for name in QUANTITIES] for step in unit["steps"]]])[0]
        distances = _distances(np.concatenate([known, mine[None]]))
        further = np.where(np.isfinite(mine), (distances[:-1] >= distances[-1]).mean(axis=0), np.nan)
        scores = np.nan_to_num(distances, nan=0.0).reshape(len(distances), -1).max(axis=1)
        p_value = float((scores >= scores[-1]).sum() / len(scores))
        shares = [{n: None if math.isnan(v) else float(v) for n, v in zip(QUANTITIES, row, strict=True)} for row in further]
        rows.append({"index": unit["index"], "p_value": p_value, "score": float(scores[-1]), "steps": shares})
    text = (
        f"A unit is flagged when at most {level:.3g} of units like the reference's would be as far out: of {len(rows)} such units "
        f"{level * len(rows):.2g} would be flagged falsely. The reference has {len(known)} units of {reference['prompts']} prompts."
    )
    return {
        "reference": {"name": reference["name"], "sha256": reference["sha256"], "units": len(known)},
        "quantities": list(QUANTITIES), "false_alarm_rate": level, "expected_false_alarms": level * len(rows), "explanation": text,
        "units": rows, "flagged": [row["index"] for row in rows if row["p_value"] <= level + 1e-12],
    }  # fmt: skip


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
