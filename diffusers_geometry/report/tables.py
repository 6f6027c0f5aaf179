"""The tables of a report: quantities over the steps, every run, what was asked for, what it cost, how to repeat it."""

from __future__ import annotations

import math
from typing import Any

from .document import QUANTITIES
from .spectra import heading, shares
from .text import MISSING, count, estimate, noise, number, percent, prompt_name, seconds, shortened, with_error

ROWS = 2000


def unit_name(document: dict[str, Any], unit: dict[str, Any]) -> str:
    """A unit in words: its prompt and its seed."""
    if unit["prompt"] is None:
        return f"sample {unit['index']}"
    request = document["request"]
    return f"{shortened(prompt_name(request['kind'], request['prompts'][unit['prompt']]), 80)}, seed {unit['seed']}"


def has(document: dict[str, Any], name: str) -> bool:
    """Whether any step has a value of this quantity."""
    return any((g.get(name) or {}).get("value") is not None for g in document["geometry"])


def step_table(document: dict[str, Any]) -> dict[str, Any]:
    """Means over runs at every recorded step: head and rows of texts."""
    known = [i for i, (name, _, _) in enumerate(QUANTITIES) if has(document, name)]
    rows = []
    for step, geometry in zip(document["steps"], document["geometry"], strict=False):
        numbers = [estimate(geometry.get(QUANTITIES[i][0]), why=False) for i in known]
        rows.append([noise(step["sigma"]), *numbers, shares(geometry.get("phases") or {})])
    return {"head": ["noise σ", *(heading(i) for i in known), "phase (share of runs)"], "rows": rows}


def unit_table(document: dict[str, Any]) -> dict[str, Any]:
    """Every run: head (name, explanation, whether it is a number) and rows of (value to sort by, text).

    Of a very large audit those that failed, then those of the most suspicious prompts, as many as a browser can sort.
    """
    ranks = {p["index"]: p.get("rank") for p in document["prompts"]}
    ranked = any(ranks.values())
    asked = any(unit["prompt"] is not None for unit in document["units"])
    late = [(i, name) for i, (name, _, _) in enumerate(QUANTITIES[:5]) if has(document, name)]
    over = (("asymmetry", "asymmetry", min, "smallest"), ("spectral_norm", "largest singular value", max, "largest"),
            ("certificate_error", "certificate error", max, "largest"))  # fmt: skip
    head = [("run", "number of the run", True)]
    head += [("prompt", "what was asked for", False), ("seed", "of the random numbers", True)] if asked else []
    head += [("suspicion", "rank of its prompt, 1 is most suspicious", True)] if ranked else []
    head += [("phase", "at the smallest noise", False), ("manifold dimension", "clear count of directions", True)]
    head += [(heading(i), "at the smallest noise", True) for i, _ in late]
    head += [(words, f"{which} over the run", True) for _, words, _, which in over]
    head += [("not finite", "values that are no number or infinite", True), ("products", "Jacobian products spent", True)]
    rows = []
    first = sorted(document["units"], key=lambda u: (u["status"] == "done", ranks.get(u["prompt"]) or math.inf, u["index"]))
    for unit in sorted(first[:ROWS], key=lambda u: u["index"]):
        steps = unit.get("steps") or []
        last = min((s for s in steps if s.get("sigma") is not None), key=lambda s: s["sigma"], default={})
        cells = [_cell(unit["index"])]
        if asked:
            request = document["request"]
            cells += [(None, shortened(prompt_name(request["kind"], request["prompts"][unit["prompt"]]), 160)), _cell(unit["seed"])]
        cells += [_cell(ranks.get(unit["prompt"]))] if ranked else []
        cells += [(None, "failed" if unit["status"] != "done" else last.get("phase") or MISSING), _cell(unit.get("manifold_dim"))]
        cells += [(last.get(name), with_error(last.get(name), last.get(f"{name}_sem"))) for _, name in late]
        cells += [_cell(of((s[name] for s in steps if s.get(name) is not None), default=None)) for name, _, of, _ in over]
        cells += [_cell(unit.get("non_finite")), _cell(unit.get("products"))]
        rows.append({"index": unit["index"], "failed": unit["status"] != "done", "cells": cells})
    return {"head": head, "rows": rows}


