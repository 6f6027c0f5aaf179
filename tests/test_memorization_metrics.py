"""ROC and its relatives against scikit-learn and by counting; the ranking of prompts against what it must not do."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

from diffusers_geometry.memorization_bulk import OUTLYING, outlying
from diffusers_geometry.memorization_detector import FOLDS, fit_logistic, rank_prompts
from diffusers_geometry.memorization_metrics import (
    auroc,
    auroc_interval,
    bootstrap,
    roc,
    threshold_at_fpr,
    tpr_at_fpr,
    tpr_interval,
)
from diffusers_geometry.memorization_scores import SCORES


def drawn(positives=40, negatives=70, shift=1.0, seed=0, digits=1):
    """Rounded, so that there are ties."""
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, positives).round(digits), rng.normal(0, 1, negatives).round(digits)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_auroc_and_roc_are_scikit_learns(seed):
    positives, negatives = drawn(seed=seed)
    truth = np.r_[np.ones(40), np.zeros(70)]
    scores = np.r_[positives, negatives]
    assert auroc(positives, negatives) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    np.testing.assert_allclose(roc(positives, negatives), (fpr, tpr), atol=1e-12)


def test_auroc_counts_pairs():
    positives, negatives = np.array([3.0, 1.0, 2.0]), np.array([2.0, 0.0])
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    assert auroc(positives, negatives) == wins / 6


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05, 0.29])
def test_true_positive_rate_by_counting(rate):
    positives, negatives = drawn(negatives=100, seed=3)
    best = max((positives > t).mean() for t in negatives if (negatives > t).mean() <= rate)
    assert tpr_at_fpr(positives, negatives, rate) == best
    assert (negatives > threshold_at_fpr(negatives, rate)).mean() <= rate


def test_bootstrap_has_the_width_of_repetition():
    values = [auroc(*drawn(seed=seed, digits=6)) for seed in range(400)]
    intervals = [bootstrap(auroc, *drawn(seed=seed, digits=6), draws=200) for seed in range(60)]
    width = np.mean([i.high - i.low for i in intervals])
    assert width == pytest.approx(2 * 1.96 * np.std(values), rel=0.12)
    assert np.mean([i.low <= np.mean(values) <= i.high for i in intervals]) > 0.85


@pytest.mark.parametrize(("counts", "truth"), [((15, 170), 0.97), ((10, 10), 0.99)])
def test_auroc_interval_holds_the_truth_where_the_bootstrap_alone_does_not(counts, truth):
    """Normal scores: their AUROC is Phi(shift / sqrt(2))."""
    rng, shift = np.random.default_rng(0), norm.ppf(truth) * np.sqrt(2)
    held, alone = [], []
    for seed in range(100):
        pair = rng.normal(shift, 1, counts[0]), rng.normal(0, 1, counts[1])
        for make, found in ((lambda *p, **k: auroc_interval(*p, **k), held), (lambda *p, **k: bootstrap(auroc, *p, **k), alone)):
            interval = make(*pair, seed=seed, draws=60)
            assert interval.low <= interval.value <= interval.high
            found.append(interval.low <= truth <= interval.high)
    assert np.mean(held) > 0.95
    assert np.mean(alone) < 0.93


def test_intervals_of_perfect_separation_have_the_width_of_the_counts():
    pair = np.arange(15.0) + 1000, np.arange(170.0)
    assert bootstrap(auroc, *pair, draws=50).low == 1  # what must not be told
    found = auroc_interval(*pair, draws=50)
    # At the end A the distance 1 - A is 1.96 of Hanley and McNeil's standard errors at A.
    area, (p, n) = found.low, (15, 170)
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (p - 1) * (first - area**2) + (n - 1) * (second - area**2)) / (p * n)
    assert (found.value, found.high) == (1, 1)
    assert 1 - area == pytest.approx(norm.ppf(0.975) * np.sqrt(variance), rel=1e-9)
    assert 0.85 < area < 0.95
    for other in (pair[::-1], (-pair[0], -pair[1])):  # the other kind, or the other direction
        mirrored = auroc_interval(*other, draws=50)
        assert (mirrored.low, mirrored.high) == pytest.approx((0, 1 - area))
    more = auroc_interval(np.arange(150.0) + 2000, np.arange(1700.0), draws=5)
    assert area < more.low < 1


@pytest.mark.parametrize(("hits", "low", "high"), [(15, 0.025 ** (1 / 15), 1), (0, 0, 1 - 0.025 ** (1 / 15))])
def test_interval_of_a_true_positive_rate_is_the_binomial_one_at_its_ends(hits, low, high):
    positives = np.where(np.arange(15) < hits, 1000.0, -1000.0)
    found = tpr_interval(positives, np.arange(170.0), draws=50)
    assert (found.value, found.low, found.high) == pytest.approx((hits / 15, low, high), abs=1e-12)


@pytest.mark.parametrize("ridge", [0.3, 3.0])
def test_logistic_regression_is_scikit_learns(ridge):
    rng = np.random.default_rng(0)
    positives, negatives = rng.normal(0.5, 1, (20, 3)), rng.normal(0, 1, (90, 3))
    model = LogisticRegression(C=1 / ridge, class_weight="balanced", tol=1e-10, max_iter=10000)
    model.fit(np.r_[positives, negatives], np.r_[np.ones(20), np.zeros(90)])
    intercept, weights = fit_logistic(positives, negatives, ridge)
    np.testing.assert_allclose(weights, model.coef_[0], atol=2e-5)
    assert intercept == pytest.approx(model.intercept_[0], abs=2e-5)


NAMES = [n for n, s in SCORES.items() if not s.positive and s.higher_is_memorised] + [n for n, s in SCORES.items() if s.positive]


def table(prompts=60, seeds=4, shift=0.0, recited=20, names=NAMES, seed=0):
    """Random scores in which the first prompts are shifted towards memorised."""
    rng = np.random.default_rng(seed)
    made = {}
    for name in names:
        values = rng.normal(0, 1, (prompts, 1)) + 0.3 * rng.normal(0, 1, (prompts, seeds))
        values[:recited] += shift
        values = values if SCORES[name].higher_is_memorised else -values
        made[name] = np.exp(values) if SCORES[name].positive else values
    return made


def test_labels_do_not_leak_into_a_prompts_own_score():
    """On pure noise the combined score separates nothing; fitted and judged on the same prompts it would seem to."""
    labels = [i < 20 for i in range(60)]
    honest, seen = [], []
    for seed in range(8):
        scores = table(seed=seed)
        honest.append(rank_prompts(scores, labels, draws=2).combined_quality.auroc.value)
        units = np.stack([np.log(v).mean(1) if SCORES[n].positive else v.mean(1) for n, v in scores.items()], axis=1)
        units = (units - units.mean(0)) / units.std(0)
        intercept, weights = fit_logistic(units[:20], units[20:])
        seen.append(auroc(*np.split(units @ weights + intercept, [20])))
    assert abs(np.mean(honest) - 0.5) < 0.1
    assert np.mean(seen) > 0.7
    assert FOLDS > 1


def test_scores_that_know_are_weighted_and_turned_the_right_way():
    names = ["anisotropy", "guidance_norm", "commitment"]
    ranking = rank_prompts(table(shift=6.0, names=names), [i < 20 for i in range(60)])
    assert ranking.fitted_on == "labels"
    assert all(weight > 0 for weight in ranking.weights.values())
    assert ranking.combined_quality.auroc.value == 1
    assert ranking.combined_quality.tpr_at_1_fpr.value == 1
    assert {i for i, p in enumerate(ranking.prompts) if p.flagged} == set(range(20))
    assert all(correlation > 0.5 for correlation in ranking.correlation.values())
    assert "40 known not to be" in ranking.certainty
    assert "cannot be told from 0" in ranking.certainty


def test_an_unlabelled_audit_flags_what_is_unlike_the_bulk():
    names = ["anisotropy", "guidance_norm", "commitment"]
    ranking = rank_prompts(table(prompts=200, recited=4, shift=8.0, names=names))
    assert (ranking.fitted_on, ranking.threshold, ranking.combined_quality) == ("robust z", OUTLYING, None)
    assert {i for i, p in enumerate(ranking.prompts) if p.flagged} == set(range(4))
    assert "4 of 200 prompts" in ranking.certainty
    values = np.array([p.combined.value for p in ranking.prompts])
    assert np.median(values) == pytest.approx(0, abs=1e-9)
    calm = rank_prompts(table(prompts=200, recited=0, names=names, seed=1))
    assert not any(p.flagged for p in calm.prompts)


@pytest.mark.parametrize("prompts", [3, 4, 10])
def test_false_alarms_of_few_prompts_are_rare(prompts):
    """Of four prompts one lies beyond four units in every 23rd audit; the threshold knows how many there are."""
    rng = np.random.default_rng(1)
    audits = [rank_prompts({"guidance_norm": np.exp(rng.standard_normal((prompts, 1)))}, draws=2) for _ in range(1000)]
    assert audits[0].threshold == outlying(prompts)[0] > OUTLYING
    alarms = sum(any(p.flagged for p in audit.prompts) for audit in audits)
    assert alarms <= 10 + 4 * 10**0.5
    beyond = sum(any(p.combined.value > OUTLYING for p in audit.prompts) for audit in audits)
    assert beyond > alarms
    assert outlying(370)[0] == OUTLYING


def test_few_labels_are_not_fitted():
    labels = [True] * 4 + [False] * 10 + [None] * 46
    ranking = rank_prompts(table(), labels, draws=5)
    assert ranking.fitted_on == "robust z"
    assert set(ranking.quality) == set(NAMES)  # but judged
    assert rank_prompts(table(), [True, *[False] * 59], draws=5).quality == {}


def test_rank_intervals_hold_the_rank_of_many_seeds():
    """Ranks by four seeds, against the ranks that a thousand seeds of the same prompts have."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, 40)
    expected = np.argsort(np.argsort(-truth)) + 1
    held = []
    for _ in range(20):
        ranking = rank_prompts({"anisotropy": truth[:, None] + 0.4 * rng.normal(0, 1, (40, 8))}, draws=300)
        held += [low <= r <= high for (low, high), r in zip([p.rank_interval for p in ranking.prompts], expected, strict=True)]
        errors = [p.combined.sem for p in ranking.prompts]
    assert 0.8 < np.mean(held) <= 1
    spread = 1.4826 * np.median(np.abs(truth - np.median(truth)))
    assert np.mean(errors) == pytest.approx(0.4 / np.sqrt(8) / spread, rel=0.25)


