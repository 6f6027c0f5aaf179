"""One score from many, and prompts in the order of suspicion with how sure that order is.

Every score is first turned so that higher is more suspicious, sizes by their logarithm, averaged over a prompt's seeds, and put in
units of the bulk: (value - median) / (1.4826 MAD) over all prompts (over the known negatives where there are labels). Then

    labels      a logistic regression with a ridge penalty; the prompts' own scores come from folds that have not seen them, the
                weights told are those fitted on all; the threshold is exceeded by at most 1 % of the known negatives
    no labels   the mean of the scores, each softened so that no single one decides, in units of the bulk again; a prompt
                is flagged where it is outlying, see :mod:`.memorization_bulk`: it is unlike the others. Where half recite, there
                is no bulk

An interval of ranks comes from resampling seeds within every prompt. Of n seeds the mean of a resample has the variance of a mean
times (n - 1) / n, half of it for two seeds, so deviations from the prompt's own mean are made longer by sqrt(n / (n - 1)). Of a
prompt with a single seed nothing is known of its spread: it has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.stats import rankdata

from .estimate import Estimate
from .memorization_bulk import bulk, outlying, softened
from .memorization_metrics import (
    BOOTSTRAP_DRAWS,
    FALSE_POSITIVE_RATE,
    Interval,
    auroc_interval,
    roc,
    threshold_at_fpr,
    tpr_interval,
)
from .memorization_scores import PROMPT_SCORES, SCORES

RIDGE = 1.0
FOLDS, LEAST_LABELLED, LEAST_JUDGED = 5, 5, 2  # prompts of each kind that are fitted, and that a score is judged by


@dataclass(frozen=True)
class Quality:
    """How a score separates the labelled prompts.

    Attributes:
        auroc: With its interval, by prompt.
        tpr_at_1_fpr: True positive rate at 1 % false positives, with its interval.
        false_positive_rates: Of the ROC curve, from 0 to 1.
        true_positive_rates: Of the same thresholds.
    """

    auroc: Interval
    tpr_at_1_fpr: Interval
    false_positive_rates: list[float]
    true_positive_rates: list[float]


@dataclass(frozen=True)
class PromptRank:
    """A prompt's place.

    Attributes:
        combined: Higher is more suspicious; its error is that over seeds, None for one seed.
        rank: 1 is most suspicious.
        rank_interval: 95 % by resampling seeds; None for one seed, also where the others of the prompt failed.
        flagged: Whether it exceeds the threshold.
    """

    combined: Estimate
    rank: int
    rank_interval: tuple[int, int] | None
    flagged: bool


@dataclass(frozen=True)
class Ranking:
    """Prompts compared.

    Attributes:
        prompts: One :class:`PromptRank` a prompt, None where it has no scores.
        weights: Of every score in the combined one.
        fitted_on: "labels" or "robust z".
        threshold: Combined score above which a prompt is flagged.
        certainty: A sentence on how far to trust it.
        quality: Per score, against the labels; empty without two of both kinds.
        combined_quality: Of the combined score, every prompt scored by weights that have not seen it; None without labels.
        correlation: Spearman correlation of every score with the combined one, over prompts.
    """

    prompts: tuple[PromptRank | None, ...]
    weights: dict[str, float]
    fitted_on: str
    threshold: float
    certainty: str
    quality: dict[str, Quality]
    combined_quality: Quality | None
    correlation: dict[str, float]


def rank_prompts(
    scores: Mapping[str, np.ndarray], labels: Sequence[bool | None] | None = None, *, seed: int = 0, draws: int = BOOTSTRAP_DRAWS
) -> Ranking:
    """Orders prompts by suspicion.

    Args:
        scores: Per name of a score, values (prompts, seeds), NaN for units that failed, or (prompts,) for a score of whole prompts.
            A score that is missing for a prompt that has others is left out.
        labels: Per prompt whether it is known to be memorised, None where it is not known. From five of each kind they are fitted.
        seed: Of bootstrap and folds.
        draws: Bootstrap draws.

    Raises:
        ValueError: an unknown score, arrays that do not fit, no score that all prompts have, or fewer than three prompts.
    """
    turned = {name: _turned(name, values) for name, values in scores.items()}
    counts = {len(v) for v in turned.values()} | ({len(labels)} if labels is not None else set())
    if len(counts) != 1 or counts.pop() < 3:
        raise ValueError(
            f"scores and labels of {sorted({len(v) for v in turned.values()})} prompts. Expected one number, at least 3."
        )
    present = np.array([np.isfinite(v).any(axis=1) for v in turned.values()]).any(axis=0)
    turned = {name: v[present] for name, v in turned.items() if np.isfinite(v[present]).any(axis=1).all()}
    if not turned or present.sum() < 3:
        raise ValueError(
            f"{int(present.sum())} prompts have scores, {len(turned)} scores have all of them. Expected 3 and 1 at least."
        )
    known = [None] * len(present) if labels is None else [None if x is None else bool(x) for x in labels]
    positive, negative = (np.array([x is wanted for x in known])[present] for wanted in (True, False))
    rng = np.random.default_rng(seed)
    fewest = min(positive.sum(), negative.sum())
    is_fitted, is_judged = fewest >= LEAST_LABELLED, fewest >= LEAST_JUDGED
    model = (_Fitted if is_fitted else _Unlabelled)(turned, positive, negative, rng)
    running = _running(turned)
    drawn = np.array([model.combined(_resampled(turned, rng)) for _ in range(draws)]) if running.shape[1] > 1 else None
    quality = {name: _quality(_means(v), positive, negative, seed, draws) for name, v in turned.items()} if is_judged else {}
    ranks = iter(_ranks(model, drawn, running.sum(axis=1)))
    return Ranking(
        tuple(next(ranks) if kept else None for kept in present),
        dict(zip(turned, model.weights.tolist(), strict=True)),
        "labels" if is_fitted else "robust z",
        model.threshold,
        model.certainty(drawn),
        quality,
        _quality(model.values, positive, negative, seed, draws) if is_judged else None,
        {name: _spearman(_means(v), model.values) for name, v in turned.items()},
    )


class _Unlabelled:
    """The mean of softened robust z scores."""

    def __init__(self, turned: dict[str, np.ndarray], positive: np.ndarray, negative: np.ndarray, rng: np.random.Generator) -> None:
        means = np.stack([_means(v) for v in turned.values()], axis=1)
        ordinary = negative if negative.sum() >= LEAST_LABELLED else np.ones(len(means), dtype=bool)
        self.centre, self.spread = bulk(means[ordinary])
        self.weights = np.full(len(turned), 1 / len(turned))
        plain = self._units(means) @ self.weights
        self.scale = tuple(float(x[0]) for x in bulk(plain[ordinary, None]))
        self.values, self.threshold = (plain - self.scale[0]) / self.scale[1], outlying(int(ordinary.sum()))[0]

    def _units(self, means: np.ndarray) -> np.ndarray:
        return softened(means, self.centre, self.spread)

    def combined(self, means: np.ndarray) -> np.ndarray:
        """Combined scores of prompts from their scores' means (P, scores)."""
        return (self._units(means) @ self.weights - self.scale[0]) / self.scale[1]

    def certainty(self, drawn: np.ndarray | None) -> str:
        """What the flags are worth."""
        flagged, count = int((self.values > self.threshold).sum()), len(self.values)
        false = outlying(count)[1]
        text = (
            f"No labels: {flagged} of {count} prompts lie more than {self.threshold:.3g} robust standard deviations above the "
            f"bulk of this audit, where a normal bulk would put {false:.1g}. They are unlike the other prompts, which is no proof "
            "of recitation; and where a large share of the prompts recites, the bulk does too and none stands out."
        )
        return text + _stability(self.values > self.threshold, drawn, self.threshold)


