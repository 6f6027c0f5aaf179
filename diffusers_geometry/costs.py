"""Seconds and bytes of one Jacobian product of each kind, and of a dense decomposition, measured once at a point."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .probe import ProbePlan
from .spectrum import matrix_spectrum

TIMED_SIZE = 256


@dataclass(frozen=True)
class ProductCosts:
    """Seconds and bytes of one product of each kind, timed in chunks of the size that will be used.

    Attributes:
        reverse: Seconds of a reverse product, None where there are none.
        forward: Seconds of a forward product.
        evaluation: Seconds of a function value.
        memory: Bytes in flight per product of a chunk, beyond one forward pass; None where the device does not tell.
        decomposition: Seconds of the singular values of one dense Jacobian; 0 where the plan has none.
    """

    reverse: float | None
    forward: float
    evaluation: float
    memory: int | None
    decomposition: float = 0.0

    def seconds(self, plan: ProbePlan) -> float:
        """Of one recorded step of one sample."""
        if plan.method in ("perturbation", "central_difference"):
            values = 2 if plan.method == "central_difference" else 1
            spectrum = self.evaluation * values * (plan.spectrum_products + plan.step_products)
        elif plan.method == "dense":  # with a spectrum of D' of its own, the map has more outputs than inputs
            spectrum = plan.spectrum_products * (self.forward if plan.denoised_products else self._single)
            spectrum += plan.denoised_products * self._single + self.decomposition
        else:
            spectrum = (plan.spectrum_products + plan.denoised_products) * (self._single + self.forward) / 2
        traces = (plan.trace_products + plan.flipd_products) * self._single
        return spectrum + traces + plan.log_volume_products * (self._single + self.forward) / 2

    @property
    def _single(self) -> float:
        return self.forward if self.reverse is None else self.reverse


def available_memory() -> int | None:
    """Bytes of main memory that are free; None where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def measure_costs(plan: ProbePlan, denoiser: Denoiser, x_t: Tensor) -> ProductCosts:
    """Times one product of each kind at ``x_t``, in chunks of the sizes that the plan uses."""
    jacobian = denoiser.jacobian(x_t, plan.of, chunk_size=plan.chunk_size, derivative=plan.derivative, symmetric=plan.symmetric)
    count = min(plan.block_size if plan.method == "golub_kahan" else plan.chunk_size, plan.size)
    inputs, outputs, points = (t.expand(count, *t.shape).contiguous() for t in (jacobian.x, jacobian.value, x_t))
    jacobian.jvp(jacobian.x)  # the first pass pays for set-up
    forward = _seconds(lambda: jacobian.jvp(inputs)) / count
    reverse = _seconds(lambda: jacobian.vjp(outputs)) / count if jacobian.has_reverse else None
    with torch.no_grad():
        evaluation = _seconds(lambda: denoiser.denoised(points)) / count
    product = (lambda: jacobian.vjp(outputs)) if jacobian.has_reverse else (lambda: jacobian.jvp(inputs))
    decomposition = _decomposition(plan, x_t) if plan.method == "dense" else 0.0
    return ProductCosts(reverse, forward, evaluation, _peak_memory(product, count, x_t.device), decomposition)


def _decomposition(plan: ProbePlan, x_t: Tensor) -> float:
    """Seconds of the dense spectra of one point; beyond TIMED_SIZE they are taken to grow with the cube of the dimension."""
    size = min(plan.size, TIMED_SIZE)
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(x_t)
    matrix_spectrum(matrix, method="dense", products=size)  # the first pays for set-up
    seconds = _seconds(lambda: matrix_spectrum(matrix, method="dense", products=size))
    return seconds * (plan.size / size) ** 3 * (2 if plan.denoised_products else 1)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_memory(run: Callable[[], Any], count: int, device: torch.device) -> int | None:
    """Bytes allocated at the peak of ``run``, per one of its ``count`` products; None where the device does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return max(0, torch.cuda.max_memory_allocated(device) - before) // count
    if device.type != "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    peak = held = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak // count
