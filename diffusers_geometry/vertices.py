"""Evaluates a network at the vertices of a neighbourhood and counts the knots between them.

One point at a time every unit is where it is, whatever the layout of a layer. Chunks go through ``vmap``, in which each layer
looks as it does for one point: a batch that a network doubles for guidance, folds into frames or puts second is no matter. Where
vmap refuses, or does not agree with the plain evaluation at the sample, vertices are evaluated one at a time and the reason kept.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .activations import Activation, ActivationRecorder, HiddenActivations, layer_names
from .difference import BatchedMap, is_out_of_memory, smaller_chunk

DETERMINISM = 10  # rounding units, of the mean absolute pre-activation
VMAP_AGREEMENT = 1e-3  # of the same: vmap takes other kernels


class Vertices:
    """The network around samples that are like the first.

    Args:
        fn: (K, *dims) -> anything.
        x: The first sample, shape (1, *dims).
        chunk_size: Vertices at once.

    Attributes:
        layers: (name, function, kind, units, knots) of every activation call.
        depends_on_x: Of every call, whether its pre-activations have changed between two vertices so far.
        uncounted: Names of functions with kinks that are not counted.
        forwards: Evaluations at one point so far.
        backend: "vmap" or "looped", with ``fallback_reason`` in the second case.

    Raises:
        RuntimeError: the network gives other activations when it is evaluated again.
    """

    def __init__(self, fn: BatchedMap, x: Tensor, chunk_size: int) -> None:
        self.fn, self.chunk_size, self.forwards = fn, chunk_size, 0
        self.backend, self.fallback_reason = "vmap", None
        self.uncounted: set[str] = set()
        calls, again = self._named(x), self._named(x)
        self._signature, plain = _signature(calls), _checksums(calls)
        named = zip(layer_names(calls), calls, strict=True)
        self.layers = [(n, c.function, c.kind, c.pieces.numel(), c.pieces.numel() * c.knots) for n, c in named]
        self._require_finite(plain)
        rounding = DETERMINISM * torch.finfo(x.dtype).eps
        if _signature(again) != self._signature or not _agree(plain, _checksums(again), rounding):
            raise RuntimeError(
                "the network gives other activations at the same point when it is evaluated again. Expected a deterministic one: "
                "call .eval() on it, and give the noise that it draws as a constant."
            )
        self._first: Tensor | None = None
        self.depends_on_x = [False] * len(self.layers)
        if self.layers:
            self._choose_backend(x, plain)

    def knots_met(self, x: Tensor, distance: float, directions: Tensor) -> list[int]:
        """Knots between the vertices x ± distance v, per layer, for x of shape (*dims) and directions (k, *dims)."""
        points = torch.cat([x + distance * directions, x - distance * directions])
        moved = (points - x).flatten(1).norm(dim=1) / distance
        if ((moved - 1).abs() > 0.01).any():
            raise ValueError(
                f"vertices at the distance {distance:.3g} are displaced by {moved.min().item() * distance:.3g}. Expected a "
                "neighborhood_radius above the rounding of x: take a larger one, or float64."
            )
        lowest, highest, start = None, None, 0
        while start < len(points):
            chunk = points[start : start + self.chunk_size]
            try:
                pieces, checksums = self._evaluate(chunk)
            except RuntimeError as error:
                self.chunk_size = smaller_chunk(error, len(chunk))
                continue
            self._note(checksums)
            low, high = [p.amin(dim=0) for p in pieces], [p.amax(dim=0) for p in pieces]
            lowest = low if lowest is None else [torch.minimum(*pair) for pair in zip(lowest, low, strict=True)]
            highest = high if highest is None else [torch.maximum(*pair) for pair in zip(highest, high, strict=True)]
            start += len(chunk)
        return [int((b - a).sum(dtype=torch.int64)) for a, b in zip(lowest, highest, strict=True)]

    def _note(self, checksums: Tensor) -> None:
        """Takes down which layers have moved, from checksums (K, layers, 2)."""
        self._require_finite(checksums)
        self._first = checksums[0] if self._first is None else self._first
        moved = (checksums != self._first).any(dim=2).any(dim=0)
        self.depends_on_x = [a or b for a, b in zip(self.depends_on_x, moved.tolist(), strict=True)]

    def _require_finite(self, checksums: Tensor) -> None:
        wrong = (~torch.isfinite(checksums)).reshape(-1, len(self.layers), 2).any(dim=2).any(dim=0).tolist() if self.layers else []
        if any(wrong):
            raise FloatingPointError(
                f"pre-activations of layer {self.layers[wrong.index(True)][0]!r} are not finite. Expected finite values: check the "
                "weights, the dtype and the input of the network."
            )

    def _evaluate(self, points: Tensor) -> tuple[list[Tensor], Tensor]:
        """Pieces of every layer, each (K, *units), and checksums (K, layers, 2), at points (K, *dims)."""
        if not self.layers:
            return [], points.new_zeros(len(points), 0, 2)
        if self.backend == "vmap":
            with torch.no_grad(), warnings.catch_warnings():
                # torch loops over the batch in some attention kernels, and that is right.
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                # Kernels with a dropout argument count as random. That none draws was seen at the sample.
                stacked = torch.func.vmap(lambda p: _as_outputs(self._observed(p[None])), randomness="same")
                pieces, checksums = stacked(points)
            self.forwards += len(points)
        else:
            found = []
            for point in points:
                with torch.no_grad():
                    found.append(_as_outputs(self._observed(point[None])))
                self.forwards += 1
            pieces = [torch.stack(layer) for layer in zip(*(f[0] for f in found), strict=True)]
            checksums = [torch.stack(layer) for layer in zip(*(f[1] for f in found), strict=True)]
        return pieces, torch.stack([c.cpu().double() for c in checksums], dim=1)

    def _observed(self, x: Tensor) -> list[Activation]:
        """The activations at one point, which must be those of the first."""
        with _eagerly(), ActivationRecorder() as recorder:
            self.fn(x)
        if _signature(recorder.activations) != self._signature:
            raise RuntimeError(
                f"the network made {len(recorder.activations)} activation calls, at the first point {len(self.layers)}, or other "
                "ones. Expected the same path at every point: a branch on the values of x cannot be compared."
            )
        return recorder.activations

    def _named(self, x: Tensor) -> list[Activation]:
        recorder = ActivationRecorder(until=Vertices._named.__code__)
        with torch.no_grad(), _eagerly(), HiddenActivations(recorder), recorder:
            self.fn(x)
        self.forwards += 1
        self.uncounted |= recorder.uncounted
        return recorder.activations

    def _choose_backend(self, x: Tensor, plain: Tensor) -> None:
        """Tries vmap at the sample itself."""
        try:
            _, checksums = self._evaluate(torch.cat([x, x]))
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            self.backend, self.fallback_reason = "looped", f"{type(error).__name__}: {error}".splitlines()[0]
            return
        if not all(_agree(plain, c, VMAP_AGREEMENT) for c in checksums):
            self.backend, self.fallback_reason = "looped", "vmap gives other pre-activations than a plain evaluation"


def _eagerly() -> AbstractContextManager:
    """A scope in which compiled modules run as they were written; dynamo is not imported for it."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _as_outputs(activations: list[Activation]) -> tuple[list[Tensor], list[Tensor]]:
    return [a.pieces for a in activations], [a.checksum for a in activations]


def _signature(activations: list[Activation]) -> list[tuple]:
    return [(a.function, a.knots, a.pieces.shape) for a in activations]


def _checksums(activations: list[Activation]) -> Tensor:
    """Shape (layers, 2), float64 on the CPU."""
    return torch.stack([a.checksum.cpu().double() for a in activations]) if activations else torch.zeros(0, 2)


def _agree(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether sums of pre-activations, (layers, 2), are equal to a tolerance relative to the sums of their absolute values."""
    return bool(((first - second)[:, 0].abs() <= tolerance * first[:, 1]).all())
