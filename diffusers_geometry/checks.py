"""What a self-check found: known answers beside measured ones, and a verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One known answer beside the measured one.

    Attributes:
        what: The quantity.
        where: Loop position and noise level, or which component.
        known: In closed form.
        measured: By this installation.
        tolerance: Largest difference that passes.
        by: The engine or estimator.
        failure: Why nothing could be measured, or None.
    """

    what: str
    where: str
    known: float
    measured: float
    tolerance: float
    by: str
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the two agree; a NaN does not."""
        return self.failure is None and abs(self.measured - self.known) <= self.tolerance


@dataclass(frozen=True)
class SelfCheck:
    """All checks of one pipeline class with one scheduler; true when every one passed.

    Attributes:
        pipeline: Name of the class.
        scheduler: Name of the class.
        dimension: d of the manifold's space.
        manifold_dim: m.
        checks: In order.
    """

    pipeline: str
    scheduler: str
    dimension: int
    manifold_dim: int
    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        """What did not pass."""
        return [check for check in self.checks if not check.passed]

    def rows(self) -> list[dict[str, Any]]:
        """Every check as plain values; what could not be measured is None."""
        rows = [vars(check) | {"passed": check.passed} for check in self.checks]
        return [row | {"measured": None if math.isnan(row["measured"]) else row["measured"]} for row in rows]

    def table(self) -> str:
        """One line a check, and the verdict."""
        widths = [max(len(str(value)) for value in column) for column in zip(*self._cells(), strict=True)]
        lines = ["  ".join(str(v).ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in self._cells()]
        failures = [f"  {check.what}, {check.where}: {check.failure}" for check in self.checks if check.failure]
        verdict = "every answer is the known one" if self else f"{len(self.failed)} of {len(self.checks)} answers are wrong"
        about = f"a {self.manifold_dim}-dimensional manifold in {self.dimension} dimensions"
        return "\n".join([*lines, *failures, f"{self.pipeline} with {self.scheduler}, {about}: {verdict}."])

    def _cells(self) -> list[tuple[str, ...]]:
        head = ("check", "where", "known", "measured", "tolerance", "by", "verdict")
        rows = [
            (c.what, c.where, f"{c.known:.5g}", f"{c.measured:.5g}", f"{c.tolerance:.2g}", c.by, "pass" if c.passed else "FAIL")
            for c in self.checks
        ]
        return [head, *rows]