class _Fitted(_Unlabelled):
    """Logistic regression on the labelled prompts."""

    def __init__(self, turned: dict[str, np.ndarray], positive: np.ndarray, negative: np.ndarray, rng: np.random.Generator) -> None:
        super().__init__(turned, positive, negative, rng)
        units = self._units(np.stack([_means(v) for v in turned.values()], axis=1))
        self.counts = int(positive.sum()), int(negative.sum())
        self.intercept, self.weights = fit_logistic(units[positive], units[negative])
        self.values = units @ self.weights + self.intercept
        for fold in _folds(positive, negative, rng):
            intercept, weights = fit_logistic(units[positive & ~fold], units[negative & ~fold])
            self.values[fold] = units[fold] @ weights + intercept
        self.threshold = threshold_at_fpr(self.values[negative])

    def combined(self, means: np.ndarray) -> np.ndarray:
        """Log odds by the weights of all labelled prompts."""
        return self._units(means) @ self.weights + self.intercept

    def certainty(self, drawn: np.ndarray | None) -> str:
        """What the flags are worth."""
        text = (
            f"Weights are fitted on {self.counts[0]} prompts known to be memorised and {self.counts[1]} known not to be; every "
            f"labelled prompt is scored by weights that have not seen it, and the threshold is the one that at most "
            f"{FALSE_POSITIVE_RATE:.0%} of the known negatives exceed."
        )
        if self.counts[1] < 100:
            text += f" With {self.counts[1]} negatives a rate of 1 % cannot be told from 0."
        return text + _stability(self.values > self.threshold, drawn, self.threshold)


