"""Whether what was measured can be trusted, and whether the model behaves as an exact denoiser would: the checks of an audit.

For the exact posterior mean D' = Cov(x_0 | x_t) / sigma², which is symmetric and has no negative eigenvalue, whatever the data. A
trained network has both defects to some degree; far beyond what well trained models show, something is wrong with it (a wrong
prediction type, weights that do not fit, a broken quantisation). The limits are conventions, not theorems; each check says its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

ASYMMETRY = 0.5  # of trained models at their best noise levels 0.01 to 0.2; a random matrix has 1
SPECTRAL_NORM = 100.0  # D' of trained models has single digits, tens under strong guidance
CERTIFICATE, HALF_CERTIFICATE = 3e-5, 5e-2  # of float32, and of half precision weights


def health(units: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """The checks, from units as docs/audit.md has them.

    Args:
        units: Done and failed ones.
        dtype: Of the model's weights.
    """
    done = [unit for unit in units if unit["status"] == "done"]
    certificate = CERTIFICATE if dtype == "float32" else HALF_CERTIFICATE
    failed = [unit["index"] for unit in units if unit["status"] == "failed"]
    checks = [
        _check("failed_units", len(failed), 0, failed, "units that raised an error; their errors stand with the units"),
        _count(done, "non_finite", "NaN or infinite values in final samples and spectra"),
        _largest(
            done, "asymmetry", ASYMMETRY, min,
            "|D' - D'^T| / |D' + D'^T| at the step where it is smallest: 0 for an exact score, 1 for a matrix without any symmetry",
        ),
        _largest(
            done, "spectral_norm", SPECTRAL_NORM, max,
            "largest singular value of D': by how much the denoiser can amplify a small change of its input",
        ),
        _largest(
            done, "certificate_error", certificate, max,
            "relative disagreement of the probed denoiser with the pipeline's own loop, away from the recorded point",
        ),
    ]  # fmt: skip
    return {"ok": all(check["ok"] is not False for check in checks), "checks": checks}


def _check(name: str, value: float | None, limit: float, units: list[int], meaning: str) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "limit": limit,
        "ok": None if value is None else not units,
        "meaning": meaning,
        "units": units,
    }


def _count(done: list[dict[str, Any]], name: str, meaning: str) -> dict[str, Any]:
    bad = [unit["index"] for unit in done if unit[name]]
    return _check(name, sum(unit[name] for unit in done) if done else None, 0, bad, meaning)


def _largest(
    done: list[dict[str, Any]], name: str, limit: float, over_steps: Callable[[Iterable[float]], float], meaning: str
) -> dict[str, Any]:
    """The largest over units of a number made of its steps; not known where no step has it."""
    found = {unit["index"]: [step[name] for step in unit["steps"] if step[name] is not None] for unit in done}
    values = {index: over_steps(steps) for index, steps in found.items() if steps}
    bad = [index for index, value in values.items() if value > limit]
    return _check(name, max(values.values(), default=None), limit, bad, meaning)
