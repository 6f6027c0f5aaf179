"""All numbers of one run: a :class:`GeometryTrace` of :class:`StepGeometry`, with tables, files and a figure.

A trace is self-contained: phases, gaps and dimensions are computed from the stored spectra, so a saved trace gives the same
answers. Files are ``trace.json`` and ``trace.safetensors``, never pickle.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .phases import Phases, phases_by_eigenvalues, phases_by_gaps
from .step_geometry import StepGeometry, pack_step, unpack_step
from .storage import finite, pack_images, unpack_images, write_together

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from .comparison import Comparison
    from .theory import LinearManifold

JSON_NAME, ARRAYS_NAME, FORMAT = "trace.json", "trace.safetensors", 2


@dataclass(frozen=True, eq=False)
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
        spreads = [step.denoised_spread for step in self.steps]
        unseen = [None if step.denoised_complete else self._last_in_hand(step) for step in self.steps]
        return phases_by_eigenvalues(self.sigmas, values, self._resolution, spreads=spreads, unseen=unseen)

    @cached_property
    def phases_by_gap(self) -> Phases:
        """Phases by the gap rule at the same resolution."""
        gaps = [step.gaps for step in self.steps]
        unseen = [None if step.denoised_complete else self._last_in_hand(step) for step in self.steps]
        return phases_by_gaps(self.sigmas, gaps, self._resolution, unseen=unseen)

    @property
    def _resolution(self) -> float:
        return self.settings.get("phase_resolution", 0.1)

    @staticmethod
    def _last_in_hand(step: StepGeometry) -> np.ndarray:
        """What the values of D' that are not in hand lie below, (batch,); nothing is known from random directions."""
        return step.denoised_singular_values[:, -1] if not step.denoised_restricted else np.full(len(step.gaps), np.inf)

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
                    "flipd": step.flipd,
                    "log_volume": step.log_volume,
                }
                row = {
                    "step": step.index, "sample": b, "timestep": step.timestep, "sigma": finite(step.sigma),
                    "alpha_t": step.alpha_t, "sigma_t": step.sigma_t, "phase": str(step.phase[b]),
                    "largest_singular_value": float(step.singular_values[b, 0]),
                }  # fmt: skip
                for name, estimate in estimates.items():
                    row[name] = None if estimate is None else finite(estimate.value[b])
                    row[f"{name}_sem"] = None if estimate is None else finite(estimate.sem[b])
                    row[f"{name}_bias"] = None if estimate is None else finite(estimate.bias[b])
                    row[f"{name}_converged"] = None if estimate is None else bool(estimate.converged[b])
                row |= {
                    "psi_rank": int(step.local_scaling_rank[b]),
                    "asymmetry": None if step.asymmetry is None else finite(step.asymmetry[b]),
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

    def compare(self, theory: LinearManifold) -> Comparison:
        """This run beside the closed form of a linear manifold: eigenvalues, gaps and phases, see :mod:`.comparison`."""
        from .comparison import compare

        return compare(self, theory)

    def save_pretrained(self, directory: str | os.PathLike, *, figure: str | None = None) -> None:
        """Writes ``trace.json`` and ``trace.safetensors`` into ``directory``, and ``figure`` by that name: all or none."""
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {}
        document = {
            "format": FORMAT,
            "settings": self.settings,
            "steps": [pack_step(step, f"steps.{i}.", arrays) for i, step in enumerate(self.steps)],
            "images": pack_images(self.images, arrays),
        }
        contents = {
            ARRAYS_NAME: save({name: np.ascontiguousarray(a) for name, a in arrays.items()}),
            JSON_NAME: (json.dumps(document, indent=1, allow_nan=False) + "\n").encode(),
        }
        if figure is not None:
            from .viz import figure_bytes, plot_trace

            contents[figure] = figure_bytes(plot_trace(self), figure)
        write_together(Path(directory), contents)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> GeometryTrace:
        """Reads what :meth:`save_pretrained` wrote; raises FileNotFoundError or ValueError for anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = Path(directory)
        if not (path / JSON_NAME).is_file() or not (path / ARRAYS_NAME).is_file():
            raise FileNotFoundError(f"{path} holds no trace. Expected the files {JSON_NAME} and {ARRAYS_NAME}.")
        try:
            document, arrays = json.loads((path / JSON_NAME).read_text()), load_file(path / ARRAYS_NAME)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} holds a damaged trace: {error}. Expected what save_pretrained wrote.") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            document = document if isinstance(document, dict) else {}
            raise ValueError(f"{path / JSON_NAME} has format {document.get('format')!r}. Expected {FORMAT}: analyse again.")
        try:
            steps = tuple(unpack_step(step, arrays) for step in document["steps"])
            return cls(steps, document["settings"], unpack_images(document["images"], arrays))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} holds a damaged trace: {error!r} is missing. Expected what save_pretrained wrote.") from error


def _cell(value: float | None, layout: str) -> str:
    return format(value, layout) if value is not None else "-".rjust(int(layout.split(".")[0]))
