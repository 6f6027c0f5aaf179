"""An audit run again: the plan of a folder, the same weights, and which numbers came out otherwise.

On one machine every number is the same bit for bit. Another processor, or another version of torch, rounds differently, and a run
carries rounding along; so a number has moved when it differs by more than

    ROUNDING (1 + |value|) + SEMS sqrt(sem_1² + sem_2²)

where sem is the standard error of its random probes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .audit_compare import STEP_QUANTITIES

ROUNDING, SEMS = 1e-3, 4.0


@dataclass(frozen=True)
class Moved:
    """A number that came out otherwise.

    Attributes:
        unit: Index.
        quantity: Name in docs/audit.md, with the step's index where it is of a step.
        first: In the audit that was repeated; None where it was not known.
        second: In the repetition.
        allowed: Difference that rounding and probes account for.
    """

    unit: int
    quantity: str
    first: float | str | None
    second: float | str | None
    allowed: float


@dataclass(frozen=True)
class Repetition:
    """A repeated audit.

    Attributes:
        numbers: How many were compared.
        identical: How many of them are the same bit for bit.
        moved: Those that moved beyond their errors.
    """

    numbers: int
    identical: int
    moved: tuple[Moved, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"rounding": ROUNDING, "sems": SEMS}

    def table(self) -> str:
        """As text."""
        lines = [
            f"{self.identical} of {self.numbers} numbers are the same bit for bit, {len(self.moved)} moved beyond their errors."
        ]
        lines += [f"unit {m.unit}, {m.quantity}: {m.first} was, {m.second} is; {m.allowed:.2g} allowed" for m in self.moved[:20]]
        return "\n".join(lines + ([f"and {len(self.moved) - 20} more"] if len(self.moved) > 20 else []))


def compare_repetition(first: dict[str, Any], second: dict[str, Any]) -> Repetition:
    """Compares two ``audit.json`` of one plan, number by number."""
    numbers = identical = 0
    moved = []
    for before, after in zip(first["units"], second["units"], strict=True):
        ours, theirs = dict(_numbers(before)), dict(_numbers(after))
        for name in sorted({*ours, *theirs}):
            (a, sem_a), (b, sem_b) = ours.get(name, (None, 0.0)), theirs.get(name, (None, 0.0))
            numbers += 1
            identical += a == b
            allowed = ROUNDING * (1 + abs(a)) + SEMS * math.hypot(sem_a, sem_b) if isinstance(a, (int, float)) else 0.0
            differs = a != b if None in (a, b) or isinstance(a, str) else abs(a - b) > allowed
            moved += [Moved(before["index"], name, a, b, allowed)] if differs else []
    return Repetition(numbers, identical, tuple(moved))


def _numbers(unit: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, float]]]:
    """(name, (value, standard error)) of a unit."""
    yield "status", (unit["status"], 0.0)
    yield "manifold_dim", (unit["manifold_dim"], 0.0)
    for name, score in unit["scores"].items():
        yield f"score {name}", (score["value"], score["sem"] or 0.0)
    for k, step in enumerate(unit["steps"]):
        for name in STEP_QUANTITIES:
            yield f"{name} at step {k}", (step[name], step.get(f"{name}_sem") or 0.0)
        yield f"phase at step {k}", (step["phase"], 0.0)
