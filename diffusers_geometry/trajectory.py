"""All numbers of one run: a :class:`GeometryTrace` of :class:`StepGeometry`, with tables, files and a figure.

A trace is self-contained: phases, gaps and dimensions are computed from the stored spectra, so a saved trace gives the same
answers. Files are ``trace.json`` and ``trace.safetensors``, never pickle.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .descriptors import local_rank, local_scaling
from .dimension import gap_dim, spectral_gaps
from .estimate import Estimate
from .phases import Phases, phases_by_eigenvalues, phases_by_gaps
from .spectrum import Spectrum
from .storage import pack_images, unpack_images, write_together

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

JSON_NAME, ARRAYS_NAME = "trace.json", "trace.safetensors"


@dataclass(frozen=True)
class BatchEstimate:
    """One :class:`~diffusers_geometry.estimate.Estimate` per sample.

    Attributes:
        value: Shape (batch,).
        sem: Standard errors, shape (batch,); NaN where not known.
        bias: Systematic errors, shape (batch,); NaN where not known.
        converged: Shape (batch,).
    """

    value: np.ndarray
    sem: np.ndarray
    bias: np.ndarray
    converged: np.ndarray

    @classmethod
    def stack(cls, estimates: Sequence[Estimate]) -> BatchEstimate:
        """From one estimate a sample."""

        def column(name: str) -> np.ndarray:
            return np.array([math.nan if getattr(e, name) is None else getattr(e, name) for e in estimates], dtype=np.float64)

        return cls(column("value"), column("sem"), column("bias"), column("converged").astype(bool))

    def __float__(self) -> float:
        """The value of a batch of one; raises TypeError for more."""
        if len(self.value) != 1:
            raise TypeError(f"{len(self.value)} samples are not one number. Expected a batch of one; use .value[i].")
        return float(self.value[0])


@dataclass(frozen=True)
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
        method: "dense", "perturbation" or "central_difference".
        backend: How derivatives were taken ("vmap_vjp", "stacked_grad", "looped_grad"), or "function_values".
        products: Jacobian products spent on all samples of this step.
        singular_values: Of the chosen map, descending, (batch, k).
        singular_value_sems: Their standard errors, (batch, k).
        singular_value_bound: Estimated largest error of one of them that is not statistical, (batch,).
        denoised_singular_values: Of D', descending, (batch, k'); phases, gaps and dimensions are read from these.
        eigenvalues: Of the symmetric part of D', descending, (batch, d); None unless D' was in hand.
        gaps: Drops after each singular value of D', (batch, k').
        local_scaling: psi of the chosen map, nats.
        local_scaling_rank: Number of values psi sums, (batch,).
        local_rank: nu of the chosen map.
        effective_dimension: tr D'; None where the method does not give it.
        gap_dim: Position of the largest gap of D'.
        asymmetry: |D' - D'ᵀ|_F / |D' + D'ᵀ|_F, (batch,); None unless D' was in hand.
        phase: "trivial", "coverage" or "consolidation" within its trace, (batch,).
        flipd: None: not computed by this version.
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
    singular_value_bound: np.ndarray
    denoised_singular_values: np.ndarray
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
        relative_threshold: float,
        rank: int | None,
        num_singular_values: int | None,
        **step: Any,
    ) -> StepGeometry:
        """From the spectra of the chosen map and of D', one a sample."""

        def stacked(tensors: Any) -> np.ndarray:
            return np.stack([t.numpy()[:num_singular_values] for t in tensors])

        scaling = [local_scaling(s, relative_threshold, rank) for s in spectra]
        in_hand = all(s.eigenvalues is not None for s in denoised)
        return cls(
            method=spectra[0].method,
            products=sum(s.products for s in spectra),
            singular_values=stacked(s.singular_values for s in spectra),
            singular_value_sems=stacked(s.singular_value_sems for s in spectra),
            singular_value_bound=np.array([s.bound for s in spectra]),
            denoised_singular_values=np.stack([s.singular_values.numpy() for s in denoised]),
            gaps=np.stack([spectral_gaps(s).numpy() for s in denoised]),
            local_scaling=BatchEstimate.stack(scaling),
            local_scaling_rank=np.array([s.rank for s in scaling]),
            local_rank=BatchEstimate.stack([local_rank(s) for s in spectra]),
            gap_dim=BatchEstimate.stack([gap_dim(s) for s in denoised]),
            effective_dimension=BatchEstimate.stack([s.trace for s in denoised]) if all(s.trace for s in denoised) else None,
            eigenvalues=np.stack([s.eigenvalues.numpy() for s in denoised]) if in_hand else None,
            asymmetry=np.array([s.asymmetry for s in denoised]) if in_hand else None,
            **step,
        )


