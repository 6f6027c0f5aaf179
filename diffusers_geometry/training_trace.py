"""Descriptors at fixed noised points over the training of a network: a :class:`TrainingTrace`, its file and its figure.

The points are the same at every checkpoint, so two checkpoints are compared point by point: the standard error of a *change* is
that of the paired differences, and usually far smaller than that of either mean.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from .storage import write_together
from .viz import figure_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Quantity = Literal["psi", "nu", "effective_dimension", "asymmetry"]
QUANTITIES: tuple[str, ...] = get_args(Quantity)
_LABELS = {
    "psi": "ψ at rank {rank} (nats)", "nu": "ν (directions)", "effective_dimension": "tr D' (directions)",
    "asymmetry": "|D' - D'ᵀ| / |D' + D'ᵀ|",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class TrainingRecord:
    """One checkpoint.

    Attributes:
        step: Of the training.
        values: Per quantity, (levels, samples): psi in nats, nu and tr D' in directions, asymmetry a share; NaN where it was not
            in hand (nu and asymmetry, where D' was not taken whole).
        sems: Standard errors of their random parts, likewise; 0 where exact, NaN where not known.
        products: Jacobian products spent.
        converged: Whether every psi met its method's tolerance; those of a dense D' do.
    """

    step: int
    values: dict[str, np.ndarray]
    sems: dict[str, np.ndarray]
    products: int
    converged: bool


@dataclass
class TrainingTrace:
    """Checkpoints in the order of their steps.

    Attributes:
        sigmas: Noise sigma_t / alpha_t of the levels.
        settings: How the points were made and probed.
        records: The checkpoints.
    """

    sigmas: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    records: list[TrainingRecord] = field(default_factory=list)

    @property
    def steps(self) -> np.ndarray:
        """Training steps of the checkpoints, (checkpoints,)."""
        return np.array([record.step for record in self.records])

    def values(self, quantity: Quantity) -> np.ndarray:
        """A quantity at every point, (checkpoints, levels, samples).

        Raises:
            ValueError: no such quantity, or no checkpoint yet.
        """
        return self._stacked(quantity, "values")

    def means(self, quantity: Quantity) -> tuple[np.ndarray, np.ndarray]:
        """Mean over the samples and its standard error (NaN for one sample), each (checkpoints, levels)."""
        return _mean(self.values(quantity))

    def changes(self, quantity: Quantity, since: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Mean change since checkpoint ``since`` over the samples and its paired standard error, each (checkpoints, levels)."""
        values = self.values(quantity)
        return _mean(values - values[since])

    def to_dict(self) -> dict[str, Any]:
        """Plain values; NaN is None."""
        records = [
            {"step": r.step, "products": r.products, "converged": r.converged, "values": _plain(r.values), "sems": _plain(r.sems)}
            for r in self.records
        ]
        return {"sigmas": list(self.sigmas), "settings": self.settings, "records": records}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> TrainingTrace:
        """What :meth:`to_dict` gave."""
        records = [
            TrainingRecord(r["step"], _arrays(r["values"]), _arrays(r["sems"]), r["products"], r["converged"])
            for r in document["records"]
        ]
        return cls(tuple(document["sigmas"]), document["settings"], records)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the trace as JSON, whole or not at all."""
        contents = json.dumps(self.to_dict(), indent=1, allow_nan=False).encode()
        write_together(Path(path).parent, {Path(path).name: contents})

    @classmethod
    def load(cls, path: str | os.PathLike) -> TrainingTrace:
        """A trace that :meth:`save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def table(self) -> str:
        """One line per checkpoint and noise: means over the samples ± standard errors."""
        columns = {name: self.means(name) for name in QUANTITIES}
        lines = ["      step       sigma" + "".join(f"{name:>24}" for name in QUANTITIES)]
        for i, step in enumerate(self.steps):
            for j, sigma in enumerate(self.sigmas):
                cells = [_cell(mean[i, j], sem[i, j]) for mean, sem in columns.values()]
                lines.append(f"{step:>10}  {sigma:>10.4g}" + "".join(f"{cell:>24}" for cell in cells))
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike | None = None) -> Figure:
        """Every quantity over the training steps, a line a noise, bars of one standard error over the samples.

        Args:
            path: Where to write the figure (by suffix); not written if None.
        """
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        shown = [name for name in QUANTITIES if np.isfinite(self.values(name)).any()]
        figure = Figure(figsize=(9, 2.6 * len(shown)), layout="constrained")
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        colours = colormaps["viridis"](np.linspace(0, 0.85, len(self.sigmas)))
        for panel, name in zip(panels, shown, strict=True):
            mean, sem = self.means(name)
            for j, (sigma, colour) in enumerate(zip(self.sigmas, colours, strict=True)):
                bars = np.nan_to_num(sem[:, j])
                panel.errorbar(
                    self.steps, mean[:, j], bars, fmt="o-", color=colour, markersize=3, linewidth=1, label=f"σ = {sigma:.3g}"
                )
            panel.set_ylabel(_LABELS[name].format(rank=self.settings.get("psi_rank", "?")))
            panel.grid(alpha=0.3)
        panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=9, frameon=False)
        panels[-1].set_xlabel("training step")
        if path is not None:
            write_together(Path(path).parent, {Path(path).name: figure_bytes(figure, path)})
        return figure

    def _stacked(self, quantity: str, part: str) -> np.ndarray:
        if quantity not in QUANTITIES or not self.records:
            raise ValueError(f"quantity={quantity!r}, {len(self.records)} checkpoints. Expected one of {QUANTITIES}, and some.")
        return np.stack([getattr(record, part)[quantity] for record in self.records])


def _mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the last axis, with the standard error."""
    count = values.shape[-1]
    sem = values.std(axis=-1, ddof=1) / math.sqrt(count) if count > 1 else np.full(values.shape[:-1], math.nan)
    return values.mean(axis=-1), sem


def _cell(mean: float, sem: float) -> str:
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.4g}" if math.isnan(sem) else f"{mean:.4g} ± {sem:.2g}"


def _plain(arrays: dict[str, np.ndarray]) -> dict[str, list]:
    return {name: [[v if math.isfinite(v) else None for v in row] for row in a.tolist()] for name, a in arrays.items()}


def _arrays(plain: dict[str, list]) -> dict[str, np.ndarray]:
    return {name: np.array(rows, dtype=np.float64) for name, rows in plain.items()}
