"""What a measurement of transitions found: agreement of clones over noise, speciation, collapse, and what theory says of them.

**Speciation.** Clones agree with probability E sum_c p(c | x_k)^2, c the class of their end. For two equally likely classes at
+-mu with variance v inside, along mu, that is phi(a), a = |mu|^2 / (v + sigma^2) (:func:`~.theory.clone_agreement`; George et al.,
arXiv:2502.04339). A U-turn with a stochastic sampler returns to the class of its start with the same probability. A deterministic
sampler always takes one x_k to one end, of two such classes the likelier, and returns with probability Phi(sqrt(a)) >= phi(a).
The speciation sigma is where the agreement falls to a chosen level: the agreements are made monotone by isotonic regression and
joined by a monotone cubic in log sigma, and its error is that of a bootstrap over the parents.

**The quick prediction** of Biroli et al. (arXiv:2402.18491) is sigma_S^2 = Lambda, the top eigenvalue of the data covariance:
|mu|^2 + v for two classes, against |mu|^2 / a - v for the level's a. In d >> n dimensions the top eigenvalue of n samples is mostly
theirs, not the data's; Lambda is therefore the variance of one half of them along the direction of the other.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtr

from .estimate import Estimate
from .speciation import ClassPair, share
from .storage import write_together
from .theory import clone_agreement

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TransitionReport:
    """Agreement over noise and both transitions; noise is variance-exploding, sigma_t / alpha_t, in the units of the samples.

    Attributes:
        positions: Loop positions branched at, ascending, (K,).
        sigmas: Noise there, descending, (K,); infinite at alpha_t = 0.
        gesture: "clones" (pairs of continuations of one x_k) or "u_turn" (a returning sample with its start).
        stochastic: Whether the sampler draws noise.
        agreements: Share of agreement of every parent, (P, K).
        level: Agreement that defines speciation.
        speciation: Measured sigma_S; None where the agreements do not cross the level.
        top_eigenvalue_sigma: sqrt(Lambda), quick prediction (:func:`~.speciation.top_eigenvalue`); None of fewer than 4 samples.
        pairs: All pairs of classes, and what theory says for each.
        recall: Share of U-turns of an example whose nearest neighbour in the data is that example, (K,); None without data.
        exact_recall: The parent's weight in the exact score of the data at the same points, (K,).
        collapse: sigma_C of the data by "weight" (E w = 1/2), "log_odds" (E log(w / (1 - w)) = 0), and with unseen data
            "held_out" (information from the model's errors = log n; an upper estimate; None where no crossing is found).
        settings: How it was measured.
    """

    positions: tuple[int, ...]
    sigmas: tuple[float, ...]
    gesture: str
    stochastic: bool
    agreements: np.ndarray
    level: float
    speciation: Estimate | None
    top_eigenvalue_sigma: Estimate | None
    pairs: list[ClassPair]
    recall: list[Estimate] | None = None
    exact_recall: list[Estimate] | None = None
    collapse: dict[str, Estimate | None] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def agreement(self) -> list[Estimate]:
        """Mean agreement at every position, with its error over the parents."""
        return [share(column) for column in self.agreements.T]

    @property
    def predicted_agreement(self) -> list[float] | None:
        """The closed form at every position for two classes, taken as equally likely and Gaussian; None for more of them."""
        if len(self.pairs) != 1:
            return None
        return [float(v) for v in self.closed_form(np.array(self.sigmas))]

    def closed_form(self, sigmas: np.ndarray) -> np.ndarray:
        """Agreement for the one pair of classes at any noise levels: phi(a), or Phi(sqrt a) of a deterministic sampler."""
        snr = max(self.pairs[0].mean_norm_squared, 0.0) / (self.pairs[0].within_variance + sigmas**2)
        return clone_agreement(snr) if self.stochastic else ndtr(np.sqrt(snr))

    def rows(self) -> list[dict[str, Any]]:
        """One record per position: numbers, None where not measured."""
        rows = []
        for i, (position, sigma) in enumerate(zip(self.positions, self.sigmas, strict=True)):
            row: dict[str, Any] = {"position": position, "sigma": sigma if math.isfinite(sigma) else None}
            for name, values in (("agreement", self.agreement), ("recall", self.recall), ("exact_recall", self.exact_recall)):
                row[name], row[f"{name}_sem"] = (None, None) if values is None else (values[i].value, values[i].sem)
            row["predicted_agreement"] = None if self.predicted_agreement is None else self.predicted_agreement[i]
            rows.append(row)
        return rows

    def findings(self) -> list[tuple[str, str]]:
        """(what, value) of every transition, in words."""
        found = [(f"speciation, measured agreement = {self.level:g}", self._speciation())]
        count = self.settings.get("samples_for_predictions")
        of = "" if count is None else f" on halves of {count} samples"
        found.append((f"speciation, square root of the top covariance eigenvalue{of}", self._top_eigenvalue()))
        given = sorted((p for p in self.pairs if p.sigma is not None), key=lambda p: p.sigma.value)
        names = ("closest", "farthest") if len(given) > 1 else ("only",)
        for name, pair in zip(names, (given[:1] + given[-1:])[: len(names)], strict=False):
            found.append((f"speciation, theory for the {name} pair of classes {pair.classes}", str(pair.sigma)))
        says = {"weight": "exact score of the data, E w = 1/2", "log_odds": "exact score of the data, E log(w/(1-w)) = 0",
                "held_out": "errors on unseen data (upper estimate)"}  # fmt: skip
        missing = "not within the run's noise"
        return found + [(f"collapse, {says[k]}", missing if v is None else str(v)) for k, v in self.collapse.items()]

    def _top_eigenvalue(self) -> str:
        mark = self.top_eigenvalue_sigma
        if mark is None:
            return "not found: of four samples or more only"
        loose = mark.bias is not None and mark.sem is not None and -mark.bias > 2 * mark.sem
        return str(mark) + (f" (up to {mark.value - mark.bias:.4g}, in the samples themselves)" if loose else "")

    def _speciation(self) -> str:
        if self.speciation is not None:
            return str(self.speciation) + ("" if self.speciation.converged else " (at the edge of the measured range)")
        lowest, highest = (f([e.value for e in self.agreement]) for f in (min, max))
        return f"not found: agreement is within {lowest:.3f} and {highest:.3f}"

    def table(self) -> str:
        """Plain text: a line per position, then the transitions in units of sigma."""
        names = ["position", "sigma", "agreement", "closed form", "recall", "exact recall"]
        cells = [names]
        for row in self.rows():
            line = [str(row["position"]), "inf" if row["sigma"] is None else f"{row['sigma']:.4g}", _cell(row, "agreement")]
            predicted = row["predicted_agreement"]
            cells.append(
                [*line, "-" if predicted is None else f"{predicted:.3f}", _cell(row, "recall"), _cell(row, "exact_recall")]
            )
        used = [j for j in range(len(names)) if any(line[j] != "-" for line in cells[1:])]
        widths = {j: max(len(line[j]) for line in cells) for j in used}
        lines = ["  ".join(line[j].rjust(widths[j]) for j in used) for line in cells]
        width = max(len(what) for what, _ in self.findings())
        return "\n".join([*lines, "", *(f"{what.ljust(width)}  sigma = {value}" for what, value in self.findings())])

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; an infinite sigma is None."""
        document = asdict(self) | {"agreements": self.agreements.tolist()}
        document["sigmas"] = [s if math.isfinite(s) else None for s in self.sigmas]
        return document

    def save(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON."""
        data = json.dumps(self.to_dict(), indent=1, allow_nan=False).encode()
        write_together(Path(path).parent, {Path(path).name: data})

    @classmethod
    def load(cls, path: str | os.PathLike) -> TransitionReport:
        """Reads what :meth:`save` wrote."""
        given = json.loads(Path(path).read_text())
        given["positions"], given["agreements"] = tuple(given["positions"]), np.array(given["agreements"])
        given["sigmas"] = tuple(math.inf if s is None else s for s in given["sigmas"])
        for name in ("speciation", "top_eigenvalue_sigma"):
            given[name] = None if given[name] is None else Estimate(**given[name])
        for name in ("recall", "exact_recall"):
            given[name] = None if given[name] is None else [Estimate(**e) for e in given[name]]
        given["collapse"] = {k: None if e is None else Estimate(**e) for k, e in given["collapse"].items()}
        given["pairs"] = [
            ClassPair(**p | {"classes": tuple(p["classes"]), "sigma": None if p["sigma"] is None else Estimate(**p["sigma"])})
            for p in given["pairs"]
        ]
        return cls(**given)

    def plot(self, path: str | os.PathLike | None = None) -> Figure:
        """Draws agreement, recall and all transitions over sigma, see :func:`~.viz.plot_transitions`."""
        from .viz import plot_transitions

        return plot_transitions(self, path)


def _cell(row: dict[str, Any], name: str) -> str:
    return "-" if row[name] is None else f"{row[name]:.3f} ± {row[f'{name}_sem']:.3f}"
