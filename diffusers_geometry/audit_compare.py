"""Two audits side by side: two checkpoints, a base and its LoRA, two precisions.

Where both audits have the same prompt and seed, the noise and the probes are the same too, and the difference of the two units is
what is tested. Units that share a prompt, or a noise, are not independent, so the variance of the mean difference is the largest of
four: by units, by prompts, by seeds, and prompts + seeds - units (Cameron, Gelbach and Miller, Robust Inference with Multiway
Clustering, 2011, equation 2.13), with the degrees of freedom that belong to it. Without common units, means of prompts are
compared by Welch's test. p-values are corrected for the number of quantities by Holm's method, which holds however they depend on
one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

STEP_QUANTITIES = ("psi", "nu", "delta", "effective_dimension", "gap_dim", "flipd", "spectral_norm", "asymmetry")
ALPHA = 0.05  # probability of any false alarm among all quantities
_SAME = ("of", "branch", "psi_rank", "relative_threshold")  # options without which numbers are of different things


@dataclass(frozen=True)
class Difference:
    """One quantity in two audits.

    Attributes:
        quantity: Name in docs/audit.md.
        position: The recorded step, or None for a number of the whole unit.
        first: Mean in the first audit, over the units that are compared.
        second: Mean in the second.
        difference: Second minus first.
        sem: Standard error of the difference; None for a single pair.
        n: Pairs, or units of the smaller audit where they are not paired.
        p_value: Of no difference; None where it cannot be tested.
        p_holm: After Holm's correction.
        is_significant: Whether that is below the level.
    """

    quantity: str
    position: int | None
    first: float
    second: float
    difference: float
    sem: float | None
    n: int
    p_value: float | None
    p_holm: float | None = None
    is_significant: bool = False


@dataclass(frozen=True)
class AuditComparison:
    """All quantities of two audits.

    Attributes:
        first: ``model`` of the first audit.
        second: ``model`` of the second.
        pairs: Units that both have; 0 where they are compared unpaired.
        differences: One a quantity and step.
        settings: Arguments of the call that differ, {name: (first, second)}.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    pairs: int
    differences: tuple[Difference, ...]
    settings: dict[str, tuple[Any, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"alpha": ALPHA, "correction": "Holm"}

    def table(self) -> str:
        """As text: every quantity, a star where the difference is significant."""
        pairs = f"{self.pairs} pairs of units" if self.pairs else "no common units: means of prompts are compared"
        lines = [f"A {_model(self.first)}", f"B {_model(self.second)}", pairs]
        lines += [f"differs in the call: {name} {a!r} and {b!r}" for name, (a, b) in self.settings.items()]
        lines.append(f"{'quantity':<22} {'step':>5} {'A':>11} {'B':>11} {'B - A':>11} {'error':>9} {'p':>8} {'p (Holm)':>8}")
        for d in self.differences:
            place = "run" if d.position is None else str(d.position)
            ps = " ".join("       -" if p is None else f"{p:8.2g}" for p in (d.p_value, d.p_holm))
            error = "        -" if d.sem is None else f"{d.sem:9.2g}"
            numbers = " ".join(f"{v:11.4g}" for v in (d.first, d.second, d.difference))
            lines.append(f"{d.quantity:<22} {place:>5} {numbers} {error} {ps}{' *' if d.is_significant else ''}")
        count = sum(d.is_significant for d in self.differences)
        tested = sum(d.p_value is not None for d in self.differences)
        lines.append(f"{count} of {tested} differ at a family-wise level of {ALPHA:g}.")
        return "\n".join(lines)


def compare_audits(first: dict[str, Any], second: dict[str, Any]) -> AuditComparison:
    """Compares two ``audit.json``.

    Raises:
        ValueError: other steps, another map, branch or rank of psi, or no finished unit.
    """
    _require_comparable(first, second)
    sides = [_by_key(first), _by_key(second)]
    common = [key for key in sides[0] if key in sides[1]]
    names = [(name, k) for k in range(len(first["steps"])) for name in STEP_QUANTITIES]
    scores = sorted({s for side in sides for unit in side.values() for s in unit["scores"]})
    names += [(f"score {name}", None) for name in scores] + [("manifold_dim", None)]
    found = []
    for name, k in names:
        position = None if k is None else first["steps"][k]["position"]
        difference = _paired(sides, common, name, k, position) if common else _unpaired(sides, name, k, position)
        found += [] if difference is None else [difference]
    calls = [document["request"]["call"] for document in (first, second)]
    changed = {n: (calls[0].get(n), calls[1].get(n)) for n in sorted({*calls[0], *calls[1]}) if calls[0].get(n) != calls[1].get(n)}
    return AuditComparison(first["model"], second["model"], len(common), tuple(_holm(found)), changed)


def mean_difference(values: np.ndarray, prompts: Sequence[Any], seeds: Sequence[Any]) -> tuple[float, float | None, float | None]:
    """(mean, standard error, p-value of zero) of paired differences that share prompts and seeds.

    Args:
        values: Differences, (n,).
        prompts: Of each.
        seeds: Of each.
    """
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return mean, None, None
    away = values - mean
    by_units = float(away @ away) / (count * (count - 1))
    candidates = [(by_units, count - 1.0)]
    clustered = [_clustered(away, labels) for labels in (prompts, seeds)]
    candidates += [c for c in clustered if c is not None]
    if all(clustered):
        (vp, dp), (vs, ds) = clustered
        total = vp + vs - by_units
        candidates += [(total, total**2 / (vp**2 / dp + vs**2 / ds))] if total > 0 else []
    variance, freedom = max(candidates)
    if variance <= (np.finfo(np.float64).eps * np.abs(values).max()) ** 2:  # all alike: no scale to judge by but the signs'
        return mean, 0.0, 1.0 if mean == 0 else 2.0 ** (1 - count)
    return mean, math.sqrt(variance), float(2 * student.sf(abs(mean) / math.sqrt(variance), freedom))


def _clustered(away: np.ndarray, labels: Sequence[Any]) -> tuple[float, float] | None:
    """(variance of the mean, degrees of freedom) by clusters; None for clusters of one, or a single cluster."""
    groups = {label: 0.0 for label in labels}
    if len(groups) in (1, len(away)):
        return None
    for label, value in zip(labels, away.tolist(), strict=True):
        groups[label] += value
    count = len(groups)
    return count / (count - 1) * sum(total**2 for total in groups.values()) / len(away) ** 2, count - 1.0


def _paired(sides: list[dict], common: list[tuple], name: str, k: int | None, position: int | None) -> Difference | None:
    pairs = [(key, *(_value(side[key], name, k) for side in sides)) for key in common]
    known = [(key, a, b) for key, a, b in pairs if a is not None and b is not None]
    if not known:
        return None
    keys, a, b = zip(*known, strict=True)
    mean, sem, p_value = mean_difference(np.subtract(b, a), [key[0] for key in keys], [key[1] for key in keys])
    return Difference(name, position, float(np.mean(a)), float(np.mean(b)), mean, sem, len(known), p_value)


def _unpaired(sides: list[dict], name: str, k: int | None, position: int | None) -> Difference | None:
    """Welch's test of prompts' means, or of units where an audit has one prompt."""
    groups = [{key: v for key, unit in side.items() if (v := _value(unit, name, k)) is not None} for side in sides]
    if not all(groups):
        return None
    by_prompt = min(len({key[0] for key in group}) for group in groups) > 1
    values = [_prompt_means(group) if by_prompt else np.array([*group.values()]) for group in groups]
    means, counts = [float(v.mean()) for v in values], [len(v) for v in values]
    if min(counts) < 2:
        return Difference(name, position, *means, means[1] - means[0], None, min(counts), None)
    variances = [float(v.var(ddof=1)) / n for v, n in zip(values, counts, strict=True)]
    total = sum(variances)
    if total == 0:
        return Difference(name, position, *means, means[1] - means[0], 0.0, min(counts), 1.0 if means[0] == means[1] else None)
    freedom = total**2 / sum(v**2 / (n - 1) for v, n in zip(variances, counts, strict=True))
    p_value = float(2 * student.sf(abs(means[1] - means[0]) / math.sqrt(total), freedom))
    return Difference(name, position, *means, means[1] - means[0], math.sqrt(total), min(counts), p_value)


def _prompt_means(group: dict[tuple, float]) -> np.ndarray:
    found: dict[str, list[float]] = {}
    for (prompt, _), value in group.items():
        found.setdefault(prompt, []).append(value)
    return np.array([np.mean(values) for values in found.values()])


def _holm(found: list[Difference]) -> list[Difference]:
    """With Holm's p-values: of m sorted ones the i-th is multiplied by m - i, and none is below the one before it."""
    tested = sorted((i for i, d in enumerate(found) if d.p_value is not None), key=lambda i: found[i].p_value)
    least, result = 0.0, list(found)
    for rank, i in enumerate(tested):
        least = max(least, min(1.0, found[i].p_value * (len(tested) - rank)))
        result[i] = Difference(**asdict(found[i]) | {"p_holm": least, "is_significant": least < ALPHA})
    return result


def _by_key(audit: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Finished units by prompt and seed."""
    prompts = {prompt["index"]: prompt["sha256"] for prompt in audit["prompts"]}
    return {(prompts[unit["prompt"]], unit["seed"]): unit for unit in audit["units"] if unit["status"] == "done"}


def _value(unit: dict[str, Any], name: str, k: int | None) -> float | None:
    if k is not None:
        return unit["steps"][k][name]
    return unit[name] if name in unit else unit["scores"].get(name.removeprefix("score "), {}).get("value")


def _require_comparable(first: dict[str, Any], second: dict[str, Any]) -> None:
    for audit in (first, second):
        if not audit["steps"]:
            raise ValueError(f"the audit of {_model(audit['model'])} has no finished unit. Expected at least one in both.")
    positions = [[step["position"] for step in audit["steps"]] for audit in (first, second)]
    if positions[0] != positions[1]:
        raise ValueError(f"the audits record the steps {positions[0]} and {positions[1]}. Expected the same in both.")
    for name in _SAME:
        values = [audit["request"]["options"][name] for audit in (first, second)]
        if values[0] != values[1]:
            raise ValueError(f"the audits have {name} {values[0]!r} and {values[1]!r}. Expected the same in both.")


def _model(model: dict[str, Any]) -> str:
    commit = f"@{model['revision'][:12]}" if model["revision"] else ""
    return f"{model['name']}{commit} ({model['dtype']})"