def fit_logistic(positives: np.ndarray, negatives: np.ndarray, ridge: float = RIDGE) -> tuple[float, np.ndarray]:
    """Intercept and weights (k,) of the ridge-penalised logistic regression of scores (p, k) against (n, k).

    Both classes count as much in all, whatever their numbers: -(1/2) [mean log p over positives + mean log (1 - p) over negatives]
    + ridge / (2 N) |w|², N the number of prompts.
    """
    features, count = np.concatenate([positives, negatives]), len(positives) + len(negatives)
    sign = np.concatenate([np.ones(len(positives)), -np.ones(len(negatives))])
    share = np.where(sign > 0, 0.5 / len(positives), 0.5 / len(negatives))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (features @ parameters[1:] + parameters[0])
        slope = -share * sign / (1 + np.exp(np.clip(margin, -500, 500)))
        value = (share * np.logaddexp(0, -margin)).sum() + ridge / (2 * count) * (parameters[1:] ** 2).sum()
        gradient = np.concatenate([[slope.sum()], slope @ features + ridge / count * parameters[1:]])
        return value, gradient

    found = minimize(loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000, "gtol": 1e-9})
    return float(found.x[0]), found.x[1:]


def _turned(name: str, values: np.ndarray) -> np.ndarray:
    """(P, S), higher more suspicious, sizes by their logarithm."""
    known = SCORES | PROMPT_SCORES
    if name not in known:
        raise ValueError(f"scores have {name!r}. Expected names in {list(known)}.")
    values = np.asarray(values, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or np.isinf(values).any():
        raise ValueError(f"scores[{name!r}] has shape {values.shape}. Expected (prompts, seeds), finite or NaN.")
    if known[name].positive:
        values = np.log(np.maximum(values, np.finfo(np.float32).tiny))
    return values if known[name].higher_is_memorised else -values


def _means(values: np.ndarray) -> np.ndarray:
    return np.nanmean(values, axis=1)


def _running(turned: dict[str, np.ndarray]) -> np.ndarray:
    """Units (P, seeds) that have every score of units."""
    seeds = max(v.shape[1] for v in turned.values())
    return np.stack([np.isfinite(v) for v in turned.values() if v.shape[1] == seeds]).all(axis=0)


def _resampled(turned: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Means (P, scores) over seeds drawn with replacement within every prompt, the same draw for every score.

    They lie as far from the prompt's own means as means over other seeds do.
    """
    running = _running(turned)
    count, seeds = running.shape
    order = np.argsort(~running, axis=1, kind="stable")  # units that ran come first
    lived = np.maximum(running.sum(axis=1), 1)
    drawn = order[np.arange(count)[:, None], (rng.random((count, seeds)) * lived[:, None]).astype(int)]
    kept = np.arange(seeds) < lived[:, None]  # as many draws as there are units
    longer = np.sqrt(lived / np.maximum(lived - 1, 1))

    def mean(values: np.ndarray) -> np.ndarray:
        if values.shape[1] != seeds:
            return _means(values)
        own, other = (np.nanmean(np.where(kept, np.take_along_axis(values, i, axis=1), np.nan), axis=1) for i in (order, drawn))
        return own + longer * (other - own)

    return np.stack([mean(v) for v in turned.values()], axis=1)


def _ranks(model: _Unlabelled, drawn: np.ndarray | None, lived: np.ndarray) -> list[PromptRank]:
    """One a prompt; ``lived`` counts its seeds (P,)."""
    ranks = rankdata(-model.values, method="ordinal").astype(int)
    intervals, sems = [None] * len(ranks), [None] * len(ranks)
    if drawn is not None:
        places = rankdata(-drawn, axis=1)
        low, high = np.quantile(places, [0.025, 0.975], axis=0)
        intervals = [(min(math.floor(a), int(r)), max(math.ceil(b), int(r))) for a, b, r in zip(low, high, ranks, strict=True)]
        sems = drawn.std(axis=0, ddof=1).tolist()
    return [
        PromptRank(Estimate(float(v), sem=s if n > 1 else None), int(r), i if n > 1 else None, bool(v > model.threshold))
        for v, s, r, i, n in zip(model.values, sems, ranks, intervals, lived, strict=True)
    ]


def _stability(flagged: np.ndarray, drawn: np.ndarray | None, threshold: float) -> str:
    if drawn is None:
        return " One seed a prompt: nothing is known of how much another seed would change."
    same = ((drawn > threshold) == flagged).mean(axis=0)
    return f" With other seeds {int((same < 0.95).sum())} of {len(same)} prompts change sides in more than 5 % of draws."


def _folds(positive: np.ndarray, negative: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Masks (P,) of labelled prompts, each kind dealt out evenly."""
    dealt = np.full(len(positive), -1)
    for members in (np.flatnonzero(positive), np.flatnonzero(negative)):
        dealt[rng.permutation(members)] = np.arange(len(members)) % FOLDS
    return [dealt == fold for fold in range(FOLDS)]


def _quality(values: np.ndarray, positive: np.ndarray, negative: np.ndarray, seed: int, draws: int) -> Quality:
    pair = values[positive], values[negative]
    rates = roc(*pair)
    intervals = (interval(*pair, seed=seed, draws=draws) for interval in (auroc_interval, tpr_interval))
    return Quality(*intervals, *(r.tolist() for r in rates))


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; 0 where one of the two is constant."""
    a, b = (rankdata(v) - (len(v) + 1) / 2 for v in (first, second))
    length = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / length) if length else 0.0
