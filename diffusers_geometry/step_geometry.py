"""The numbers of one recorded step, all samples of the batch together: what a trace is made of, and how it is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .descriptors import local_rank as nu
from .descriptors import local_scaling
from .dimension import gap_dim, spectral_gaps
from .estimate import Estimate
from .spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class BatchEstimate:
    """One :class:`~diffusers_geometry.estimate.Estimate` per sample.

    Attributes:
        value: Shape (batch,).
        sem: Standard errors, shape (batch,); NaN where not known.
        bias: Systematic errors, shape (batch,); NaN where not known.
        converged: Shape (batch,).
        products: Jacobian products spent, shape (batch,).
    """

    value: np.ndarray
    sem: np.ndarray
    bias: np.ndarray
    converged: np.ndarray
    products: np.ndarray

    @classmethod
    def stack(cls, estimates: Sequence[Estimate]) -> BatchEstimate:
        """From one estimate a sample."""

        def column(name: str) -> np.ndarray:
            return np.array([math.nan if getattr(e, name) is None else getattr(e, name) for e in estimates], dtype=np.float64)

        random = (column(name) for name in ("value", "sem", "bias"))
        return cls(*random, column("converged").astype(bool), column("products").astype(np.int64))

    def __float__(self) -> float:
        """The value of a batch of one; raises TypeError for more."""
        if len(self.value) != 1:
            raise TypeError(f"{len(self.value)} samples are not one number. Expected a batch of one; use .value[i].")
        return float(self.value[0])


@dataclass(frozen=True, eq=False)
class StepGeometry:
    """The geometry at one recorded step; arrays are float64 with the batch first.

    Attributes:
        index: Loop position.
        timestep: As the scheduler has it.
        alpha_t: Signal scale of the sample.
        sigma_t: Noise scale of the sample.
        engine: "replay" or "drive".
        certificate_error: The engine's certified relative error.
        refusal: Why replay was refused, or None.
        method: "dense", "golub_kahan", "randomized", "perturbation" or "central_difference".
        backend: How derivatives were taken ("vmap_vjp", "stacked_grad", "looped_grad", "difference"), or "function_values".
        products: Jacobian products spent on all samples of this step.
        singular_values: Of the chosen map, descending, (batch, k).
        singular_value_sems: Their standard errors, (batch, k).
        singular_value_bounds: Largest error of each that is not statistical, (batch, k).
        singular_values_converged: Whether each met the method's tolerance, (batch, k).
        denoised_singular_values: Of D', descending, (batch, k'); phases, gaps and dimensions are read from these.
        denoised_complete: Whether these are all d of them.
        denoised_restricted: Whether these are values of D' along random directions, which are no eigenvalues of D'.
        denoised_spread: Relative half-width that sampling gives a kept value (Marchenko-Pastur), (batch,); 0 without sampling.
        eigenvalues: Of the symmetric part of D', descending, (batch, d); None unless D' was in hand.
        gaps: Drops after each singular value of D', (batch, k').
        local_scaling: psi of the chosen map, nats.
        local_scaling_rank: Number of values psi sums, (batch,).
        local_rank: nu of the chosen map; of the values in hand, or by Lanczos quadrature where ``log_volume`` is.
        effective_dimension: tr D'; None where the method does not give it.
        gap_dim: Position of the largest gap of D'.
        asymmetry: |D' - D'ᵀ|_F / |D' + D'ᵀ|_F, (batch,); None unless D' was in hand.
        phase: "trivial", "coverage" or "consolidation" within its trace, (batch,).
        flipd: Local intrinsic dimension at the run's final sample and this noise level; None unless asked for.
        log_volume: Σ 1/2 log(s² + epsilon²) of the chosen map over all d values, nats; None unless asked for.
        details: Settings of the method: sizes of blocks and chunks, difference steps, why each sample's spectrum stopped.
    """

    index: int
    timestep: float
    alpha_t: float
    sigma_t: float
    engine: str
    certificate_error: float
    refusal: str | None
    method: str
    backend: str
    products: int
    singular_values: np.ndarray
    singular_value_sems: np.ndarray
    singular_value_bounds: np.ndarray
    singular_values_converged: np.ndarray
    denoised_singular_values: np.ndarray
    denoised_complete: bool
    denoised_restricted: bool
    denoised_spread: np.ndarray
    gaps: np.ndarray
    local_scaling: BatchEstimate
    local_scaling_rank: np.ndarray
    local_rank: BatchEstimate
    gap_dim: BatchEstimate
    effective_dimension: BatchEstimate | None = None
    eigenvalues: np.ndarray | None = None
    asymmetry: np.ndarray | None = None
    phase: np.ndarray | None = None
    flipd: BatchEstimate | None = None
    log_volume: BatchEstimate | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def sigma(self) -> float:
        """Variance-exploding noise sigma_t / alpha_t; infinite at alpha_t = 0."""
        return self.sigma_t / self.alpha_t if self.alpha_t > 0 else math.inf

    @classmethod
    def from_spectra(
        cls,
        spectra: Sequence[Spectrum],
        denoised: Sequence[Spectrum],
        *,
        relative_threshold: float = 1e-3,
        rank: int | None = None,
        num_singular_values: int | None = None,
        effective_dimension: Sequence[Estimate | None] | None = None,
        local_rank: Sequence[Estimate] | None = None,
        **step: Any,
    ) -> StepGeometry:
        """From the spectra of the chosen map and of D', one a sample.

        Args:
            spectra: Of the chosen map.
            denoised: Of D'.
            relative_threshold: Of psi.
            rank: Of psi.
            num_singular_values: How many values of the map are kept.
            effective_dimension: tr D' where the spectra do not give it.
            local_rank: nu where the spectra are not complete.
            **step: The other fields.
        """

        def stacked(tensors: Any) -> np.ndarray:
            return np.stack([t.numpy()[:num_singular_values] for t in tensors])

        scaling = [local_scaling(s, relative_threshold, rank) for s in spectra]
        in_hand = all(s.eigenvalues is not None for s in denoised)
        traces = effective_dimension or [s.trace for s in denoised]
        bounds = [s.singular_values * 0 if s.bounds is None else s.bounds for s in spectra]
        converged = [s.singular_values >= 0 if s.converged is None else s.converged for s in spectra]
        return cls(
            method=spectra[0].method,
            singular_values=stacked(s.singular_values for s in spectra),
            singular_value_sems=stacked(s.singular_value_sems for s in spectra),
            singular_value_bounds=stacked(bounds),
            singular_values_converged=stacked(converged),
            denoised_singular_values=np.stack([s.singular_values.numpy() for s in denoised]),
            denoised_complete=all(s.complete for s in denoised),
            denoised_restricted=any(s.restricted for s in denoised),
            denoised_spread=np.array([s.spread for s in denoised]),
            gaps=np.stack([spectral_gaps(s).numpy() for s in denoised]),
            local_scaling=BatchEstimate.stack(scaling),
            local_scaling_rank=np.array([s.rank for s in scaling]),
            local_rank=BatchEstimate.stack(local_rank or [nu(s) for s in spectra]),
            gap_dim=BatchEstimate.stack([gap_dim(s) for s in denoised]),
            effective_dimension=BatchEstimate.stack(traces) if all(t is not None for t in traces) else None,
            eigenvalues=np.stack([s.eigenvalues.numpy() for s in denoised]) if in_hand else None,
            asymmetry=np.array([s.asymmetry for s in denoised]) if in_hand else None,
            **step,
        )


def pack_step(step: StepGeometry, prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The step as a JSON document; its arrays go into ``arrays`` under names that begin with ``prefix``."""
    packed: dict[str, Any] = {}
    for name in (f.name for f in fields(step) if f.name != "phase"):
        value = getattr(step, name)
        if isinstance(value, BatchEstimate):
            packed[name] = {"estimate": f"{prefix}{name}"}
            arrays |= {f"{prefix}{name}.{f.name}": getattr(value, f.name) for f in fields(value)}
        elif isinstance(value, np.ndarray):
            packed[name] = {"array": f"{prefix}{name}"}
            arrays[f"{prefix}{name}"] = value
        else:
            packed[name] = value
    return packed


def unpack_step(packed: dict[str, Any], arrays: dict[str, np.ndarray]) -> StepGeometry:
    """The step that :func:`pack_step` took."""
    values: dict[str, Any] = {}
    for name, value in packed.items():
        if name == "details":
            values[name] = value
        elif isinstance(value, dict) and "estimate" in value:
            values[name] = BatchEstimate(*(arrays[f"{value['estimate']}.{f.name}"] for f in fields(BatchEstimate)))
        else:
            values[name] = arrays[value["array"]] if isinstance(value, dict) else value
    return StepGeometry(**values)
