"""``audit.json``, the spectra and the images, made from the plan and the units alone, so that they can be made again at any time.

Units are read one after another; what stays in memory of a unit are the numbers that ``audit.json`` holds of it.
"""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from .audit_folder import AUDIT, REFERENCE, SPECTRA, AuditFolder, read_json
from .audit_health import health
from .audit_ranking import memorization
from .audit_reference import out_of_distribution
from .audit_request import AuditRequest
from .audit_unit import estimate_document
from .memorization import cross_seed_agreement

SCHEMA = "diffusers_geometry.audit/1"
GEOMETRY = ("psi", "nu", "delta", "effective_dimension", "gap_dim", "flipd", "spectral_norm", "asymmetry")


def summarise(folder: AuditFolder) -> dict[str, Any]:
    """Writes everything that is made from the units, and returns ``audit.json`` as a dict.

    Raises:
        ValueError: units are missing or damaged.
        AuditStopped: the folder cannot be written.
    """
    plan = folder.read_plan()
    request = AuditRequest.from_dict(plan["request"])
    missing = len(request) - folder.finished(len(request))
    if missing:
        raise ValueError(
            f"{folder.path} holds {len(request) - missing} of {len(request)} units. Expected all: run the audit again to "
            "continue it."
        )
    levels = _write_spectra(folder, len(request))
    units, runs, agreements = [], [], []
    for prompt in range(len(request.prompts)):
        finals = []
        for i in range(prompt * len(request.seeds), (prompt + 1) * len(request.seeds)):
            unit, run, final = _unit(folder, request, i)
            units.append(unit)
            runs.append(run)
            finals += [torch.from_numpy(final)] if final is not None and np.isfinite(final).all() else []
        agreement = cross_seed_agreement(torch.stack(finals)) if len(finals) > 1 else None
        agreements.append(None if agreement is None else estimate_document(agreement, len(finals)))
    document = _document(plan, request, units, levels, agreements) | {"run": _run(plan, runs)}
    if request.reference is not None:
        hashes = [prompt["sha256"] for prompt in document["prompts"]]
        document["out_of_distribution"] = out_of_distribution(units, levels, read_json(folder.path / REFERENCE), hashes)
    folder.write_json(AUDIT, document)
    return document


def estimate(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean, standard error and count of the values that are known; None without one."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    sem = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return {"value": math.fsum(known) / len(known), "sem": sem, "n": len(known)}


def _unit(folder: AuditFolder, request: AuditRequest, i: int) -> tuple[dict[str, Any], dict[str, Any], np.ndarray | None]:
    """(entry of ``units``, what differs between runs, final sample) of a unit; writes its image."""
    prompt, seed = request.place(i)
    if folder.state(i) == "failed":
        error, run = folder.read_failure(i)
        empty = {"steps": [], "scores": {}, "manifold_dim": None, "phases": {}, "non_finite": 0, "products": 0, "forwards": 0}
        place = {"index": i, "prompt": prompt, "seed": seed, "status": "failed", "error": error, "image": None}
        return place | empty, run, None
    unit, run, arrays = folder.read_unit(i, "image", "final_sample")
    unit.pop("levels")
    name = f"images/{i:05d}.png" if "image" in arrays else None
    if name is not None:
        folder.write(name, _png(arrays["image"]))
    return unit | {"image": name}, run, arrays["final_sample"]


def _document(
    plan: dict[str, Any],
    request: AuditRequest,
    units: list[dict[str, Any]],
    levels: list[dict[str, Any]],
    agreements: list[dict[str, Any] | None],
) -> dict[str, Any]:
    """Everything that two runs of one plan share."""
    done = [unit for unit in units if unit["status"] == "done"]
    dims = [unit["manifold_dim"] for unit in done]
    prompts = [_prompt(request, p, units, agreements[p]) for p in range(len(request.prompts))]
    found = memorization(request, units, prompts, len(levels))
    return {
        "schema": SCHEMA,
        "model": plan["model"],
        "request": plan["request"],
        "plan": plan["plan"],
        "steps": levels,
        "geometry": [_geometry([unit["steps"][k] for unit in done]) for k in range(len(levels))],
        "manifold_dim": estimate(dims) and estimate(dims) | {"share": sum(d is not None for d in dims) / len(dims)},
        "prompts": prompts,
        "memorization": found,
        "health": health(units, plan["model"]["dtype"]),
        "out_of_distribution": None,
        "units": units,
        "provenance": plan["provenance"],
    }


def _geometry(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """One recorded step over all units."""
    phases = [step["phase"] for step in steps]
    shares = {phase: phases.count(phase) / len(phases) for phase in sorted(set(phases))}
    return {name: estimate(step[name] for step in steps) for name in GEOMETRY} | {"phases": shares}


def _prompt(request: AuditRequest, p: int, units: list[dict[str, Any]], agreement: dict[str, Any] | None) -> dict[str, Any]:
    """One prompt over its seeds; :func:`~.audit_ranking.memorization` fills its rank in."""
    mine = [unit for unit in units if unit["prompt"] == p]
    names = [name for name in request.scores if any(name in unit["scores"] for unit in mine)]
    scores = {n: estimate(u["scores"][n]["value"] for u in mine if n in u["scores"]) for n in names}
    return {
        "index": p, "prompt": request.prompts[p], "sha256": request.prompt_sha256(p), "label": request.labels[p],
        "units": [unit["index"] for unit in mine], "scores": scores,
        "psi": estimate(unit["steps"][-1]["psi"] for unit in mine if unit["steps"]),
        "manifold_dim": estimate(unit["manifold_dim"] for unit in mine), "agreement": agreement,
    }  # fmt: skip


def _run(plan: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What differs between two runs of one plan."""
    return {
        "started": plan["run"]["started"], "finished": max(run["finished"] for run in runs),
        "seconds": math.fsum(run["seconds"] for run in runs), "unit_seconds": [run["seconds"] for run in runs],
        "processes": len({(run["host"], run["process"]) for run in runs}), "host": plan["run"]["host"],
    }  # fmt: skip


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _write_spectra(folder: AuditFolder, count: int) -> list[dict[str, Any]]:
    """Writes ``spectra.safetensors`` unit by unit, and returns the recorded steps."""
    done = [i for i in range(count) if folder.state(i) == "done"]
    shapes = [folder.shape(i, "singular_values") for i in done]
    steps, width = max((s[0] for s in shapes), default=0), max((s[1] for s in shapes), default=0)
    folder.write_chunks(SPECTRA, _spectra(folder, set(done), count, steps, width))
    return folder.read_unit(done[0])[0]["levels"] if done else []


def _spectra(folder: AuditFolder, done: set[int], count: int, steps: int, width: int) -> Iterator[bytes]:
    """The safetensors format: the header's length in 8 bytes, the header as JSON, the arrays."""
    sizes = [4 * count * steps * width, 8 * count * steps]
    header = {
        "singular_values": {"dtype": "F32", "shape": [count, steps, width], "data_offsets": [0, sizes[0]]},
        "sigma": {"dtype": "F64", "shape": [count, steps], "data_offsets": [sizes[0], sum(sizes)]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, shape, dtype in (("singular_values", (steps, width), "<f4"), ("sigma", (steps,), "<f8")):
        for i in range(count):
            row = np.full(shape, np.nan, dtype)
            if i in done:
                values = folder.read_unit(i, name)[2][name]
                row[tuple(slice(n) for n in values.shape)] = values
            yield row.tobytes()
