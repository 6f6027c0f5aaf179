"""A run beside the closed form: what agrees has small residuals, what does not has large ones."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from load import load_zoo
from test_vector import make_pipeline

from diffusers_geometry.comparison import compare
from diffusers_geometry.exact import LinearManifoldDenoiser
from diffusers_geometry.selfcheck import exact_network
from diffusers_geometry.theory import LinearManifold


def exact_trace(dim=120, variances=(1.0, 0.1), **options):
    """A generation of an exact network of F z with m = 0.4 d, half of the columns of each variance."""
    number = round(0.4 * dim)
    scale = torch.tensor(variances, dtype=torch.double).repeat_interleave(number // 2).sqrt() / math.sqrt(number)
    basis = torch.randn(dim, number, generator=torch.Generator().manual_seed(0), dtype=torch.double) * scale
    pipe = make_pipeline(dim)
    pipe.network = exact_network(LinearManifoldDenoiser(basis), pipe.scheduler, like=pipe.network)
    options = {"num_inference_steps": 24, "record_steps": 12, "progress": False} | options
    return pipe.analyze_geometry(2, torch.Generator().manual_seed(0), **options)


@pytest.fixture(scope="module")
def trace():
    return exact_trace()


def test_an_exact_denoiser_has_the_predicted_spectrum(trace):
    """One draw of F at d = 120: every eigenvalue is where the law has it, but for its fluctuation of a few per cent."""
    found = trace.compare(LinearManifold(0.4, (1.0, 0.1)))
    assert found.gap_positions == (24, 48)
    assert found.measured.shape == (12, 2, 120)
    assert np.sqrt((found.residuals**2).mean()) < 0.015
    assert np.abs(found.residuals).max() < 0.12
    np.testing.assert_allclose(found.measured.sum(2), found.predicted.sum(1)[:, None] * np.ones(2), atol=1.2)
    np.testing.assert_allclose(found.measured_gaps[:, 0], found.predicted_gaps, atol=0.12)
    assert (found.measured_phases[:, 0] == found.predicted_phases).mean() > 0.8


def test_residuals_are_measured_minus_predicted(trace):
    """A theory of three times the variance expects more of every direction: all residuals that are not nil are negative."""
    found = trace.compare(LinearManifold(0.4, (3.0, 0.3)))
    np.testing.assert_array_equal(found.residuals, found.measured - found.predicted[:, None])
    assert found.residuals[..., :48].max() < 0.05
    assert found.residuals[..., :48].mean() < -0.05
    assert found.residuals.sum() < 0
    row = found.rows()[0]
    assert row["sum_measured"] - row["sum_predicted"] == pytest.approx(found.residuals[0, 0].sum())


def test_phases_are_predicted_at_the_resolution_of_the_trace(trace):
    theory = LinearManifold(0.4, (1.0, 0.1))
    coarse = replace(trace, settings=trace.settings | {"phase_resolution": 0.3})
    consolidation, trivial = theory.phase_times(0.3)
    times = trace.sigmas**2
    expected = np.where(times >= trivial, "trivial", np.where(times <= consolidation, "consolidation", "coverage"))
    found = coarse.compare(theory)
    np.testing.assert_array_equal(found.predicted_phases, expected)
    assert (found.predicted_phases != trace.compare(theory).predicted_phases).any()
    np.testing.assert_array_equal(found.measured_phases, np.asarray(coarse.phases.labels))


def test_a_wrong_theory_does_not_agree(trace):
    right, wrong = (trace.compare(LinearManifold(0.4, v)) for v in ((1.0, 0.1), (1.0, 1.0)))
    assert np.sqrt((wrong.residuals**2).mean()) > 5 * np.sqrt((right.residuals**2).mean())
    assert trace.compare(LinearManifold(0.2, (1.0, 0.1))).gap_positions == (12, 24)


@pytest.mark.parametrize("dim", [13, 61])
def test_odd_dimensions_and_bulks_too_small_to_hold_an_eigenvalue(dim):
    found = exact_trace(10 * (dim // 10), record_steps=[12]).compare(LinearManifold(0.4, (1.0, 0.1)))
    theory = LinearManifold(0.3, (10, 0.1), (0.02, 0.98))
    few = exact_trace(60, record_steps=[12]).compare(theory)
    assert theory.bulk_counts(60) == [18, 0]
    assert few.gap_positions == (18,)
    for comparison in (found, few):
        for j, position in enumerate(comparison.gap_positions):
            drop = comparison.predicted[:, position - 1] - comparison.predicted[:, position]
            assert (drop >= comparison.predicted_gaps[:, j] - 1e-9).all()  # quantiles lie inside the edges


def test_table_and_figure(trace, tmp_path):
    found = trace.compare(LinearManifold(0.4, (1.0, 0.1)))
    lines = found.table().splitlines()
    assert len(lines) == 1 + 24
    assert "gap 24" in lines[0]
    assert "gap 48" in lines[0]
    row = found.rows()[5]
    assert row["sum_measured"] == pytest.approx(trace.steps[2].effective_dimension.value[1], abs=1e-3)
    assert row["residual_max"] >= row["residual_rms"] > 0
    found.plot(tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"sample=2. Expected 0 <= sample < 2"):
        found.plot(sample=2)


def test_only_the_largest_values_are_compared_where_no_others_are_in_hand():
    found = exact_trace(spectrum="golub_kahan", num_singular_values=30, record_steps=[12]).compare(LinearManifold(0.4, (1.0, 0.1)))
    assert found.measured.shape == (1, 2, 30)
    assert np.isfinite(found.measured_gaps[..., 0]).all()
    assert np.isnan(found.measured_gaps[..., 1]).all()


def test_the_trained_network_is_near_the_law():
    pipe = load_zoo("linear-manifold-two-variances")
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 20, "record_steps": "all", "progress": False}
    found = pipe.analyze_geometry(1, torch.Generator().manual_seed(0), **options).compare(LinearManifold(0.4, (1.0, 0.1)))
    assert np.sqrt((found.residuals**2).mean()) < 0.03


def test_eigenvalues_are_the_quantiles_of_the_law():
    manifold = LinearManifold(0.4, (1.0, 0.1))
    values = manifold.eigenvalues(1000)
    assert (values[400:] == 0).all()
    assert (np.diff(values) <= 0).all()
    (lowest, low), (high, top) = manifold.bulk_edges()
    assert lowest < values[399] < values[200] < low < high < values[199] < values[0] < top
    for t in (0.05, 1.0, 10.0):
        assert (values / (values + t)).mean() == pytest.approx(manifold.effective_dimension(t), rel=1e-4)


def test_what_cannot_be_compared_is_refused(trace):
    with pytest.raises(TypeError, match=r"theory is a float. Expected a diffusers_geometry.theory.LinearManifold"):
        compare(trace, 0.4)
    restricted = exact_trace(spectrum="central_difference", max_products=20, record_steps=[12])
    with pytest.raises(ValueError, match=r"along random directions only. Expected spectrum='dense'"):
        restricted.compare(LinearManifold(0.4))