@dataclass(frozen=True)
class GeometryTrace:
    """All numbers of one run.

    Attributes:
        steps: The recorded steps, in order.
        settings: Every argument of the analysis, and the names and versions of what was analysed.
        images: What the pipeline returned.
    """

    steps: tuple[StepGeometry, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    images: Any = None

    def __post_init__(self) -> None:
        labelled = (replace(step, phase=labels) for step, labels in zip(self.steps, self.phases.labels, strict=True))
        object.__setattr__(self, "steps", tuple(labelled))

    @property
    def sigmas(self) -> np.ndarray:
        """Noise sigma of the steps, shape (steps,)."""
        return np.array([step.sigma for step in self.steps])

    @cached_property
    def phases(self) -> Phases:
        """Phases by the eigenvalue rule at ``settings["phase_resolution"]``."""
        values = [step.denoised_singular_values for step in self.steps]
        return phases_by_eigenvalues(self.sigmas, values, self.settings.get("phase_resolution", 0.1))

    @cached_property
    def phases_by_gap(self) -> Phases:
        """Phases by the gap rule at the same resolution."""
        gaps = [step.gaps for step in self.steps]
        return phases_by_gaps(self.sigmas, gaps, self.settings.get("phase_resolution", 0.1))

    @cached_property
    def manifold_dims(self) -> list[int | None]:
        """Per sample, the gap dimension at the smallest sigma of its consolidation run; None without one."""
        last = int(np.argmin(self.sigmas))
        consolidated = self.phases.labels[last] == "consolidation"
        return [int(d) if c else None for d, c in zip(self.steps[last].gap_dim.value, consolidated, strict=True)]

    @property
    def manifold_dim(self) -> int | list[int | None] | None:
        """``manifold_dims`` of a single sample as one number or None, of a batch as the list."""
        return self.manifold_dims[0] if len(self.manifold_dims) == 1 else self.manifold_dims

    def rows(self) -> list[dict[str, Any]]:
        """One dict per step and sample with plain Python numbers; None where a number is not known or sigma is infinite."""
        rows = []
        for step in self.steps:
            for b in range(len(step.singular_values)):
                estimates = {
                    "psi": step.local_scaling,
                    "nu": step.local_rank,
                    "effective_dimension": step.effective_dimension,
                    "gap_dim": step.gap_dim,
                }
                row = {
                    "step": step.index, "sample": b, "timestep": step.timestep, "sigma": _finite(step.sigma),
                    "alpha_t": step.alpha_t, "sigma_t": step.sigma_t, "phase": str(step.phase[b]),
                    "largest_singular_value": float(step.singular_values[b, 0]),
                }  # fmt: skip
                for name, estimate in estimates.items():
                    row[name] = None if estimate is None else _finite(estimate.value[b])
                    row[f"{name}_sem"] = None if estimate is None else _finite(estimate.sem[b])
                row |= {
                    "psi_rank": int(step.local_scaling_rank[b]),
                    "asymmetry": None if step.asymmetry is None else _finite(step.asymmetry[b]),
                    "method": step.method, "engine": step.engine, "certificate_error": step.certificate_error,
                    "products": step.products // len(step.singular_values),
                }  # fmt: skip
                rows.append(row)
        return rows

    def table(self) -> str:
        """A plain-text table, one line per step and sample; sigma is the noise, psi in nats, dimensions in directions."""
        lines = ["step  sample  timestep       sigma  phase               psi  rank      nu  eff.dim  gap  asym.  engine  products"]
        for r in self.rows():
            lines.append(
                f"{r['step']:>4}  {r['sample']:>6}  {r['timestep']:>8.5g}  {_cell(r['sigma'], '10.4g')}  {r['phase']:<13}  "
                f"{_cell(r['psi'], '8.2f')}  {r['psi_rank']:>4}  {_cell(r['nu'], '6.2f')}  "
                f"{_cell(r['effective_dimension'], '7.2f')}  {_cell(r['gap_dim'], '3.0f')}  {_cell(r['asymmetry'], '5.3f')}  "
                f"{r['engine']:<6}  {r['products']:>8}"
            )
        return "\n".join(lines)

    def to_pandas(self) -> pandas.DataFrame:
        """:meth:`rows` as a DataFrame (needs pandas)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def plot(self, path: str | os.PathLike | None = None, sample: int = 0) -> Figure:
        """Spectra, descriptors and phases over the run as a matplotlib figure, written to ``path`` if given."""
        from .viz import plot_trace

        return plot_trace(self, path, sample=sample)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes ``trace.json`` and ``trace.safetensors`` into ``directory``, both or none."""
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {}
        document = {
            "format": 1,
            "settings": self.settings,
            "steps": [_pack(step, f"steps.{i}.", arrays) for i, step in enumerate(self.steps)],
            "images": pack_images(self.images, arrays),
        }
        contents = {
            ARRAYS_NAME: save({name: np.ascontiguousarray(a) for name, a in arrays.items()}),
            JSON_NAME: (json.dumps(document, indent=1, allow_nan=False) + "\n").encode(),
        }
        write_together(Path(directory), contents)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> GeometryTrace:
        """Reads what :meth:`save_pretrained` wrote; raises FileNotFoundError or ValueError for anything else."""
        from safetensors.numpy import load_file

        path = Path(directory)
        if not (path / JSON_NAME).is_file() or not (path / ARRAYS_NAME).is_file():
            raise FileNotFoundError(f"{path} holds no trace. Expected the files {JSON_NAME} and {ARRAYS_NAME}.")
        document, arrays = json.loads((path / JSON_NAME).read_text()), load_file(path / ARRAYS_NAME)
        if document.get("format") != 1:
            raise ValueError(f"{path / JSON_NAME} has format {document.get('format')!r}. Expected 1.")
        steps = tuple(_unpack(step, arrays) for step in document["steps"])
        return cls(steps, document["settings"], unpack_images(document["images"], arrays))


def _pack(step: StepGeometry, prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
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


def _unpack(packed: dict[str, Any], arrays: dict[str, np.ndarray]) -> StepGeometry:
    values: dict[str, Any] = {}
    for name, value in packed.items():
        if isinstance(value, dict) and "estimate" in value:
            values[name] = BatchEstimate(*(arrays[f"{value['estimate']}.{f.name}"] for f in fields(BatchEstimate)))
        else:
            values[name] = arrays[value["array"]] if isinstance(value, dict) else value
    return StepGeometry(**values)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: float | None, layout: str) -> str:
    return format(value, layout) if value is not None else "-".rjust(int(layout.split(".")[0]))
