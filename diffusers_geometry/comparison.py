"""A measured run beside a closed form: eigenvalues, gaps and phases of a linear manifold at the noise levels of a trace.

At sigma the theory expects the singular values l / (l + sigma^2) of D', l the eigenvalues of F F^T at the trace's dimension,
wherever the sampler is (arXiv:2410.05898). Residuals are measured minus predicted, in the units of D' (shares of a direction kept).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .theory import LinearManifold
from .viz import plot_comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .trajectory import GeometryTrace


@dataclass(frozen=True, eq=False)
class Comparison:
    """Measured and predicted spectra of D'; made by :meth:`GeometryTrace.compare`.

    Attributes:
        sigmas: Noise of the steps, (steps,).
        measured: Singular values in hand, descending, (steps, batch, k).
        predicted: The theory's at the same places, (steps, k).
        gap_positions: After how many directions the theory has its gaps: between bulks, the manifold's last, ascending.
        measured_gaps: Drops of the measured values there, (steps, batch, gaps); NaN where the values in hand do not reach.
        predicted_gaps: Those of the theory in the limit of large dimensions, (steps, gaps).
        measured_phases: Labels of the trace's eigenvalue rule, (steps, batch).
        predicted_phases: Those of the theory at the same resolution, (steps,).
    """

    sigmas: np.ndarray
    measured: np.ndarray
    predicted: np.ndarray
    gap_positions: tuple[int, ...]
    measured_gaps: np.ndarray
    predicted_gaps: np.ndarray
    measured_phases: np.ndarray
    predicted_phases: np.ndarray

    @property
    def residuals(self) -> np.ndarray:
        """Measured minus predicted singular values, (steps, batch, k)."""
        return self.measured - self.predicted[:, None]

    def rows(self) -> list[dict[str, Any]]:
        """One dict per step and sample: residuals of the values, sums, gaps by position, phases."""
        rows = []
        for i, sigma in enumerate(self.sigmas):
            for sample, residual in enumerate(self.residuals[i]):
                row = {
                    "sigma": float(sigma), "sample": sample, "residual_rms": float(np.sqrt((residual**2).mean())),
                    "residual_max": float(np.abs(residual).max()), "sum_measured": float(self.measured[i, sample].sum()),
                    "sum_predicted": float(self.predicted[i].sum()),
                }  # fmt: skip
                for j, position in enumerate(self.gap_positions):
                    row[f"gap_{position}_measured"] = float(self.measured_gaps[i, sample, j])
                    row[f"gap_{position}_predicted"] = float(self.predicted_gaps[i, j])
                row["phase_measured"] = str(self.measured_phases[i, sample])
                row["phase_predicted"] = str(self.predicted_phases[i])
                rows.append(row)
        return rows

    def table(self) -> str:
        """A plain-text table, one line per step and sample: each measured number beside its prediction."""
        gaps = [column for position in self.gap_positions for column in (f"gap {position}", "predicted")]
        head = ["sigma", "sample", "rms resid.", "max resid.", "sum", "predicted", *gaps, "phase", "predicted"]
        lines = [[f"{column:>10}" for column in head[:-2]] + [f"{column:<13}" for column in head[-2:]]]
        for row in self.rows():
            numbers = [v for k, v in row.items() if k not in ("sample", "phase_measured", "phase_predicted")]
            cells = [f"{numbers[0]:>10.4g}", f"{row['sample']:>10}", *(f"{v:>10.4f}" for v in numbers[1:])]
            lines.append([*cells, f"{row['phase_measured']:<13}", f"{row['phase_predicted']:<13}"])
        return "\n".join("  ".join(line).rstrip() for line in lines)

    def plot(self, path: str | os.PathLike | None = None, sample: int = 0) -> Figure:
        """Eigenvalues, gaps and phases over the noise, measured on predicted, written to ``path`` if given."""
        return plot_comparison(self, path, sample=sample)


def compare(trace: GeometryTrace, theory: LinearManifold) -> Comparison:
    """A trace beside a linear manifold.

    Args:
        trace: Of any map; its spectra of D' are compared.
        theory: With the dimension ratio and variances to compare with; the dimension is the trace's.

    Raises:
        TypeError: ``theory`` is no :class:`LinearManifold`.
        ValueError: the trace's D' is known along random directions only, or its dimension is not.
    """
    if not isinstance(theory, LinearManifold):
        raise TypeError(f"theory is a {type(theory).__name__}. Expected a diffusers_geometry.theory.LinearManifold.")
    if any(step.denoised_restricted for step in trace.steps):
        raise ValueError("the trace knows D' along random directions only. Expected spectrum='dense' or 'golub_kahan'.")
    dim = trace.settings.get("plan", {}).get("size")
    if dim is None:
        raise ValueError("the trace does not say its dimension. Expected settings['plan']['size'], as analyze_geometry writes it.")
    measured = np.stack([step.denoised_singular_values for step in trace.steps])
    count, times = measured.shape[-1], trace.sigmas**2
    eigenvalues = theory.eigenvalues(dim)
    predicted = (eigenvalues / (eigenvalues + times[:, None]))[:, :count]
    positions, predicted_gaps = _gaps(theory, dim, times)
    values = np.concatenate([measured, np.full((*measured.shape[:2], 1), 0.0 if count == dim else np.nan)], axis=2)
    drops = np.full((*measured.shape[:2], len(positions)), np.nan)
    for j, position in enumerate(positions):
        if position <= count:
            drops[..., j] = values[..., position - 1] - values[..., position]
    consolidation, trivial = theory.phase_times(trace.settings.get("phase_resolution", 0.1))
    phases = np.where(times >= trivial, "trivial", np.where(times <= consolidation, "consolidation", "coverage"))
    return Comparison(
        trace.sigmas, measured, predicted, tuple(positions), drops, predicted_gaps, np.asarray(trace.phases.labels), phases
    )


def _gaps(theory: LinearManifold, dim: int, times: np.ndarray) -> tuple[list[int], np.ndarray]:
    """After how many directions the gaps lie, ascending, and their sizes, (steps, gaps): the final one last.

    A bulk that holds less than half an eigenvalue at this dimension has no gap beside it.
    """
    counts = theory.bulk_counts(dim)[::-1]
    positions, sizes = np.cumsum(counts).tolist(), list(theory.intermediate_gaps(times)[::-1])
    if theory.atom > 0:
        sizes.append(theory.final_gap(times))
    sides = [*counts, dim - sum(counts)]
    kept = [i for i in range(len(sizes)) if sides[i] > 0 and sides[i + 1] > 0]
    gaps = np.stack([sizes[i] for i in kept], axis=1) if kept else np.empty((len(times), 0))
    return [positions[i] for i in kept], gaps
