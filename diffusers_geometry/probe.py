"""What is measured at one point of a run, by one plan: spectra of the chosen map and of D', and functions of them.

The plan says the method, the budgets and the sizes before anything is spent (:mod:`.plan` makes it); the probe carries it out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .denoiser import CONTINUED, Denoiser, Map
from .difference import CountedMap, central_difference_columns, choose_step, orthonormal_directions
from .dimension import flipd
from .estimate import Estimate
from .function_values import central_difference_spectrum, perturbation_columns, perturbation_spectrum
from .golub_kahan import golub_kahan_spectrum
from .jacobian import Derivative, Jacobian
from .quadrature import lanczos_quadrature
from .spectrum import Spectrum, dense_spectrum, matrix_spectrum, randomized_spectrum
from .stochastic import estimate_trace


@dataclass(frozen=True)
class ProbePlan:
    """What will be taken at each recorded step of each sample; products are upper limits.

    Attributes:
        method: "dense", "golub_kahan", "randomized", "perturbation" or "central_difference".
        of: The map.
        size: d, the numbers of one sample.
        num_singular_values: k; None for all that the method gives.
        spectrum_products: For the map's spectrum.
        step_products: For the choice of the difference step.
        denoised_products: For that of D', 0 where the same products give it.
        trace_products: For tr D' where the spectrum does not give it.
        log_volume_products: For the Lanczos quadrature, 0 without one.
        flipd_products: For the trace at the final sample, 0 without it.
        log_volume_epsilon: Of the log-volume, None without one; its ``log_volume_probes`` and ``log_volume_steps``.
        tol: Of Golub-Kahan.
        block_size: Of Golub-Kahan.
        chunk_size: Products taken at once.
        derivative: "autograd" or "difference".
        symmetric: Whether J is stated to be symmetric.
        centred: Whether Algorithm 1 centres its columns.
        memory: Bytes for matrices and bases, without the network's own.
    """

    method: str
    of: Map
    size: int
    num_singular_values: int | None
    spectrum_products: int
    step_products: int = 0
    denoised_products: int = 0
    trace_products: int = 0
    log_volume_products: int = 0
    flipd_products: int = 0
    log_volume_epsilon: float | None = None
    log_volume_probes: int = 0
    log_volume_steps: int = 0
    tol: float = 1e-3
    block_size: int = 4
    chunk_size: int = 32
    derivative: Derivative = "autograd"
    symmetric: bool = False
    centred: bool = True
    memory: int = 0

    @property
    def has_reverse(self) -> bool:
        """Whether reverse products can be taken."""
        return self.derivative == "autograd" or self.symmetric

    @property
    def maps(self) -> int:
        """How many maps take products of their own for their spectra."""
        return 2 if self.denoised_products else 1

    @property
    def products(self) -> int:
        """Upper limit of the products at one step of one sample."""
        parts = (self.spectrum_products, self.denoised_products, self.trace_products, self.log_volume_products)
        return sum(parts) + self.flipd_products + self.step_products

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a trace's settings."""
        return asdict(self) | {"products": self.products}


@dataclass
class PointGeometry:
    """What a probe found at one point.

    Attributes:
        spectrum: Of the chosen map.
        denoised: Of D'.
        effective_dimension: tr D', None where the method does not give it.
        log_volume: None unless planned.
        local_rank: nu by quadrature, None where it is read from the spectrum.
        flipd: None unless planned.
        products: Products spent.
        backend: How derivatives were taken.
        details: What the methods did.
    """

    spectrum: Spectrum
    denoised: Spectrum
    effective_dimension: Estimate | None = None
    log_volume: Estimate | None = None
    local_rank: Estimate | None = None
    flipd: Estimate | None = None
    products: int = 0
    backend: str = "function_values"
    details: dict[str, Any] = field(default_factory=dict)


