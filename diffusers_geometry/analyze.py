"""The one module that walks the whole street: record a run, take a spectrum at every recorded step, return the trace."""

from __future__ import annotations

import functools
import inspect
import platform
from collections.abc import Callable, Sequence
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import __version__
from .budget import SpectrumMethod, plan_probe
from .capture import Recording, record, resolve_steps
from .denoiser import CONTINUED, UNITS, Map
from .jacobian import Derivative
from .plan import GeometryPlan, choose_within_limits, plan_recording
from .precision import to_float32
from .probe import PointGeometry, Probe, ProbePlan, probe_generator
from .recorded_step import Branch, Engine, RecordedStep
from .settings import checked_settings, probe_request
from .step_geometry import BatchEstimate, StepGeometry
from .trajectory import GeometryTrace


def analyze_geometry(
    pipe: Any,
    /,
    *args: Any,
    record_steps: int | Sequence[int] | Literal["all"] = 10,
    spectrum: SpectrumMethod = "auto",
    num_singular_values: int | None = None,
    of: Map = "denoised",
    branch: Branch = "guided",
    flipd: bool = False,
    log_volume_epsilon: float | None = None,
    log_volume_probes: int = 16,
    log_volume_steps: int = 30,
    max_products: int | None = None,
    max_probe_seconds: float | None = None,
    max_probe_memory: int | None = None,
    relative_threshold: float = 1e-3,
    psi_rank: int | None = None,
    phase_resolution: float = 0.1,
    centred: bool = True,
    derivative: Derivative = "autograd",
    symmetric: bool = False,
    probe_engine: Engine = "auto",
    probe_tolerance: float = 1e-3,
    probe_block_size: int = 4,
    probe_chunk_size: int = 32,
    probe_seed: int = 0,
    progress: bool = True,
    watch: Callable[[GeometryTrace], None] | None = None,
    **kwargs: Any,
) -> GeometryTrace:
    """Runs ``pipe(*args, **kwargs)`` and takes the Jacobian of its denoiser at the points it visits.

    Args:
        pipe: A diffusers pipeline; it generates as always, with every argument passed through.
        *args: Arguments of the pipeline's call.
        record_steps: How many loop positions (spread over the run), which ones, or "all".
        spectrum: "dense" (exact), "golub_kahan" (the largest values, any dimension), "randomized" (range finder of
            arXiv:2408.08307), "perturbation" (Algorithm 1 of arXiv:2410.05898, at the final sample) or "central_difference"
            (Algorithm 2, at x_t); "auto" is dense or Golub-Kahan, by dimension, wanted values and limits.
        num_singular_values: How many of the largest; all (or 16, by Golub-Kahan and "randomized") if None.
        of: The map: "denoised" (D'), "score" ((D' - I) / sigma^2), "epsilon" ((I - D') / sigma), "decoded" (to the image of x_0),
            "decoder" (latent to image) or "sampled" (unit noise to x_0, through the remaining steps of a deterministic sampler);
            see :mod:`.denoiser`. The last three take D' by products of its own.
        branch: "guided" (what the sampler follows), "conditional" or "unconditional".
        flipd: Also take the local intrinsic dimension at the final sample, on the conditional branch, at every step's noise.
        log_volume_epsilon: Also take 1/2 log det(J^T J + epsilon^2) over all d values, by Lanczos quadrature with error bars;
            nu is then over all values too.
        log_volume_probes: Its random probes.
        log_volume_steps: Its Lanczos steps.
        max_products: Budget per recorded step and sample. Dense needs the dimension d; Algorithm 1 takes this many samples
            (default 4 d), Algorithm 2 this many directions (default d, and up to 90 more to choose its step).
        max_probe_seconds: Limit for all probing; products are then timed, and the method or Golub-Kahan's budget follows.
        max_probe_memory: Limit in bytes for matrices, bases and products in flight; sets method and chunk size.
        relative_threshold: psi counts singular values above this share of the largest.
        psi_rank: psi counts this many instead, for comparing samples.
        phase_resolution: Delta of the phase rules.
        centred: Centre Algorithm 1's columns for the chosen map (D' is always centred).
        derivative: "autograd", or "difference" for a network that gives no gradients.
        symmetric: States that the Jacobian is symmetric, so that a black box can be probed by Golub-Kahan.
        probe_engine: "auto", "replay" or "drive", see :func:`~diffusers_geometry.capture.record`.
        probe_tolerance: Relative error at which a singular value of Golub-Kahan has converged.
        probe_block_size: Directions that Golub-Kahan advances together.
        probe_chunk_size: Products taken at once.
        probe_seed: Seed of every random probe.
        progress: Show a bar over the recorded steps.
        watch: Called after every recorded step with the trace so far, while the pipeline generates; the numbers are the same.
            What it raises ends the run. Refused where a step's numbers need the final sample.
        **kwargs: Arguments of the pipeline's call.

    Returns:
        The trace; phases and dimensions are read from D' whatever the map. ``settings["plan"]`` says what was planned.

    Raises:
        ValueError: an argument out of range, an unknown scheduler, a limit that no method can meet.
        RuntimeError: a step that cannot be evaluated again, a run that did not reach the steps it was to record.
        FloatingPointError: the network returned NaN or infinity.
    """
    settings = checked_settings(locals())
    request = probe_request(settings)
    if watch is not None and (flipd or of in CONTINUED or spectrum == "perturbation"):
        raise ValueError(
            f"watch with spectrum={spectrum!r}, of={of!r}, flipd={flipd}. Expected numbers that need no final sample: another "
            "spectrum than 'perturbation', a map of the denoiser, no flipd."
        )
    with record(pipe, settings["record_steps"], engine=probe_engine, derivative=derivative) as recording:
        recording.before_first = functools.partial(refuse_early, request, settings)
        probing = _Probing(recording, settings, request)
        if watch is not None:
            recording.after_kept = lambda step: watch(probing.add(step).trace())
        output = pipe(*args, **kwargs)
    recording.check_complete()
    if watch is None:
        probing.add_all(progress)
    return probing.trace(made_by(output))


