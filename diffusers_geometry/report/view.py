"""A folder as its page needs it: every number as text with its error, every chart drawn, the data of the slider in one document.

The templates only place what stands here. Large audits are cut where a page must be: images to a budget of bytes, spectra of single
runs to a budget of numbers, charts to 60 recorded steps, the table of runs to 2,000. Each cut is said on the page; medians, bands
and the ranking chart are of all runs.
"""

from __future__ import annotations

from typing import Any

from ..disclosure import model_name
from ..viz import PHASE_COLOURS
from .charts import Series, legend_mark, phase_chart, phase_mark, step_chart
from .document import QUANTITIES, Source, thinned
from .memorization import image_rows, memorization_view
from .spectra import explorer, panels
from .summary import answers, looked_at, unranked
from .tables import ROWS, costs, facts, reference_table, step_table, unit_name, unit_table
from .text import MISSING, shortened

MAPS = {
    "denoised": "D'", "score": "the score's Jacobian", "epsilon": "the Jacobian of the predicted noise",
    "decoded": "the map to the decoded image", "decoder": "the decoder", "sampled": "the map to the finished sample",
}  # fmt: skip
# title, axis, quantities, whether the axis begins at zero, what it is
_CHARTS = (
    ("How many directions are kept", "directions", ("nu", "effective_dimension", "gap_dim", "flipd"), True,
     "They need not agree: ν counts by entropy, the effective dimension is tr D', the gap is the place of the largest drop."),
    ("Volume ψ", "ψ (nats)", ("psi",), False, "The sum of the logarithms of {psi} singular values."),
    ("Roughness δ", "δ (sign changes)", ("delta",), True, "Sign changes of units of the network in a small neighbourhood."),
    ("Largest singular value", "singular value", ("spectral_norm",), True, "A denoiser that only keeps or drops has 1 here."),
    ("Asymmetry of the Jacobian", "asymmetry", ("asymmetry",), True, "|D' − D'ᵀ| / |D' + D'ᵀ|. The score of a density has 0."),
)  # fmt: skip


def view(source: Source) -> dict[str, Any]:
    """All that the templates place."""
    document = source.document
    options = document["request"].get("options") or {}
    names = [unit_name(document, unit) for unit in document["units"]]
    drawn = thinned(source)
    geometry, sigmas = drawn.document["geometry"], [step["sigma"] for step in drawn.document["steps"]]
    rows = image_rows(source)
    psi = _psi_values(options.get("psi_rank"))
    return {
        "kind": source.kind, "document": document, "title": shortened(model_name(document), 100),
        "map": MAPS.get(options.get("of"), "D'"), "looked_at": looked_at(source), "answers": answers(source),
        "explorer": explorer(drawn, names, [unit for row in rows for unit in row.units]), "panels": panels(drawn.spectra, sigmas),
        "charts": _charts(geometry, sigmas, psi), "phases": _phases(geometry, sigmas),
        "moments": len(sigmas), "steps": step_table(document), "rows": rows, "memorization": memorization_view(document),
        "health": document["health"], "unranked": unranked(document),
        "failed": [(unit, names[i]) for i, unit in enumerate(document["units"]) if unit["status"] != "done"], "names": names,
        "reference": reference_table(document, names), "units": unit_table(document), "costs": costs(document),
        "facts": facts(document), "hashes": sorted((f, h or MISSING) for f, h in (document["model"].get("weights") or {}).items()),
        "repeat": document["provenance"].get("repeat"), "psi_values": psi, "rows_at_most": ROWS,
    }  # fmt: skip


def _charts(geometry: list[dict[str, Any]], sigmas: list[float | None], psi: str) -> list[dict[str, Any]]:
    """Quantities over the run: title, chart, legend, note; those that nobody measured are left out."""
    headings = {name: heading for name, heading, _ in QUANTITIES}
    charts = []
    for title, label, names, zero, note in _CHARTS:
        found = {name: [g.get(name) or {} for g in geometry] for name in names}
        lines = [Series(headings[n], [e.get("value") for e in f], [e.get("sem") for e in f]) for n, f in found.items()]
        series = [line for line in lines if line.known()]
        if series:
            note = note.format(psi=f"the {psi}")
            legend = [(legend_mark(i), line.name) for i, line in enumerate(series)] if len(series) > 1 else []
            charts.append({"title": title, "chart": step_chart(title, series, sigmas, label, zero), "legend": legend, "note": note})
    return charts


def _psi_values(rank: int | None) -> str:
    """Which singular values psi sums, in words."""
    return f"{rank} largest" if rank else "nonzero"


def _phases(geometry: list[dict[str, Any]], sigmas: list[float | None]) -> dict[str, Any] | None:
    shares = [g.get("phases") or {} for g in geometry]
    if not any(shares):
        return None
    shown = [name for name in PHASE_COLOURS if name != "unresolved" or any(s.get(name) for s in shares)]
    return {"chart": phase_chart("Phases over the run", shares, sigmas), "legend": [(phase_mark(n), n) for n in shown]}