def probe_generator(*place: int) -> torch.Generator:
    """Random probes of one place (seed, step, sample, ...), independent of those of any other."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))


class Probe:
    """Carries a plan out at one point after another.

    Args:
        plan: What to take.
    """

    def __init__(self, plan: ProbePlan) -> None:
        self.plan, self.chunk_size = plan, plan.chunk_size

    def __call__(
        self, denoiser: Denoiser, x_t: Tensor, x_0: Tensor | None, generator: torch.Generator, conditional: Denoiser | None = None
    ) -> PointGeometry:
        """The geometry at ``x_t``.

        Args:
            denoiser: Of one sample.
            x_t: The recorded sample, (*dims), at least float32.
            x_0: The run's final sample: the centre of Algorithm 1 and the point of FLIPD; None where neither is planned.
            generator: All random probes.
            conditional: The denoiser of FLIPD, needed when it is planned.
        """
        take = {
            "dense": self._dense, "golub_kahan": self._golub_kahan, "randomized": self._randomized,
            "perturbation": self._perturbation, "central_difference": self._central_difference,
        }[self.plan.method]  # fmt: skip
        found = take(denoiser, x_0 if self.plan.method == "perturbation" else x_t, generator)
        if self.plan.log_volume_epsilon is not None:
            self._add_log_volume(found, denoiser, x_t, generator)
        if self.plan.flipd_products:
            options = {"chunk_size": self.chunk_size, "derivative": self.plan.derivative}
            found.flipd = flipd(conditional, x_0, num_products=self.plan.flipd_products, generator=generator, **options)
            found.products += found.flipd.products
        return found

    def _jacobian(self, denoiser: Denoiser, x_t: Tensor, of: Map) -> Jacobian:
        plan = self.plan
        options = {"chunk_size": self.chunk_size, "derivative": plan.derivative, "symmetric": plan.symmetric}
        return denoiser.jacobian(x_t, of, **options)

    def _finish(self, found: PointGeometry, *jacobians: Jacobian) -> PointGeometry:
        """Notes what the products took; a chunk that memory forced to be smaller stays so."""
        found.products += sum(j.products + j.step_products for j in jacobians)
        found.backend = jacobians[0].backend
        self.chunk_size = min(j.chunk_size for j in jacobians)
        shapes = {"input_shape": list(jacobians[0].x.shape), "output_shape": list(jacobians[0].value.shape)}
        found.details |= {"chunk_size": self.chunk_size, "step": jacobians[0].step} | shapes | found.spectrum.details
        reasons = [r for j in jacobians for r in (j.fallback_reason, j.forward_fallback_reason) if r]
        if reasons:
            found.details["fallback_reason"] = reasons[0]
        return found

    def _dense(self, denoiser: Denoiser, x_t: Tensor, generator: torch.Generator) -> PointGeometry:
        jacobian, of = self._jacobian(denoiser, x_t, self.plan.of), self.plan.of
        if of in CONTINUED:
            inner = self._jacobian(denoiser, x_t, "denoised")
            spectrum, denoised = dense_spectrum(jacobian), dense_spectrum(inner)
            return self._finish(PointGeometry(spectrum, denoised, denoised.trace), jacobian, inner)
        matrix = jacobian.dense()
        made = {"method": "dense", "bound": jacobian.rounding, "step": jacobian.step}
        spectrum = denoised = matrix_spectrum(matrix, products=len(matrix), **made)
        if of != "denoised":
            identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
            bound = spectrum.bound * denoiser.error_scale(of)
            denoised = matrix_spectrum(denoiser.as_denoised(matrix, identity, of), method="dense", products=0, bound=bound)
        return self._finish(PointGeometry(spectrum, denoised, denoised.trace), jacobian)

    def _golub_kahan(self, denoiser: Denoiser, x_t: Tensor, generator: torch.Generator) -> PointGeometry:
        plan = self.plan

        def values(jacobian: Jacobian, products: int) -> Spectrum:
            options = {"block_size": plan.block_size, "generator": generator}
            return golub_kahan_spectrum(jacobian, plan.num_singular_values, plan.tol, products, **options)

        return self._from_products(denoiser, x_t, generator, values)

    def _randomized(self, denoiser: Denoiser, x_t: Tensor, generator: torch.Generator) -> PointGeometry:
        def values(jacobian: Jacobian, products: int) -> Spectrum:
            return randomized_spectrum(jacobian, self.plan.num_singular_values, tol=self.plan.tol, generator=generator)

        return self._from_products(denoiser, x_t, generator, values)

    def _from_products(self, denoiser: Denoiser, x_t: Tensor, generator: torch.Generator, values: Any) -> PointGeometry:
        """Spectra of the map and of D' by ``values``, and the trace of D' from its own products."""
        inner = self._jacobian(denoiser, x_t, "denoised")
        jacobians = [inner] if self.plan.of == "denoised" else [self._jacobian(denoiser, x_t, self.plan.of), inner]
        spectrum = values(jacobians[0], self.plan.spectrum_products)
        denoised = spectrum if len(jacobians) == 1 else values(inner, self.plan.denoised_products)
        count, trace = self.plan.trace_products, None
        if count:
            trace = estimate_trace(inner, num_products=count, generator=generator)
        return self._finish(PointGeometry(spectrum, denoised, trace), *jacobians)

    def _central_difference(self, denoiser: Denoiser, x_t: Tensor, generator: torch.Generator) -> PointGeometry:
        fn, of, count = denoiser.canonical_map(self.plan.of), self.plan.of, self.plan.spectrum_products
        counted = CountedMap(fn)
        step, error = choose_step(counted, x_t, scale=denoiser.sigma_t, generator=generator)
        wanted = orthonormal_directions(x_t.shape, count, x_t, generator)
        columns, directions = central_difference_columns(fn, x_t, wanted, step, chunk_size=self.chunk_size)
        spectrum = central_difference_spectrum(columns, directions, step=step, error=error)
        columns, error = denoiser.as_denoised(columns, directions, of), error * denoiser.error_scale(of)
        denoised = central_difference_spectrum(columns, directions, step=step, error=error)
        details = {"step": step, "step_products": counted.evaluations // 2}
        return PointGeometry(spectrum, denoised, denoised.trace, products=count + counted.evaluations // 2, details=details)

    def _perturbation(self, denoiser: Denoiser, x_0: Tensor, generator: torch.Generator) -> PointGeometry:
        fn, x, sigma_t = denoiser.canonical_map(self.plan.of), denoiser.alpha_t * x_0, denoiser.sigma_t
        count = self.plan.spectrum_products
        columns, xi = perturbation_columns(fn, x, sigma_t, num_samples=count, generator=generator, chunk_size=self.chunk_size)
        spectrum = perturbation_spectrum(columns, xi, centred=self.plan.centred)
        # The mean column of D' is no direction of the manifold, so D' is centred whatever is asked of the map.
        denoised = perturbation_spectrum(denoiser.as_denoised(columns, x.flatten() / sigma_t + xi, self.plan.of), xi)
        return PointGeometry(spectrum, denoised, denoised.trace, products=count)

    def _add_log_volume(self, found: PointGeometry, denoiser: Denoiser, x_t: Tensor, generator: torch.Generator) -> None:
        """1/2 log det(JᵀJ + epsilon²), and nu where the spectrum is not complete."""
        plan, spectrum = self.plan, found.spectrum
        if spectrum.complete and spectrum.samples is None:
            found.log_volume = spectrum.estimate(lambda s: 0.5 * (s.square() + plan.log_volume_epsilon**2).log().sum().item())
        else:
            jacobian = self._jacobian(denoiser, x_t, plan.of)
            options = {"num_probes": plan.log_volume_probes, "num_steps": plan.log_volume_steps, "generator": generator}
            quadrature = lanczos_quadrature(jacobian, **options)
            found.log_volume = quadrature.log_volume(plan.log_volume_epsilon)
            found.local_rank = quadrature.local_rank()
            found.products += jacobian.products + jacobian.step_products
        found.details["log_volume_epsilon"] = plan.log_volume_epsilon