class _Probing:
    """Takes the geometry of one recorded step after another, by one plan that is made at the first."""

    def __init__(self, recording: Recording, settings: dict[str, Any], request: dict[str, Any]) -> None:
        self.recording, self.settings, self.request = recording, settings, request
        self.steps: list[StepGeometry] = []

    @functools.cached_property
    def probe(self) -> Probe:
        places = len(resolve_steps(self.settings["record_steps"], self.recording.total_steps)) * len(self.recording[0].sample)
        return Probe(choose_within_limits(self.recording[0], places, self.settings, self.request)[0])

    def add(self, step: RecordedStep) -> _Probing:
        """Measures a step; returns itself."""
        sizes = {len(step.sample) for step in self.recording}
        if len(sizes) != 1:
            raise ValueError(f"the recorded steps carry {sorted(sizes)} samples. Expected one batch size throughout the run.")
        found = _probe_batch(self.probe, step, self.recording.final_sample, self.settings)
        self.steps.append(_step_geometry(step, found, self.settings))
        return self

    def add_all(self, progress: bool = False) -> None:
        """Measures every recorded step."""
        with torch.inference_mode(False):  # whatever mode the pipeline was called in
            for step in tqdm(self.recording, desc="geometry", unit="step", disable=not progress):
                self.add(step)

    def trace(self, images: Any = None) -> GeometryTrace:
        """What was measured so far."""
        settings = self.settings | {"plan": self.probe.plan.as_dict(), "units": UNITS[self.settings["of"]]}
        return GeometryTrace(tuple(self.steps), settings | _provenance(self.recording.pipe), images)


def analyze_recording(recording: Recording, settings: dict[str, Any], plan: ProbePlan | None = None) -> GeometryTrace:
    """The geometry of every recorded step of a call that was made: what :func:`analyze_geometry` does after the call.

    Args:
        recording: Of a call that came to its end.
        settings: The checked arguments of the analysis, as :func:`~.settings.checked_settings` gives them.
        plan: By which the probes are taken; made at the first step if None.

    Raises:
        RuntimeError: the run did not reach the steps it was to record.
    """
    recording.check_complete()
    probing = _Probing(recording, settings, probe_request(settings))
    if plan is not None:
        probing.probe = Probe(plan)
    probing.add_all()
    return probing.trace()