def test_failed_units_and_failed_prompts():
    scores = {
        "anisotropy": np.arange(8.0)[:, None] + np.zeros((8, 3)),
        "guidance_norm": np.exp(np.arange(8.0))[:, None] * np.ones((8, 3)),
    }
    for values in scores.values():
        values[2, 1], values[5] = np.nan, np.nan
    ranking = rank_prompts(scores)
    assert ranking.prompts[5] is None
    assert [p.rank for p in ranking.prompts if p] == [7, 6, 5, 4, 3, 2, 1]
    assert ranking.prompts[2].combined.sem == pytest.approx(0, abs=1e-12)
    partial = dict(scores, contraction=np.where(np.isin(np.arange(8), (3, 5))[:, None], np.nan, 1.0))
    assert "contraction" not in rank_prompts(partial).weights


@pytest.mark.parametrize("seeds", [2, 4])
def test_errors_of_few_seeds_are_those_of_their_mean(seeds):
    """A resample of n values varies (n - 1) / n as much as their mean does; told errors do not shrink with it."""
    rng, errors, values = np.random.default_rng(1), [], []
    for _ in range(12):
        anisotropy = np.linspace(-1, 1, 60)[:, None] + 0.3 * rng.normal(0, 1, (60, seeds))
        ranking = rank_prompts({"anisotropy": anisotropy}, draws=100)
        scale = 1.4826 * np.median(np.abs(anisotropy.mean(1) - np.median(anisotropy.mean(1))))
        errors.append(np.mean([(p.combined.sem * scale) ** 2 for p in ranking.prompts]))
        values.append(anisotropy.var(axis=1, ddof=1).mean() / seeds)
    assert np.mean(errors) == pytest.approx(np.mean(values), rel=0.15)  # softening takes 7 %


