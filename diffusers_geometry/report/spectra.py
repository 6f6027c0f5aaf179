"""Spectra as the page holds them: the data of the slider, and small charts of the whole run for paper and without script.

An audit of many runs has more singular values than a page should carry. At most 64 places of a spectrum are kept, dense among the
large values, and single runs as far as a budget of numbers goes; the median and the 80 % band are always over all runs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from markupsafe import Markup

from .charts import spectrum_panel
from .document import QUANTITIES, Source
from .text import MISSING, estimate, noise, number, percent, with_error

POINTS, PANELS, NUMBERS = 64, 12, 60_000


def explorer(source: Source, names: list[str], wanted: list[int]) -> dict[str, Any] | None:
    """The data of the slider: spectra over all runs and of single ones, with their numbers as text; None without any spectrum.

    Args:
        source: Of the page.
        names: Of all units.
        wanted: Units whose images are shown; their spectra come first.
    """
    spectra, document = source.spectra, source.document
    done = [i for i, unit in enumerate(document["units"]) if unit["status"] == "done"]
    if not np.isfinite(spectra).any():
        return None
    index = places(spectra.shape[2])
    chosen, steps = spectra[:, :, index], document["steps"]
    room = max(1, NUMBERS // (len(index) * len(steps)))
    first = [i for i in wanted if i in set(done)]
    shown = sorted([*first, *(i for i in done if i not in set(first))][:room])
    middle, low, high = quantiles(chosen)
    return {
        "index": (index + 1).tolist(), "size": int(spectra.shape[2]), "sigmas": [noise(step["sigma"]) for step in steps],
        "timesteps": [number(step.get("timestep"), 6) for step in steps], "names": [heading(i) for i in range(len(QUANTITIES))],
        "runs": len(done),
        "all": {
            "middle": _rounded(middle), "low": _rounded(low), "high": _rounded(high),
            "numbers": [[estimate(g.get(name), why=False) for name, _, _ in QUANTITIES] for g in document["geometry"]],
            "phases": [shares(g.get("phases") or {}) for g in document["geometry"]],
        },
        "units": [{"index": i, "name": names[i], "values": _rounded(chosen[i]), **_steps(document["units"][i])} for i in shown],
    }  # fmt: skip


def heading(quantity: int) -> str:
    """Name and unit of an entry of :data:`~.document.QUANTITIES`."""
    _, name, unit = QUANTITIES[quantity]
    return f"{name} ({unit})" if unit else name


def panels(spectra: np.ndarray, sigmas: list[float | None]) -> list[tuple[int, str, Markup]]:
    """(step, noise, small chart) of at most 12 steps spread over the run."""
    if not np.isfinite(spectra).any():
        return []
    index = places(spectra.shape[2])
    middle, low, high = quantiles(spectra[:, :, index])
    top = max(1.05 * float(np.nanmax(high)), 1.05)
    found = []
    for i in np.unique(np.linspace(0, len(sigmas) - 1, min(PANELS, len(sigmas))).round().astype(int)):
        known = np.isfinite(middle[i])
        if known.any():
            title = f"Singular values at σ = {noise(sigmas[i])}, median and 80 % band over runs"
            chart = spectrum_panel(title, middle[i][known], low[i][known], high[i][known], top, (index + 1)[known])
            found.append((int(i), noise(sigmas[i]), chart))
    return found


def places(size: int) -> np.ndarray:
    """At most 64 places of singular values, dense among the large ones."""
    if size <= POINTS:
        return np.arange(size)
    return np.unique(np.concatenate([np.arange(24), np.geomspace(24, size - 1, POINTS - 24).round().astype(int)]))


def quantiles(spectra: np.ndarray) -> np.ndarray:
    """Median, 10 % and 90 % over units, (3, steps, points); NaN where no unit has a value."""
    found = np.full((3, *spectra.shape[1:]), np.nan)
    finite = np.where(np.isfinite(spectra), spectra, np.nan)
    known = np.isfinite(finite).any(axis=0)
    if known.any():
        found[:, known] = np.nanquantile(finite[:, known], (0.5, 0.1, 0.9), axis=0)
    return found


def shares(phases: dict[str, float]) -> str:
    """Shares of phases in words, the phase alone where all runs agree."""
    found = [(name, share) for name, share in phases.items() if share]
    return found[0][0] if len(found) == 1 else ", ".join(f"{name} {percent(share)}" for name, share in found) or MISSING


def _steps(unit: dict[str, Any]) -> dict[str, Any]:
    steps = unit.get("steps") or []
    numbers = [[with_error(step.get(name), step.get(f"{name}_sem")) for name, _, _ in QUANTITIES] for step in steps]
    return {"numbers": numbers, "phases": [step.get("phase") or MISSING for step in steps]}


def _rounded(values: np.ndarray) -> list[list[float | None]]:
    """Four digits, None for NaN."""
    return [[float(f"{v:.4g}") if math.isfinite(v) else None for v in row] for row in values.tolist()]
