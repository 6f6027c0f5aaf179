"""The statistics of a report: crossings of known curves, and errors as large as the deviations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from behind import seeded
from tiny import randn

from diffusers_geometry import Estimate, TransitionReport
from diffusers_geometry.speciation import (
    ClassPair,
    covariance_eigenvalues,
    crossing,
    share,
    speciation_sigma,
    square_root,
    top_eigenvalue,
)
from diffusers_geometry.theory import clone_agreement
from diffusers_geometry.theory.transitions import clone_snr

MEAN_SQUARED, WITHIN = 16.0, 1.0


def agreement(sigma):
    return float(clone_agreement(MEAN_SQUARED / (WITHIN + sigma**2)))


def test_shares_have_errors_that_cover():
    rng = np.random.default_rng(0)
    for truth in (0.02, 0.3, 0.9):
        z = [((e := share(rng.random(60) < truth)).value - truth) / e.sem for _ in range(400)]
        assert 0.75 < math.sqrt(np.mean(np.square(z))) < 1.1
    assert share(np.ones(50)).sem == pytest.approx(1 / 52)


def test_crossings_of_the_closed_form():
    sigmas = np.geomspace(0.5, 30, 9)[::-1]
    values = np.array([agreement(s) for s in sigmas])
    for level in (0.6, 0.8, 0.9):
        assert crossing(sigmas, values, level) == pytest.approx(math.sqrt(MEAN_SQUARED / clone_snr(level) - WITHIN), rel=0.02)
    assert crossing([math.inf, *sigmas], np.array([0.5, *values]), 0.8) == crossing(sigmas, values, 0.8)
    assert crossing(sigmas, values, 0.4) is None
    assert crossing(sigmas, np.ones(9), 0.8) is None


def test_the_error_of_speciation_covers():
    """40 experiments of 100 parents: deviations from the truth are as large as the bootstrap says."""
    sigmas, rng = np.geomspace(0.5, 30, 9), np.random.default_rng(0)
    chances = np.array([agreement(s) for s in sigmas])
    truth = crossing(sigmas, chances, 0.8)
    found = [speciation_sigma(sigmas, rng.random((100, 9)) < chances, 0.8, num_resamples=100) for _ in range(40)]
    z = [(f.value - truth) / f.sem for f in found]
    assert 0.7 < math.sqrt(np.mean(np.square(z))) < 1.35


def test_pairs_of_classes_in_many_dimensions():
    """Means of few samples in 200 dimensions lie too far apart; the excess is taken off, and errors cover what is left."""
    truth, z = math.sqrt(MEAN_SQUARED / clone_snr(0.8) - WITHIN), []
    for seed in range(40):
        x = randn(80, 200, seed=seed).double()
        x[:, 0] += torch.tensor([4.0, -4.0]).repeat(40)
        pair = ClassPair.between((0, 1), x[::2], x[1::2], 0.8, True)
        z.append((pair.sigma.value - truth) / pair.sigma.sem)
    assert abs(np.mean(z)) < 3 / math.sqrt(40) + 0.5
    assert math.sqrt(np.mean(np.square(z))) < 1.5
    near = ClassPair.between((0, 1), *randn(80, 5).split(40), 0.8, True)
    assert near.sigma is None


@pytest.mark.parametrize("others", [2, 30])
def test_top_eigenvalues_have_errors(others):
    scales = torch.cat([torch.tensor([3.0]), torch.full((others,), 0.7)])
    found = [top_eigenvalue(randn(200, 1 + others, seed=s) * scales, seeded(s)) for s in range(40)]
    z = [(e.value - 9) / e.sem for e in found]
    assert 0.7 < math.sqrt(np.mean(np.square(z))) < 1.4
    np.testing.assert_allclose(covariance_eigenvalues(torch.tensor([[1.0, 0], [-1, 0]])), [2, 0], atol=1e-12)


def test_top_eigenvalues_of_few_samples_in_many_dimensions():
    """Without a spike the samples' own top eigenvalue is about 24 instead of 1; with one it lies between both bounds."""
    flat = [top_eigenvalue(randn(64, 1024, seed=s), seeded(s)) for s in range(30)]
    z = [(e.value - 1) / e.sem for e in flat]
    assert 0.7 < math.sqrt(np.mean(np.square(z))) < 1.4
    assert abs(np.mean(z)) < 3 / math.sqrt(30)
    assert np.mean([e.value - e.bias for e in flat]) > 20
    scales = torch.ones(1024)
    scales[0] = 20.0
    spiked = [top_eigenvalue(randn(64, 1024, seed=s) * scales, seeded(s)) for s in range(30)]
    low, high = np.mean([e.value for e in spiked]), np.mean([e.value - e.bias for e in spiked])
    assert 0.85 * 400 < low < 400 + 3 * np.std([e.value for e in spiked]) / math.sqrt(30)
    assert low < high < 1.25 * 400
    assert top_eigenvalue(randn(3, 5)) is None
    assert square_root(None) is None
    assert square_root(Estimate(0.0, sem=0.0)).sem is None
    root = square_root(Estimate(9.0, sem=0.6, bias=-7.0))
    assert (root.value, root.sem, root.bias) == (3.0, pytest.approx(0.1), -1.0)


def test_what_was_not_found_comes_back_from_a_file(tmp_path):
    """No crossing within the run's noise, no agreement at the level, too few samples for Lambda: said, saved and loaded."""
    report = TransitionReport(
        positions=(1, 2), sigmas=(math.inf, 1.0), gesture="u_turn", stochastic=False, agreements=np.ones((4, 2)), level=0.8,
        speciation=None, top_eigenvalue_sigma=None, pairs=[], collapse={"weight": Estimate(0.5, sem=0.1), "held_out": None},
        settings={"samples_for_predictions": 3},
    )  # fmt: skip
    found = dict(report.findings())
    assert found["collapse, errors on unseen data (upper estimate)"] == "not within the run's noise"
    assert found["speciation, square root of the top covariance eigenvalue on halves of 3 samples"].startswith("not found")
    report.save(tmp_path / "report.json")
    loaded = TransitionReport.load(tmp_path / "report.json")
    assert loaded.to_dict() == report.to_dict()
    assert loaded.collapse == report.collapse
    assert loaded.table() == report.table()
    loaded.plot(tmp_path / "report.png")
    loose = replace(report, top_eigenvalue_sigma=Estimate(1.0, sem=0.1, bias=-4.0), settings={})
    assert "1 ± 0.1 (up to 5, in the samples themselves)" in loose.table()