def test_a_prompt_with_one_seed_left_has_no_interval():
    values = np.arange(6.0)[:, None] + np.random.default_rng(0).normal(0, 0.3, (6, 3))
    values[2, 1:] = np.nan
    prompts = rank_prompts({"anisotropy": values}, draws=50).prompts
    assert [p.rank_interval is None for p in prompts] == [i == 2 for i in range(6)]
    assert [p.combined.sem is None for p in prompts] == [i == 2 for i in range(6)]


def test_one_seed_has_no_interval():
    ranking = rank_prompts({"anisotropy": np.arange(6.0)})
    assert ranking.prompts[0].rank_interval is None
    assert ranking.prompts[0].combined.sem is None
    assert "One seed a prompt" in ranking.certainty


def test_refusals():
    with pytest.raises(ValueError, match="scores have 'karma'"):
        rank_prompts({"karma": np.zeros((5, 2))})
    with pytest.raises(ValueError, match="at least 3"):
        rank_prompts({"anisotropy": np.zeros((2, 2))})
    with pytest.raises(ValueError, match="one number"):
        rank_prompts({"anisotropy": np.zeros((5, 2))}, [True] * 4)
    with pytest.raises(ValueError, match="finite or NaN"):
        rank_prompts({"anisotropy": np.full((5, 2), np.inf)})
    with pytest.raises(ValueError, match="n >= 1, all finite"):
        auroc(np.array([]), np.ones(3))
    with pytest.raises(ValueError, match="rate=1"):
        threshold_at_fpr(np.ones(3), 1)
