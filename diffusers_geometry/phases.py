"""The three phases of generation (arXiv:2410.05898), read from singular values u of D' along a run.

At resolution Delta a snapshot is *flat* (all u < Delta), *binary* (no u in [Delta, 1 - Delta], some above) or *graded*. Then

    trivial         the flat run attached to the largest sigma: nothing of the data is seen yet
    consolidation   the binary run attached to the smallest sigma: the manifold is a projection, directions are kept or dropped
    coverage        everything between: variances inside the manifold are being fitted

For Gaussian data of variances l the boundaries are sigma² = l_max (1 - Delta)/Delta and sigma² = l_min Delta/(1 - Delta).
They are crossovers, so they move with Delta. The gap rule, nearer to the paper's figures, calls trivial a snapshot without a
gap >= Delta, consolidation one whose only such gap is the final one (its position is that of the largest gap at the smallest
sigma), and coverage everything else.

Of an incomplete spectrum only the largest values are in hand. Where the rest could still change a snapshot's kind (all in hand are
kept, say) the step is labelled "unresolved".

One snapshot cannot tell the manifold from a sub-manifold of high variance: phases belong to a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PHASES = ("trivial", "coverage", "consolidation")


@dataclass(frozen=True)
class Phases:
    """Phase labels of a run and where they change.

    Attributes:
        labels: "trivial", "coverage", "consolidation" or "unresolved", shape (steps, batch), in the order of the run.
        trivial_boundary: Per sample, the recorded sigmas (above, below) between which the trivial phase ends; None without one.
        consolidation_boundary: Per sample, the recorded sigmas (above, below) between which consolidation starts; None
            without one.
    """

    labels: np.ndarray
    trivial_boundary: tuple[tuple[float, float] | None, ...]
    consolidation_boundary: tuple[tuple[float, float] | None, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, step: int) -> np.ndarray:
        """Labels of one step, shape (batch,)."""
        return self.labels[step]


def snapshot_kind(values: np.ndarray, resolution: float = 0.1, spread: float = 0.0, unseen: float = 0.0) -> str:
    """ "flat", "binary", "graded" or "unresolved" for singular values of D', descending, shape (k,).

    Args:
        values: All of them, or the largest.
        resolution: Delta.
        spread: Relative half-width that sampling gives a kept value; it lowers the threshold 1 - Delta.
        unseen: What the values that are not in hand lie below; 0 if there are none, infinity if nothing is known of them.
    """
    if np.isinf(unseen):
        return "unresolved"
    if (values < resolution).all():
        return "flat"
    if ((values >= resolution) & (values <= (1 - resolution) * (1 - spread))).any():
        return "graded"
    return "binary" if unseen < resolution else "unresolved"


def phases_by_eigenvalues(
    sigmas: np.ndarray,
    values: list[np.ndarray],
    resolution: float = 0.1,
    *,
    spreads: Sequence[np.ndarray] | None = None,
    unseen: Sequence[np.ndarray | None] | None = None,
) -> Phases:
    """Phases by the flat / graded / binary rule.

    Args:
        sigmas: Noise of the recorded steps, shape (steps,), may hold infinity.
        values: Per step, singular values of D', descending, shape (batch, k).
        resolution: Delta, in (0, 0.5).
        spreads: Per step, see :func:`snapshot_kind`, shape (batch,).
        unseen: Per step, see :func:`snapshot_kind`, shape (batch,); None for a complete spectrum.
    """
    _check(sigmas, values, resolution)
    spreads = spreads or [np.zeros(len(step)) for step in values]
    bounds = [np.zeros(len(v)) if u is None else u for v, u in zip(values, unseen or [None] * len(values), strict=True)]
    kinds = np.array(
        [
            [snapshot_kind(v, resolution, s, u) for v, s, u in zip(*step, strict=True)]
            for step in zip(values, spreads, bounds, strict=True)
        ]
    )
    return _from_kinds(np.asarray(sigmas, float), kinds == "flat", kinds == "binary", kinds == "unresolved")


def phases_by_gaps(
    sigmas: np.ndarray,
    gaps: list[np.ndarray],
    resolution: float = 0.1,
    *,
    unseen: Sequence[np.ndarray | None] | None = None,
) -> Phases:
    """Phases by the gap rule.

    Args:
        sigmas: Noise of the recorded steps, shape (steps,).
        gaps: Per step, drops after each singular value of D', shape (batch, k).
        resolution: Smallest gap that counts, in (0, 0.5).
        unseen: Per step, what the values not in hand lie below, shape (batch,): drops among them are smaller than it.
    """
    _check(sigmas, gaps, resolution)
    final = gaps[int(np.argmin(sigmas))].argmax(axis=1)
    none, only_final, unresolved = [], [], []
    for step, bound in zip(gaps, unseen or [None] * len(gaps), strict=True):
        large = step >= resolution
        hidden = np.zeros(len(step), bool) if bound is None else bound >= resolution
        at_final = large & (np.arange(step.shape[1]) == final[:, None])
        others = (large & ~at_final).any(axis=1) & (np.isfinite(bound) if bound is not None else True)
        none.append(~large.any(axis=1) & ~hidden)
        only_final.append(at_final.any(axis=1) & ~others & ~hidden)
        unresolved.append(hidden & ~others)
    return _from_kinds(np.asarray(sigmas, float), np.array(none), np.array(only_final), np.array(unresolved))


def _from_kinds(sigmas: np.ndarray, flat: np.ndarray, binary: np.ndarray, unresolved: np.ndarray) -> Phases:
    """Labels and boundaries from the kinds of snapshot, each of shape (steps, batch)."""
    order = np.argsort(-sigmas, kind="stable")
    labels = np.full(flat.shape, "coverage", dtype="<U13")
    trivial_ends, consolidation_starts = [], []
    for sample in range(flat.shape[1]):
        trivial = _leading(flat[order, sample])
        consolidation = _leading(binary[order, sample][::-1])
        labels[order[:trivial], sample] = "trivial"
        labels[order[len(order) - consolidation :], sample] = "consolidation"
        labels[unresolved[:, sample], sample] = "unresolved"
        trivial_ends.append(_bracket(sigmas[order], trivial, unresolved[order, sample]))
        consolidation_starts.append(_bracket(sigmas[order], len(order) - consolidation, unresolved[order, sample]))
    return Phases(labels, tuple(trivial_ends), tuple(consolidation_starts))


def _leading(flags: np.ndarray) -> int:
    return len(flags) if flags.all() else int(np.argmin(flags))


def _bracket(descending: np.ndarray, position: int, unresolved: np.ndarray) -> tuple[float, float] | None:
    if 0 < position < len(descending) and not unresolved[position - 1 : position + 1].any():
        return float(descending[position - 1]), float(descending[position])
    return None


def _check(sigmas: np.ndarray, values: list[np.ndarray], resolution: float) -> None:
    if not 0 < resolution < 0.5:
        raise ValueError(f"resolution={resolution}. Expected 0 < resolution < 0.5.")
    if len(sigmas) != len(values) or not len(values):
        raise ValueError(f"{len(sigmas)} sigmas and {len(values)} spectra. Expected as many of both, and at least one.")
