"""What a report is made from: the folder of an audit, or of a trace brought into the same shape (one unit per sample).

Nothing is computed here that the folder does not say; a trace gets means over its samples, as an audit has them over units. A page
is sent to others, so that host names and places on this machine are left out here, see :mod:`~.disclosure`.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..disclosure import public_document
from ..trajectory import JSON_NAME as TRACE_NAME
from ..trajectory import GeometryTrace

SCHEMA, AUDIT_NAME, SPECTRA_NAME = "diffusers_geometry.audit/1", "audit.json", "spectra.safetensors"
MOMENTS = 60  # that are drawn
# Name in audit.json, heading, unit.
QUANTITIES = (
    ("psi", "ψ", "nats"), ("nu", "ν", "directions"), ("effective_dimension", "effective dimension", "directions"),
    ("gap_dim", "largest gap after", "directions"), ("flipd", "FLIPD", "directions"), ("delta", "δ", "sign changes"),
    ("spectral_norm", "largest singular value", ""), ("asymmetry", "asymmetry", ""),
)  # fmt: skip
_PARTS = ("model", "request", "plan", "steps", "geometry", "manifold_dim", "prompts", "memorization", "health",
          "out_of_distribution", "units", "provenance", "run")  # fmt: skip
_NEEDED = {"model": dict, "request": dict, "provenance": dict, "steps": list, "geometry": list, "prompts": list, "units": list}
_MEANS = {
    "psi": "psi", "nu": "nu", "effective_dimension": "effective_dimension", "gap_dim": "gap_dim", "flipd": "flipd",
    "spectral_norm": "largest_singular_value", "asymmetry": "asymmetry",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Source:
    """What a report is made from.

    Attributes:
        kind: "audit" or "trace".
        folder: Where it was read.
        document: Of the shape of ``audit.json``; parts that a trace does not have are None.
        spectra: Singular values, shape (units, steps, k), NaN for units that failed.
        picture: Gives a unit's image as a PIL image, None where it has none; raises ValueError if it cannot be read.
    """

    kind: Literal["audit", "trace"]
    folder: Path
    document: dict[str, Any]
    spectra: np.ndarray
    picture: Callable[[int], Any]


def read_source(folder: str | os.PathLike) -> Source:
    """Reads the folder of an audit or a trace.

    Raises:
        FileNotFoundError: it holds neither.
        ValueError: another version of the format, or a damaged file.
    """
    path = Path(folder)
    if (path / AUDIT_NAME).is_file():
        return _read_audit(path)
    if (path / TRACE_NAME).is_file():
        return _from_trace(path, GeometryTrace.from_pretrained(path))
    raise FileNotFoundError(f"{path} holds neither {AUDIT_NAME} nor {TRACE_NAME}. Expected the folder of an audit or a trace.")


def is_readable(schema: Any) -> bool:
    """Whether an audit.json of this schema can be read: another minor number only adds."""
    return str(schema).split(".")[:2] == SCHEMA.split(".")[:2]


def thinned(source: Source, most: int = MOMENTS) -> Source:
    """The same with at most ``most`` recorded steps, spread evenly over the run and with both its ends."""
    document = source.document
    if len(document["steps"]) <= most:
        return source
    kept = np.unique(np.linspace(0, len(document["steps"]) - 1, most).round().astype(int))
    units = [unit | {"steps": [unit["steps"][i] for i in kept] if unit.get("steps") else []} for unit in document["units"]]
    fewer = {name: [document[name][i] for i in kept] for name in ("steps", "geometry")}
    return replace(source, document=document | fewer | {"units": units}, spectra=source.spectra[:, kept])


def _read_audit(path: Path) -> Source:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        # An audit writes null for what is not known; a NaN of somebody else's hand means the same.
        document = json.loads((path / AUDIT_NAME).read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        raise ValueError(f"{path / AUDIT_NAME} is damaged: {error}. Expected JSON.") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if not is_readable(schema):
        raise ValueError(f"{path / AUDIT_NAME} has schema {schema!r}. Expected {SCHEMA!r}: use the version that wrote it.")
    if missing := [name for name in _PARTS if name not in document]:
        raise ValueError(f"{path / AUDIT_NAME} is damaged: it has no {', '.join(missing)}. Expected what docs/audit.md lists.")
    if wrong := [name for name, kind in _NEEDED.items() if not isinstance(document[name], kind)]:
        said = f"its {wrong[0]} is a {type(document[wrong[0]]).__name__}. Expected a {_NEEDED[wrong[0]].__name__}"
        raise ValueError(f"{path / AUDIT_NAME} is damaged: {said}, as docs/audit.md lists them.")
    if not (path / SPECTRA_NAME).is_file():
        raise FileNotFoundError(f"{path} has {AUDIT_NAME} but not {SPECTRA_NAME}. Expected both, as an audit writes them.")
    try:
        spectra = load_file(path / SPECTRA_NAME)["singular_values"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path / SPECTRA_NAME} is damaged: {error}. Expected singular_values (units, steps, k).") from error
    expected = (len(document["units"]), len(document["steps"]))
    if spectra.ndim != 3 or (spectra.size and spectra.shape[:2] != expected):
        raise ValueError(f"singular_values have shape {spectra.shape}. Expected {(*expected, 'k')}, as {AUDIT_NAME} lists them.")
    return Source("audit", path, public_document(document), spectra, lambda unit: _open(path, document["units"][unit].get("image")))


def _open(folder: Path, name: str | None) -> Any:
    """An image of the folder; a path that leads out of it is refused, whoever wrote the document."""
    if name is None:
        return None
    from PIL import Image

    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads out of the folder")
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read: {type(error).__name__}") from error


def _from_trace(path: Path, trace: GeometryTrace) -> Source:
    settings, rows, samples = trace.settings, trace.rows(), len(trace.manifold_dims)
    table = [[row for row in rows if row["sample"] == b] for b in range(samples)]
    steps = [{**_step(s), "position": s.index} for s in trace.steps]
    size = max(len(step.singular_values[0]) for step in trace.steps)
    spectra = np.full((samples, len(steps), size), np.nan)
    for i, step in enumerate(trace.steps):
        spectra[:, i, : step.singular_values.shape[1]] = step.singular_values
    units = [_unit(trace, b, table[b]) for b in range(samples)]
    known = [d for d in trace.manifold_dims if d is not None]
    versions = {name: settings[name] for name in ("diffusers_geometry", "diffusers", "torch", "python") if name in settings}
    plan = settings.get("plan", {})
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {"name": settings.get("model") or settings.get("pipeline", "model"), "pipeline": settings.get("pipeline"),
                  "scheduler": {"class": settings.get("scheduler")}},
        "request": {"kind": None, "prompts": [None], "seeds": [], "options": settings, "scores": [], "labels": [None]},
        "plan": {"method": trace.steps[0].method, "dimension": plan.get("size")},
        "steps": steps,
        "geometry": [_geometry([row for row in rows if row["step"] == s.index]) for s in trace.steps],
        "manifold_dim": {**mean(known), "share": len(known) / samples},
        "prompts": [], "memorization": None, "health": None, "out_of_distribution": None, "units": units,
        "provenance": {"versions": versions}, "run": None,
    }  # fmt: skip
    return Source("trace", path, public_document(document), spectra, lambda unit: _sample(trace.images, unit))


def mean(values: list[float]) -> dict[str, Any]:
    """An estimate over values: mean, standard error (None of one value), how many."""
    n = len(values)
    if not n:
        return {"value": None, "sem": None, "n": 0}
    sem = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"value": float(np.mean(values)), "sem": sem, "n": n}


def _step(step: Any) -> dict[str, Any]:
    sigma = step.sigma if math.isfinite(step.sigma) else None
    return {"timestep": step.timestep, "sigma": sigma, "alpha_t": step.alpha_t, "sigma_t": step.sigma_t}


def _geometry(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the samples of one step; of a single sample its own standard error."""
    found: dict[str, Any] = {"delta": None}
    for name, column in _MEANS.items():
        values = [row[column] for row in rows if row[column] is not None]
        found[name] = mean(values) if values else None
        if len(values) == 1 and len(rows) == 1:
            found[name]["sem"] = rows[0].get(f"{column}_sem")
    phases = Counter(row["phase"] for row in rows)
    return found | {"phases": {phase: n / len(rows) for phase, n in phases.items()}}


def _unit(trace: GeometryTrace, sample: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [row | {"spectral_norm": row["largest_singular_value"], "delta": None, "scores": {}} for row in rows]
    boundaries = {f"{name}_boundary": getattr(trace.phases, f"{name}_boundary")[sample] for name in ("trivial", "consolidation")}
    return {
        "index": sample, "prompt": None, "seed": None, "status": "done", "error": None, "image": None, "steps": steps, "scores": {},
        "manifold_dim": trace.manifold_dims[sample], "phases": boundaries, "non_finite": 0,
        "products": sum(row["products"] for row in rows), "forwards": None,
    }  # fmt: skip


def _sample(images: Any, sample: int) -> Any:
    """One image of what a pipeline returned, as a PIL image; None if it is no picture (vectors, latents)."""
    from PIL import Image

    if not isinstance(images, (list, np.ndarray)) or sample >= len(images):
        return None
    if hasattr(images[sample], "mode"):
        return images[sample]
    image = np.squeeze(np.asarray(images[sample]))
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (3, 4)) or not np.isfinite(image).all():
        return None
    if image.dtype != np.uint8:
        image = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(image)
