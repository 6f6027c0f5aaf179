"""The cost of an analysis before it is spent, and the choice of the method that fits.

The method follows from dimensions and product counts (:mod:`.budget`). Only a limit on time brings timings in: one product of each
kind is then timed at the first recorded step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .budget import least_products, plan_probe
from .capture import record, resolve_steps
from .costs import ProductCosts, measure_costs
from .denoiser import CONTINUED
from .precision import to_float32
from .probe import ProbePlan
from .recorded_step import RecordedStep


@dataclass(frozen=True)
class GeometryPlan:
    """What an analysis will cost; made by :func:`plan_geometry`.

    Attributes:
        probe: What is taken at every step of every sample.
        steps: Recorded steps.
        samples: Samples of the run.
        costs: Measured seconds and bytes per product.
        engine: The engine that would run.
        weights_memory: Bytes of float32 copies of half precision weights.
    """

    probe: ProbePlan
    steps: int
    samples: int
    costs: ProductCosts
    engine: str
    weights_memory: int = 0

    @property
    def products(self) -> int:
        """Jacobian products of the whole analysis, at most."""
        return self.probe.products * self.steps * self.samples

    @property
    def seconds(self) -> float:
        """Seconds of probing, at most; the generation itself comes on top."""
        return self.costs.seconds(self.probe) * self.steps * self.samples

    @property
    def memory(self) -> int:
        """Bytes for matrices, bases, products in flight and copies of weights, beyond the pipeline's own."""
        return self.probe.memory + (self.costs.memory or 0) * self.probe.chunk_size + self.weights_memory

    def rows(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "method": self.probe.method, "of": self.probe.of, "dimension": self.probe.size,
            "num_singular_values": self.probe.num_singular_values, "steps": self.steps, "samples": self.samples,
            "engine": self.engine, "products_per_step_and_sample": self.probe.products, "products": self.products,
            "seconds": self.seconds, "memory_bytes": self.memory, "weights_memory_bytes": self.weights_memory,
            "network_memory_measured": self.costs.memory is not None,
            "seconds_per_reverse_product": self.costs.reverse, "seconds_per_forward_product": self.costs.forward,
            "seconds_per_evaluation": self.costs.evaluation, "chunk_size": self.probe.chunk_size,
            "block_size": self.probe.block_size if self.probe.method == "golub_kahan" else None,
        }  # fmt: skip

    def table(self) -> str:
        """The plan as text, one line per fact."""
        return "\n".join(f"{name:<28}  {_said(value)}" for name, value in self.rows().items())


def fit_to_limits(
    plan: ProbePlan, costs: ProductCosts, places: int, *, max_seconds: float | None, max_memory: int | None
) -> ProbePlan:
    """The plan with Golub-Kahan's budget and the chunk size shrunk to the limits.

    Args:
        plan: What was asked for.
        costs: Of its products.
        places: Recorded steps times samples.
        max_seconds: Of all probing.
        max_memory: Bytes of matrices, bases and products in flight.

    Raises:
        ValueError: a limit that shrinking cannot meet; it says what can be met.
    """
    if max_memory is not None and costs.memory:
        room = (max_memory - plan.memory) // costs.memory
        if room < 1:
            raise ValueError(
                f"max_probe_memory={max_memory}. Expected at least {plan.memory + costs.memory}: {plan.memory} bytes for "
                f"{plan.method} and {costs.memory} for one product in flight."
            )
        plan = replace(plan, chunk_size=min(plan.chunk_size, room))
    if max_seconds is None or costs.seconds(plan) * places <= max_seconds:
        return plan
    shrunk = plan
    if plan.method == "golub_kahan":
        fixed = costs.seconds(replace(plan, spectrum_products=0, denoised_products=0))
        per_product = costs.seconds(replace(plan, spectrum_products=1, denoised_products=0)) - fixed
        spent = max(least_products(plan), int((max_seconds / places - fixed) / per_product) // plan.maps)
        shrunk = replace(plan, spectrum_products=spent, denoised_products=spent * (plan.maps - 1))
    needed = costs.seconds(shrunk) * places
    if needed > max_seconds:
        raise ValueError(
            f"max_probe_seconds={max_seconds:g}. Expected at least {needed:.3g} for {plan.method} at {places} recorded steps and "
            f"samples: record at most {int(max_seconds / costs.seconds(shrunk))} of them, or ask for fewer singular values."
        )
    return shrunk


def choose_within_limits(
    step: RecordedStep, places: int, settings: dict[str, Any], request: dict[str, Any]
) -> tuple[ProbePlan, ProductCosts | None]:
    """The probe plan for a request at ``places`` recorded steps times samples; products are timed only where a limit needs it.

    A request for "auto" that is too slow in its first choice is tried with Golub-Kahan.
    """
    denoiser, x_t = step.branch(settings["branch"]).select(0), to_float32(step.sample[0])
    if request["of"] in CONTINUED:
        request = request | {"output_size": denoiser.jacobian(x_t, request["of"]).value.numel()}
    limits = {"max_seconds": settings["max_probe_seconds"], "max_memory": settings["max_probe_memory"]}
    plan = plan_probe(x_t.numel(), max_memory=limits["max_memory"], **request)
    if limits["max_seconds"] is None and limits["max_memory"] is None:
        return plan, None
    costs = measure_costs(plan, denoiser, x_t)
    try:
        return fit_to_limits(plan, costs, places, **limits), costs
    except ValueError:
        if request["method"] != "auto" or plan.method == "golub_kahan" or not plan.has_reverse:
            raise
    plan = plan_probe(x_t.numel(), max_memory=limits["max_memory"], **request | {"method": "golub_kahan"})
    costs = measure_costs(plan, denoiser, x_t)
    return fit_to_limits(plan, costs, places, **limits), costs


def plan_recording(pipe: Any, args: tuple, kwargs: dict, settings: dict[str, Any], request: dict[str, Any]) -> GeometryPlan:
    """Runs the pipeline up to its first recorded step and states what the request would cost there.

    Args:
        pipe: The pipeline.
        args: Positional arguments of its call.
        kwargs: Keyword arguments of its call.
        settings: The checked arguments of the analysis.
        request: The arguments of :func:`plan_probe` among them.
    """
    record_steps, engine = settings["record_steps"], settings["probe_engine"]
    with record(pipe, record_steps, engine=engine, derivative=request["derivative"]) as recording:
        recording.run(None if request["of"] in CONTINUED else 1, *args, **kwargs)  # these need to know how a run ends
    step = recording[0]
    count, samples = len(resolve_steps(record_steps, recording.total_steps)), len(step.sample)
    with torch.inference_mode(False):
        plan, costs = choose_within_limits(step, count * samples, settings, request)
        costs = costs or measure_costs(plan, step.branch(settings["branch"]).select(0), to_float32(step.sample[0]))
        return GeometryPlan(plan, count, samples, costs, step.engine, step.weights_memory)


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
