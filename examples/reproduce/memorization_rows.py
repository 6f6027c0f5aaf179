"""Rows and tables of the memorisation study: every score and every published formula, judged on captions that were held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from memorization_bench import CHEAP, COSTLY, RECORDED, STEPS, Prompts
from memorization_mitigation import Outcome

from diffusers_geometry.memorization import cross_seed_agreement, rank_prompts
from diffusers_geometry.memorization_metrics import Interval, auroc_interval, bootstrap, tpr_interval
from diffusers_geometry.memorization_scores import LONE_REVERSE, PROMPT_SCORES, SCORES

FREE = ("guidance_norm", "guidance_shift", "anisotropy", "commitment")  # of the run's own network outputs
MARKS = (("AUROC", 0.98), ("true positive rate at 1 % false positives", 0.8))


@dataclass(frozen=True)
class Row:
    """A score of every prompt.

    Attributes:
        name: What is shown.
        formula: Of the score, or how it is taken.
        source: Authors.
        extra: Network evaluations a seed beyond those of the run.
        total: With those of the run that it needs.
        values: Turned so that higher is more suspicious, (P,).
    """

    name: str
    formula: str
    source: str
    extra: float
    total: float
    values: np.ndarray


def rows_of(found: dict[str, np.ndarray]) -> list[Row]:
    """Every score as the mean over recorded steps, the cheapest at the first step alone, and the agreement of seeds."""
    rows, norm = [], SCORES["guidance_norm"]
    for name in (*CHEAP, *COSTLY):
        score, run = SCORES[name], 2 * STEPS if name in ("commitment", "flipd", "flipd_gap") else 2 * (RECORDED[-1] + 1)
        shown = np.log(np.maximum(found[name], 1e-12)) if score.positive else found[name]
        extra = 0 if name in FREE else (score.cost - 2 * (name.startswith("sharpness"))) * len(RECORDED)
        sign = 1 if score.higher_is_memorised else -1
        rows.append(Row(name, score.formula, score.source, extra, run + extra, sign * over_seeds(shown)))
    first = np.log(found["guidance_norm/steps"][..., 0])
    rows.append(Row("guidance_norm, first step", norm.formula, norm.source, 0, 2, over_seeds(first)))
    rows.append(Row("the same, one seed", norm.formula, norm.source, 0, 2, first[:, 0]))
    if found["final"].shape[1] > 1:
        agreement = PROMPT_SCORES["agreement"]
        values = np.array([cross_seed_agreement(torch.from_numpy(f)).value for f in found["final"]])
        rows.append(Row("agreement", agreement.formula, agreement.source, 0, 2 * STEPS, values))
    return rows


def published_rows(found: dict[str, np.ndarray]) -> list[Row]:
    """Formulas as coded, and corrected; all but the first are of x_T."""
    p = {key.removeprefix("published/"): over_seeds(v) for key, v in found.items() if key.startswith("published/")}
    norms = found["norms"]
    rows = [
        ("Wen", "guidance norm, mean over all steps: right as coded", 2 * STEPS, over_seeds(np.log(norms.mean(axis=-1)))),
        ("Jeon", "sharpness: right as coded for epsilon", SCORES["sharpness"].cost, np.log(p["sharpness"])),
        (
            "Asthana, as coded",
            "norm + 2 x cosine over channels at every pixel, at timestep 41 of pure noise",
            8,
            p["anisotropy as coded"],
        ),
        ("its cosine", "over channels at every pixel, averaged", 2, p["cosine per pixel"]),
        ("its cosine, whole vectors", "<e_u, e_c - e_u> / (|e_u| |e_c - e_u|)", 2, p["cosine whole"]),
        ("FLIPD at x_T, as coded", "one Gaussian probe, no Jacobian of e_u", 2 + 2 * LONE_REVERSE, -p["flipd as coded"]),
        ("FLIPD at x_T, whole Jacobian", "one Gaussian probe", 2 + 2 * LONE_REVERSE, -p["flipd with its Jacobian"]),
    ]
    return [Row(name, how, "", total, total, values) for name, how, total, values in rows]


def over_seeds(values: np.ndarray) -> np.ndarray:
    """Mean over the seeds that have a value, (P, S) -> (P,)."""
    return np.nanmean(values, axis=1)


def split(given: Prompts, seed: int = 0) -> np.ndarray:
    """Which captions are held out, half of every kind, (P,)."""
    rng, held = np.random.default_rng(seed), np.zeros(len(given), dtype=bool)
    for kind in ("planted", "control", "ordinary"):
        members = np.flatnonzero(np.array(given.kinds) == kind)
        held[rng.permutation(members)[: len(members) // 2]] = True
    return held


def separation(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Difference of means over the root mean square of the standard deviations, d'."""
    return float((positives.mean() - negatives.mean()) / np.sqrt((positives.var() + negatives.var()) / 2))


def judged(values: np.ndarray, planted: np.ndarray, draws: int) -> tuple[Interval, Interval, Interval]:
    """AUROC, true positive rate at 1 % false positives and separation, with intervals by caption."""
    pair = values[planted], values[~planted]
    return auroc_interval(*pair, draws=draws), tpr_interval(*pair, draws=draws), bootstrap(separation, *pair, draws=draws)


