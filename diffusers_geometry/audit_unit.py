"""One unit of an audit: one prompt, one seed, one pipeline call, and everything that is measured of it.

A unit's numbers depend on nothing but the request, the model and its place: noise and probes have seeds of their own, sums are
taken by a fixed number of threads, the probe plan is the audit's. So they are the same bit for bit whichever process computes it,
and when.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .analyze import analyze_recording, made_by
from .audit_request import AuditRequest
from .capture import Recording, record
from .complexity import local_complexity
from .estimate import Estimate
from .memorization import RunPoint, RunScores, score_run
from .precision import to_float32
from .probe import ProbePlan, probe_generator
from .recorded_step import RecordedStep
from .step_geometry import StepGeometry
from .storage import finite
from .trajectory import GeometryTrace

DIRECTIONS = 8  # of the neighbourhood in which delta counts knots


@dataclass(frozen=True)
class UnitResult:
    """What a unit is stored as.

    Attributes:
        arrays: ``singular_values`` of the chosen map and ``denoised_singular_values`` (steps, k), ``sigma`` (steps,),
            ``final_sample`` (*dims), ``image`` (H, W) or (H, W, 3) in uint8 where the pipeline makes images.
        document: Its numbers, as docs/audit.md has them under ``units``, with the noise levels of its steps.
    """

    arrays: dict[str, np.ndarray]
    document: dict[str, Any]


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Torch computes with ``count`` threads inside, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_unit(pipe: Any, request: AuditRequest, plan: ProbePlan | None, unit: int) -> UnitResult:
    """Generates, and measures what was generated.

    Args:
        pipe: The pipeline.
        request: Of the audit.
        plan: Of the probes; made from the sample's size if None.
        unit: Its index.

    Raises:
        Exception: whatever the pipeline or the analysis raises; FloatingPointError for a network that returns NaN.
    """
    with fixed_threads(request.threads):
        settings = request.settings(unit)
        options = {"engine": settings["probe_engine"], "derivative": settings["derivative"]}
        with record(pipe, settings["record_steps"], **options) as recording:
            output = pipe(**request.arguments(unit))
        require_one_sample(recording)
        trace = analyze_recording(recording, settings, plan)
        with torch.inference_mode(False):
            scored = _scored(recording, trace, request, unit)
            deltas = [_delta(step, request, unit) for step in recording]
        return _result(request, unit, recording, trace, scored, deltas, picture(made_by(output)))


def require_one_sample(recording: Recording) -> None:
    """A unit is one sample: ValueError for a call that makes more."""
    count = len(recording[0].sample)
    if count != 1:
        raise ValueError(f"the pipeline's call makes {count} samples. Expected one a unit: no num_images_per_prompt or batch_size.")


def picture(made: Any) -> np.ndarray | None:
    """The first image (of a video its first frame) in uint8, (H, W) or (H, W, 3); None for what is no image."""
    if isinstance(made, (list, tuple)):
        return picture(made[0]) if len(made) and isinstance(made[0], (list, tuple, np.ndarray, Tensor)) else _pil(made)
    if isinstance(made, Tensor):
        made = made.detach().float().cpu().numpy()
        made = np.moveaxis(made, -3, -1) if made.ndim >= 3 and made.shape[-3] in (1, 3) else made
    if not isinstance(made, np.ndarray) or made.ndim < 2 or made.dtype == object:
        return None
    while made.ndim > 3:
        made = made[0]
    made = made[..., 0] if made.ndim == 3 and made.shape[-1] == 1 else made
    if (made.ndim == 2 and min(made.shape) < 2) or (made.ndim == 3 and made.shape[-1] != 3):
        return None
    if made.dtype != np.uint8:
        made = (np.nan_to_num(made).clip(0, 1) * 255).round().astype(np.uint8)
    return made


def _pil(made: Any) -> np.ndarray | None:
    image = made[0] if len(made) else None
    if not hasattr(image, "convert"):
        return None
    return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))


def _scored(recording: Recording, trace: GeometryTrace, request: AuditRequest, unit: int) -> RunScores | None:
    """Memorisation scores of the recorded steps; None where none is asked for."""
    if not request.scores:
        return None
    points = [_point(step, geometry) for step, geometry in zip(recording, trace.steps, strict=True)]
    generator = probe_generator(request.random_seed(unit, "memorisation"))
    return score_run(points, to_float32(recording.final_sample[0]), request.scores, generator=generator)


def _point(step: RecordedStep, geometry: StepGeometry) -> RunPoint:
    branches = {name: step.branch(name).select(0) if step.has_guidance else None for name in ("conditional", "unconditional")}
    values = None if geometry.denoised_restricted else geometry.denoised_singular_values[0]
    return RunPoint(step.sigma, to_float32(step.sample[0]), step.denoiser.select(0), singular_values=values, **branches)


def _delta(step: RecordedStep, request: AuditRequest, unit: int) -> Estimate | None:
    """Knots within the neighbourhood of the recorded sample; None where it is not asked for."""
    if request.neighborhood_radius is None:
        return None
    x_t = to_float32(step.sample[:1])
    found = local_complexity(
        step.branch(request.options["branch"]).select(0).canonical_map("denoised"), x_t, request.neighborhood_radius,
        num_directions=min(DIRECTIONS, x_t.numel()), generator=probe_generator(request.random_seed(unit, "delta"), step.index),
    )  # fmt: skip
    return found.estimate()


def _result(
    request: AuditRequest,
    unit: int,
    recording: Recording,
    trace: GeometryTrace,
    scored: RunScores | None,
    deltas: list[Estimate | None],
    image: np.ndarray | None,
) -> UnitResult:
    arrays = {
        "singular_values": np.concatenate([step.singular_values for step in trace.steps]),
        "denoised_singular_values": np.concatenate([step.denoised_singular_values for step in trace.steps]),
        "sigma": trace.sigmas,
        "final_sample": to_float32(recording.final_sample[0]).cpu().numpy(),
    } | ({} if image is None else {"image": image})
    prompt, seed = request.place(unit)
    found = scored.steps if scored else [{}] * len(trace.steps)
    phases = {name: getattr(trace.phases, name)[0] for name in ("trivial_boundary", "consolidation_boundary")}
    document = {
        "index": unit, "prompt": prompt, "seed": seed, "status": "done", "error": None,
        "levels": [_level(step) for step in trace.steps],
        "steps": [_step(*one) for one in zip(trace.steps, found, deltas, strict=True)],
        "scores": {name: estimate_document(e) for name, e in scored.scores.items()} if scored else {},
        "manifold_dim": trace.manifold_dims[0],
        "phases": {name: None if pair is None else [finite(v) for v in pair] for name, pair in phases.items()},
        "non_finite": sum(int((~np.isfinite(a)).sum()) for name, a in arrays.items() if name not in ("image", "sigma")),
        "products": sum(step.products for step in trace.steps),
        "forwards": recording.total_steps * recording[0].evaluations + (scored.forwards if scored else 0),
    }  # fmt: skip
    return UnitResult(arrays, document)


def _level(step: StepGeometry) -> dict[str, Any]:
    return {
        "position": step.index, "timestep": float(step.timestep), "sigma": finite(step.sigma), "alpha_t": step.alpha_t,
        "sigma_t": step.sigma_t,
    }  # fmt: skip


def _step(step: StepGeometry, scores: dict[str, Estimate], delta: Estimate | None) -> dict[str, Any]:
    """A step as docs/audit.md has it."""
    row = {"sigma": finite(step.sigma), "phase": str(step.phase[0]), "psi_rank": int(step.local_scaling_rank[0])}
    estimates = {
        "psi": step.local_scaling, "nu": step.local_rank, "effective_dimension": step.effective_dimension, "gap_dim": step.gap_dim,
        "flipd": step.flipd,
    }  # fmt: skip
    for name, estimate in estimates.items():
        row[name] = None if estimate is None else finite(estimate.value[0])
        row[f"{name}_sem"] = None if estimate is None else finite(estimate.sem[0])
    return row | {
        "delta": None if delta is None else finite(delta.value), "delta_sem": None if delta is None else finite(delta.sem),
        "spectral_norm": float(step.denoised_singular_values[0, 0]),
        "asymmetry": None if step.asymmetry is None else finite(step.asymmetry[0]),
        "certificate_error": finite(step.certificate_error), "engine": step.engine, "refusal": step.refusal,
        "note": step.details.get("note"), "products": step.products,
        "scores": {name: finite(e.value) for name, e in scores.items()},
    }  # fmt: skip


def estimate_document(estimate: Estimate, count: int = 1) -> dict[str, Any]:
    """An estimate as docs/audit.md has it."""
    return {"value": finite(estimate.value), "sem": finite(estimate.sem), "n": count}
