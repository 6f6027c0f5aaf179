"""What an audit will cost, before it is spent: fixed once, at the start, and stored with the audit.

The first unit that can be generated is run up to its first recorded step, where one product of each kind is timed; that gives
the probe plan of every unit and the seconds of all. Budgets follow from dimensions and product counts alone, so that no timing
changes a number. A continued audit, and every process of it, takes the stored plan.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .analyze import refuse_early
from .audit_request import AuditRequest, prompt_text
from .audit_unit import DIRECTIONS, fixed_threads, require_one_sample
from .budget import NUM_SINGULAR_VALUES, plan_probe, said_bytes
from .capture import Recording, record, resolve_steps
from .complexity import LEAST_DRAWS
from .costs import measure_costs
from .denoiser import CONTINUED
from .memorization import SCORES
from .plan import choose_within_limits
from .precision import to_float32
from .probe import ProbePlan
from .settings import probe_request

TRIED = 8  # units from which a plan is sought where the first ones cannot be generated


@dataclass(frozen=True)
class AuditPlan:
    """The cost of an audit.

    Attributes:
        units: Prompts times seeds.
        steps: Recorded steps of a unit.
        products: Jacobian products of all units, at most.
        forwards: Network evaluations of one sample for generations, scores and delta, of all units.
        seconds: Of all units on one process; None where nothing could be timed.
        memory_bytes: For matrices, bases, products in flight and copies of weights, beyond the pipeline's own.
        method: Of the spectra.
        engine: That is expected to run.
        dimension: Numbers of one sample.
        probe: The probe plan of every recorded step; None where no sample was seen.
        note: Why numbers are missing, or None.
    """

    units: int
    steps: int | None
    products: int | None
    forwards: int | None
    seconds: float | None
    memory_bytes: int | None
    method: str | None
    engine: str | None
    dimension: int | None
    probe: ProbePlan | None
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the probe plan apart."""
        return {name: value for name, value in asdict(self).items() if name != "probe"}

    def table(self) -> str:
        """The plan as text."""
        if self.products is None:
            return f"{self.units} units. {self.note}"
        memory = "an unknown amount of memory" if self.memory_bytes is None else said_bytes(self.memory_bytes)
        seconds = "an unknown time" if self.seconds is None else said_seconds(self.seconds)
        lines = [
            f"{self.units} units of {self.steps} recorded steps, {self.dimension} dimensions, by {self.method}: "
            f"{self.products} products, {self.forwards} network evaluations",
            f"about {seconds} on one process, {memory} beyond the model's own",
        ]
        return "\n".join(lines + ([self.note] if self.note else []))

    def refuse_beyond(self, max_products: int | None, max_seconds: float | None) -> None:
        """Raises ValueError for a plan that costs more than the limits."""
        for name, limit in (("max_products", max_products), ("max_seconds", max_seconds)):
            needed = getattr(self, name.removeprefix("max_"))
            if limit is not None and needed is not None and needed > limit:
                raise ValueError(
                    f"{name}={limit:g} is less than the audit needs, {needed:.4g}: {self.table().splitlines()[0]}. Expected a "
                    "larger limit, fewer prompts, seeds or recorded steps, or fewer singular values."
                )