def combined(
    found: dict[str, np.ndarray], given: Prompts, held: np.ndarray, rows: list[Row]
) -> tuple[Row, dict[str, float], float]:
    """Log odds by weights that were fitted on the captions that are not held out, the weights, and their threshold."""
    labels = [None if out else bool(is_planted) for out, is_planted in zip(held, given.planted, strict=True)]
    ranking = rank_prompts({name: found[name] for name in (*CHEAP, *COSTLY)}, labels, draws=20)
    paid = ("sharpness_reverse", "sharpness", "flipd_gap", "contraction")  # flipd is a part of its gap
    extra = sum(row.extra for row in rows if row.name in paid)
    values = np.array([p.combined.value for p in ranking.prompts])
    row = Row("all together", "logistic regression of those above", "diffusers_geometry", extra, 2 * STEPS + extra, values)
    return row, ranking.weights, ranking.threshold


def unlabelled(found: dict[str, np.ndarray], given: Prompts) -> dict[str, int]:
    """What an audit without labels makes of all captions: how many planted ones are among the first, and what is flagged."""
    names = [name for name in (*CHEAP, *COSTLY) if name != "sharpness"]  # as in an audit
    ranking, planted = rank_prompts({name: found[name] for name in names}, draws=20), given.planted
    ranks, flagged = np.array([p.rank for p in ranking.prompts]), np.array([p.flagged for p in ranking.prompts])
    return {
        "first": int((ranks[planted] <= planted.sum()).sum()), "last": int(ranks[planted].max()), "all": len(planted),
        "found": int(flagged[planted].sum()), "planted": int(planted.sum()), "wrong": int(flagged[~planted].sum()),
    }  # fmt: skip


def asymmetry(found: dict[str, np.ndarray]) -> float:
    """Median relative difference of the reverse product's sharpness from the forward one's."""
    both = np.isfinite(found["sharpness"])
    forward, reverse = found["sharpness"][both], found["sharpness_reverse"][both]
    return float(np.median(np.abs(reverse - forward) / forward))


def marks(rows: list[Row], planted: np.ndarray, held: np.ndarray, draws: int) -> list[str]:
    """The marks for all together (the last row) and for the best other score, chosen on the captions that are not held out."""
    known = {row.name: separation(row.values[~held & planted], row.values[~held & ~planted]) for row in rows[:-1]}
    single = next(row for row in rows if row.name == max(known, key=known.get))
    lines = ["| mark on held-out captions | best single score | all together | wanted |", "| --- | --- | --- | --- |"]
    cells = [judged(row.values[held], planted[held], draws) for row in (single, rows[-1])]
    lines += [f"| {what} | {cells[0][i]} | {cells[1][i]} | >= {wanted} |" for i, (what, wanted) in enumerate(MARKS)]
    return [*lines, "", f"The best single score, chosen on the other captions, is {single.name}."]


def score_table(rows: list[Row], planted: np.ndarray, held: np.ndarray, draws: int) -> list[str]:
    """One line a score."""
    lines = [
        "| score | formula | source | forwards beside the run | AUROC | TPR at 1 % FPR | separation |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = " | ".join(str(i) for i in judged(row.values[held], planted[held], draws))
        lines.append(f"| {row.name} | {_cell(row.formula)} | {row.source} | {row.extra:.0f} | {cells} |")
    return lines


def published_table(rows: list[Row], planted: np.ndarray, held: np.ndarray, draws: int) -> list[str]:
    """One line a formula."""
    lines = ["| formula | what it is | forwards | AUROC | TPR at 1 % FPR | separation |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = " | ".join(str(i) for i in judged(row.values[held], planted[held], draws))
        lines.append(f"| {row.name} | {_cell(row.formula)} | {row.total:.0f} | {cells} |")
    return lines


def spectra_table(found: dict[str, np.ndarray], given: Prompts) -> list[str]:
    """Medians of every kind, and the AUROC of a low value."""
    kinds, planted = np.array(given.kinds), given.planted
    lines = ["| of D' | planted | control | ordinary | AUROC of low values |", "| --- | --- | --- | --- | --- |"]
    for name, values in found.items():
        medians = " | ".join(f"{np.median(values[kinds == kind]):.2f}" for kind in ("planted", "control", "ordinary"))
        lines.append(f"| {name} | {medians} | {auroc_interval(-values[planted], -values[~planted])} |")
    return lines


def mitigation_table(outcomes: list[Outcome]) -> list[str]:
    """One line a method."""
    lines = [
        "| flagged samples | planted that recite | median distance | planted, readable | ordinary, their digit | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for o in outcomes:
        cells = [f"{value:.0%} ± {error:.0%}" for value, error in (o.recited, o.readable, o.asked)]
        lines.append(f"| {o.method} | {cells[0]} | {o.distance:.1f} | {cells[1]} | {cells[2]} | {o.seconds:.2f} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