def _cell(value: float | None) -> tuple[float | None, str]:
    return value, number(value, 3)


def reference_table(document: dict[str, Any], names: list[str]) -> dict[str, Any] | None:
    """Flagged runs, each with the quantity and noise at which it is furthest out; None without a reference."""
    found = document["out_of_distribution"]
    if found is None:
        return None
    headings = {name: heading for name, heading, _ in QUANTITIES}
    judged = {unit["index"]: unit for unit in found["units"]}
    rows = []
    for index in found["flagged"]:
        shares = [(v, name, i) for i, step in enumerate(judged[index]["steps"]) for name, v in step.items() if v is not None]
        share, name, step = min(shares, default=(None, MISSING, None))
        where = MISSING if step is None else f"{headings.get(name, name)} at σ = {noise(document['steps'][step]['sigma'])}"
        rows.append((index, names[index], number(judged[index]["p_value"], 2), where, percent(share)))
    return {"rows": rows, "runs": len(judged), "explanation": found.get("explanation") or "", "of": found.get("reference") or {}}


def facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the numbers come from: (what, value)."""
    model, request, provenance = document["model"], document["request"], document["provenance"]
    plan, options = document["plan"] or {}, request.get("options") or {}
    kept = {name: value for name, value in options.items() if value is not None and not isinstance(value, (dict, list))}
    found = [
        ("model", model.get("name")), ("revision", model.get("revision")), ("pipeline", model.get("pipeline")),
        ("scheduler", (model.get("scheduler") or {}).get("class")), ("number format", model.get("dtype")),
        ("device", model.get("device")), ("hash of all weights (SHA-256)", model.get("weights_sha256")),
        ("hash of the prompts (SHA-256)", request.get("prompts_sha256")),
        ("seeds", _list(request.get("seeds"))), ("arguments of the pipeline", _pairs(request.get("call"))),
        ("method", " by ".join(str(plan[name]) for name in ("method", "engine") if plan.get(name))),
        ("dimension of a sample", None if plan.get("dimension") is None else number(plan["dimension"])),
        ("options of the analysis", _pairs(kept)),
        ("versions", _pairs(provenance.get("versions"))), ("threads", provenance.get("threads")),
        ("reference audit (SHA-256)", request.get("reference")), ("command", provenance.get("command")),
    ]  # fmt: skip
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def costs(document: dict[str, Any]) -> list[tuple[str, str]]:
    """What it cost: (what, value)."""
    units, plan, run = document["units"], document["plan"] or {}, document["run"] or {}
    products = sum(unit.get("products") or 0 for unit in units)
    forwards = [unit["forwards"] for unit in units if unit.get("forwards") is not None]
    found = [("Jacobian products", _planned(number(products), number(plan.get("products"))))]
    if forwards:
        found.append(("network evaluations of one sample", _planned(number(sum(forwards)), number(plan.get("forwards")))))
    if run:
        found.append(
            ("computing time, all processes together", _planned(seconds(run.get("seconds")), seconds(plan.get("seconds"))))
        )
        each = [s for s in run.get("unit_seconds") or [] if s is not None]
        found += [("time of one run (mean)", seconds(sum(each) / len(each)))] if each else []
        found.append(("done with", count(run.get("processes") or 1, "process", "processes")))
        found.append(("from, to", f"{run.get('started') or MISSING}, {run.get('finished') or MISSING}"))
    if plan.get("memory_bytes"):
        found.append(("memory of probing (planned)", f"{plan['memory_bytes'] / 2**20:,.0f} MiB"))
    return found


def _planned(spent: str, planned: str) -> str:
    return spent if planned == MISSING else f"{spent} (planned: {planned})"


def _pairs(values: dict[str, Any] | None) -> str | None:
    known = [f"{name} {MISSING if value is None else value}" for name, value in (values or {}).items()]
    return ", ".join(known) or None


def _list(values: list[Any] | None) -> str | None:
    """A list in words, consecutive whole numbers as a range."""
    if not values:
        return None
    whole = all(isinstance(v, int) for v in values)
    if whole and len(values) > 2 and values == list(range(values[0], values[0] + len(values))):
        return f"{values[0]} to {values[-1]}"
    return shortened(", ".join(map(str, values)), 200)