def plan_audit(pipe: Any, request: AuditRequest) -> tuple[AuditPlan, AuditRequest]:
    """The plan, and the request with what follows from the sample's size (the rank of psi) filled in.

    Raises:
        ValueError: a request that no unit can meet.
        Exception: what the pipeline raised, where it raised for every prompt that was tried.
    """
    errors: list[Exception] = []
    units = [p * len(request.seeds) for p in range(len(request.prompts))][:TRIED]
    for unit in units:
        options = {"engine": request.options["probe_engine"], "derivative": request.options["derivative"]}
        recording, sizes = record(pipe, request.options["record_steps"], **options), []
        try:
            with fixed_threads(request.threads), recording:
                recording.before_first = lambda sample, sizes=sizes: sizes.append(sample)
                # These need to know how a run ends; for others its first recorded step is enough.
                recording.run(None if request.options["of"] in CONTINUED else 1, **request.arguments(unit))
        except Exception as error:  # of this prompt, maybe not of the next
            errors.append(error)
            continue
        require_one_sample(recording)
        refuse_early(probe_request(request.options), request.options, recording[0].sample)
        request = _with_rank(request, recording[0].sample.numel())
        try:
            return _measured(recording, request, unit), request
        except FloatingPointError as error:
            errors.append(error)
    if not all(isinstance(error, FloatingPointError) for error in errors):
        tried = f"{len(units)} prompts" if len(units) > 1 else f"the prompt {prompt_text(request.prompts[0])!r:.80}"
        raise ValueError(f"nothing can be generated for {tried}: {_said(errors[0])}") from errors[0]
    return _unmeasured(request, sizes, errors[0]), request


def _with_rank(request: AuditRequest, size: int) -> AuditRequest:
    """psi of units compares at one rank only, so it has one: as many values as the cheaper methods give."""
    options = request.options
    if options["psi_rank"] is not None:
        return request
    rank = min(options["num_singular_values"] or NUM_SINGULAR_VALUES, NUM_SINGULAR_VALUES, size)
    return replace(request, options=options | {"psi_rank": rank})


def _measured(recording: Recording, request: AuditRequest, unit: int) -> AuditPlan:
    """The plan from a recorded first step; products and evaluations are timed there."""
    step, settings = recording[0], request.settings(unit)
    count = len(resolve_steps(settings["record_steps"], recording.total_steps))
    with fixed_threads(request.threads), torch.inference_mode(False):
        start = time.perf_counter()
        engine = step.engine
        certificate = time.perf_counter() - start
        probe, _ = choose_within_limits(step, count, settings, probe_request(settings))
        costs = measure_costs(probe, step.branch(settings["branch"]).select(0), to_float32(step.sample[0]))
        others = _evaluations(request, probe.size, step.has_guidance) * count
    forwards = recording.total_steps * step.evaluations + round(others)
    seconds = count * (certificate + costs.seconds(probe)) + forwards * costs.evaluation
    return AuditPlan(
        units=len(request), steps=count, products=probe.products * count * len(request),
        forwards=forwards * len(request), seconds=seconds * len(request),
        memory_bytes=probe.memory + (costs.memory or 0) * probe.chunk_size + step.weights_memory, method=probe.method,
        engine=engine, dimension=probe.size, probe=probe,
    )  # fmt: skip


def _evaluations(request: AuditRequest, size: int, has_guidance: bool) -> float:
    """Network evaluations of the scores and delta at one recorded step, at most."""
    scores = sum(SCORES[name].cost for name in request.scores if has_guidance or not SCORES[name].needs_guidance)
    directions = min(DIRECTIONS, size)
    draws = 0 if request.neighborhood_radius is None else 1 if directions == size else LEAST_DRAWS
    return scores + 2 * directions * draws


def _unmeasured(request: AuditRequest, sizes: list, error: Exception) -> AuditPlan:
    """The plan for a model that gives NaN wherever it was tried: what its samples' size alone says."""
    note = f"no unit could be timed: {_said(error)}"
    settings = request.options
    if not sizes or settings["record_steps"] == "all":
        return AuditPlan(len(request), *[None] * 9, note=note)
    probe = plan_probe(sizes[-1][0].numel(), max_memory=settings["max_probe_memory"], **probe_request(settings))
    steps = settings["record_steps"]
    steps = steps if isinstance(steps, int) else len(resolve_steps(steps, max(max(steps) + 1, -min(steps))))
    return AuditPlan(
        len(request), steps, probe.products * steps * len(request), None, None, probe.memory, probe.method, None, probe.size, probe,
        note,
    )  # fmt: skip


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def said_seconds(seconds: float) -> str:
    """A duration in words."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} minutes" if seconds < 7200 else f"{seconds / 3600:.3g} hours"