def plan_geometry(pipe: Any, /, *args: Any, **kwargs: Any) -> GeometryPlan:
    """What :func:`analyze_geometry` would cost with the same arguments: products, seconds and memory, before they are spent.

    Runs the pipeline up to its first recorded step, times one product of each kind there, and stops.

    Args:
        pipe: A diffusers pipeline.
        *args: Arguments of the pipeline's call.
        **kwargs: Those of :func:`analyze_geometry`, and arguments of the pipeline's call.

    Raises:
        ValueError: as :func:`analyze_geometry`, so a request that cannot be met is refused with what can.
    """
    own = {p.name: p.default for p in inspect.signature(analyze_geometry).parameters.values() if p.kind is p.KEYWORD_ONLY}
    call = {name: value for name, value in kwargs.items() if name not in own}
    settings = checked_settings(own | {name: value for name, value in kwargs.items() if name in own})
    return plan_recording(pipe, args, call, settings, probe_request(settings))


plan_geometry.__signature__ = inspect.signature(analyze_geometry).replace(return_annotation="GeometryPlan")


def refuse_early(request: dict[str, Any], settings: dict[str, Any], sample: Tensor) -> None:
    """Refuses at the first step, by the sample's size, what could only fail after the whole generation."""
    plan = plan_probe(sample[0].numel(), max_memory=settings["max_probe_memory"], **request)
    in_hand = plan.num_singular_values if plan.method in ("golub_kahan", "randomized") else plan.size
    if settings["psi_rank"] is not None and settings["psi_rank"] > in_hand:
        raise ValueError(f"psi_rank={settings['psi_rank']}. Expected at most {in_hand}, the singular values in hand.")


def _probe_batch(probe: Probe, step: RecordedStep, final: Tensor | None, settings: dict[str, Any]) -> list[PointGeometry]:
    """The geometry of every sample at one step."""
    denoiser = step.branch(settings["branch"])
    conditional = step.branch("conditional") if probe.plan.flipd_products else None
    results = []
    for sample in range(len(step.sample)):
        results.append(
            probe(
                denoiser.select(sample),
                to_float32(step.sample[sample]),
                None if final is None else to_float32(final[sample]),  # not known while the run goes on
                probe_generator(settings["probe_seed"], step.index, sample),
                conditional.select(sample) if conditional else None,
            )
        )
    return results


def _step_geometry(step: RecordedStep, found: list[PointGeometry], settings: dict[str, Any]) -> StepGeometry:
    def stacked(name: str) -> BatchEstimate | None:
        estimates = [getattr(f, name) for f in found]
        return None if estimates[0] is None else BatchEstimate.stack(estimates)

    details = found[0].details if len(found) == 1 else {"samples": [f.details for f in found]}
    if step.note:
        details = details | {"note": step.note}
    return StepGeometry.from_spectra(
        [f.spectrum for f in found],
        [f.denoised for f in found],
        relative_threshold=settings["relative_threshold"],
        rank=settings["psi_rank"],
        num_singular_values=settings["num_singular_values"],
        effective_dimension=[f.effective_dimension for f in found],
        local_rank=None if found[0].local_rank is None else [f.local_rank for f in found],
        flipd=stacked("flipd"),
        log_volume=stacked("log_volume"),
        products=sum(f.products for f in found),
        details=details,
        index=step.index,
        timestep=step.timestep,
        alpha_t=step.alpha_t,
        sigma_t=step.sigma_t,
        engine=step.engine,
        certificate_error=step.certificate_error,
        refusal=step.refusal,
        backend=found[0].backend,
    )


def made_by(output: Any) -> Any:
    """What the pipeline made: images, frames, audio or vectors, or the first item of a tuple."""
    for name in ("images", "frames", "audios", "samples", "videos"):
        if hasattr(output, name):
            return getattr(output, name)
    if isinstance(output, diffusers.modular_pipelines.PipelineState):
        return output.get("images") if "images" in output.values else output.get("videos")
    return output[0] if isinstance(output, (tuple, list)) else output


def _class_name(pipeline_class: type) -> str:
    """The diffusers class behind a geometry pipeline; its own name where it stands on none."""
    bases = (diffusers.DiffusionPipeline, diffusers.ModularPipeline)
    known = (c for c in pipeline_class.__mro__ if issubclass(c, bases) and c not in bases and c.__module__.startswith("diffusers."))
    return next(known, pipeline_class).__name__


def _provenance(pipe: Any) -> dict[str, Any]:
    return {
        "pipeline": _class_name(type(pipe)),
        "model": str(getattr(pipe, "name_or_path", None) or "") or None,
        "scheduler": type(pipe.scheduler).__name__,
        "diffusers_geometry": __version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
