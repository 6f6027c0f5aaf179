"""The statistics of a report: crossings of known curves, and errors as large as the deviations."""

import math

import numpy as np
import pytest
import torch
from tiny import randn

from diffusers_geometry.theory import clone_agreement
from diffusers_geometry.theory.transitions import clone_snr
from diffusers_geometry.transition_report import ClassPair, covariance_spectrum, crossing, share, speciation_sigma

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


def test_top_eigenvalues_have_errors():
    scales = torch.tensor([3.0, 1.0, 0.5])
    found = [covariance_spectrum(randn(200, 3, seed=s) * scales)[1] for s in range(40)]
    z = [(e.value - 9) / e.sem for e in found]
    assert 0.7 < math.sqrt(np.mean(np.square(z))) < 1.4
    np.testing.assert_allclose(covariance_spectrum(torch.tensor([[1.0, 0], [-1, 0]]))[0], [2, 0], atol=1e-12)
