"""The phase rules on spectra with known boundaries."""

import numpy as np
import pytest

from diffusers_geometry.phases import phases_by_eigenvalues, phases_by_gaps, snapshot_kind

VARIANCES = np.array([4.0] * 4 + [0.25] * 4 + [0.0] * 8)


def run(sigmas, variances=VARIANCES):
    return [(variances / (variances + s**2))[None] if np.isfinite(s) else 0 * variances[None] for s in sigmas]


def gaps(values):
    return [v - np.concatenate([v[:, 1:], np.zeros((len(v), 1))], axis=1) for v in values]


@pytest.mark.parametrize(
    ("values", "kind"),
    [([0.09, 0.0], "flat"), ([0.95, 0.02], "binary"), ([0.95, 0.5], "graded"), ([0.1, 0.0], "graded"), ([1.7, 0.0], "binary")],
)
def test_kinds_of_snapshots(values, kind):
    assert snapshot_kind(np.array(values)) == kind


@pytest.mark.parametrize("resolution", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("infinite", [False, True])
def test_boundaries_bracket_the_closed_form(resolution, infinite):
    """theory.md A1.1: sigma^2 = l_max (1 - D)/D and l_min D/(1 - D)."""
    sigmas = np.geomspace(50, 0.005, 40)
    sigmas = np.concatenate([[np.inf], sigmas]) if infinite else sigmas
    found = phases_by_eigenvalues(sigmas, run(sigmas), resolution)
    upper, lower = found.trivial_boundary[0]
    assert lower**2 <= 4.0 * (1 - resolution) / resolution <= upper**2
    upper, lower = found.consolidation_boundary[0]
    assert lower**2 <= 0.25 * resolution / (1 - resolution) <= upper**2
    labels = found.labels[:, 0].tolist()
    assert labels == sorted(labels, key=["trivial", "coverage", "consolidation"].index)
    assert found[0][0] == "trivial"
    assert len(found) == len(sigmas)


def test_order_of_the_run_does_not_matter():
    sigmas = np.geomspace(50, 0.005, 12)
    forward = phases_by_eigenvalues(sigmas, run(sigmas))
    backward = phases_by_eigenvalues(sigmas[::-1], run(sigmas[::-1]))
    assert (forward.labels[::-1] == backward.labels).all()
    assert forward.trivial_boundary == backward.trivial_boundary


def test_a_sub_manifold_in_the_middle_is_not_consolidation():
    """Variances far apart: between them a snapshot is binary, but the run attached to the smallest sigma decides."""
    variances = np.array([1e6, 1e6, 1e-4, 1e-4, 0.0])
    sigmas = np.array([1e5, 1e3, 10.0, 1.0, 1e-2, 1e-4])
    values = run(sigmas, variances)
    assert snapshot_kind(values[2][0]) == "binary"
    found = phases_by_eigenvalues(sigmas, values)
    assert found.labels[:, 0].tolist() == ["trivial", *["coverage"] * 4, "consolidation"]


def test_no_boundary_where_a_phase_is_missing():
    sigmas = np.array([2.0, 1.0])
    found = phases_by_eigenvalues(sigmas, run(sigmas))
    assert found.labels.tolist() == [["coverage"], ["coverage"]]
    assert found.trivial_boundary == (None,)
    assert found.consolidation_boundary == (None,)


def test_gap_rule_follows_the_closed_form_of_the_gaps():
    """theory.md A2: final gap l_-/(l_- + t), intermediate gap t (g_a - g_b)/((g_a + t)(g_b + t)), resolution 0.1."""
    sigmas = np.geomspace(50, 0.005, 60)
    t = sigmas**2
    final, between = 0.25 / (0.25 + t), t * 3.75 / ((4 + t) * (0.25 + t))
    expected = np.where(between >= 0.1, "coverage", np.where(final >= 0.1, "consolidation", "trivial"))
    found = phases_by_gaps(sigmas, gaps(run(sigmas)))
    assert (found.labels[:, 0] == expected).all()


def test_batches_are_labelled_sample_by_sample():
    sigmas = np.array([50.0, 1.0, 0.005])
    values = [np.concatenate([a, b]) for a, b in zip(run(sigmas), run(sigmas, VARIANCES * 1e4), strict=True)]
    found = phases_by_eigenvalues(sigmas, values)
    assert found.labels[:, 0].tolist() == ["trivial", "coverage", "consolidation"]
    assert found.labels[:, 1].tolist() == ["coverage", "consolidation", "consolidation"]
    assert found.consolidation_boundary == ((1.0, 0.005), (50.0, 1.0))


@pytest.mark.parametrize("resolution", [0.0, 0.5, -1.0, float("nan")])
def test_senseless_resolution_is_refused(resolution):
    with pytest.raises(ValueError, match="Expected 0 < resolution < 0.5"):
        phases_by_eigenvalues(np.array([1.0]), run([1.0]), resolution)


def test_mismatched_runs_are_refused():
    with pytest.raises(ValueError, match="2 sigmas and 1 spectra"):
        phases_by_eigenvalues(np.array([1.0, 2.0]), run([1.0]))


@pytest.mark.parametrize(
    ("values", "options", "kind"),
    [
        ([0.99, 0.98], {"unseen": 0.98}, "unresolved"),
        ([0.99, 0.98, 0.02], {"unseen": 0.02}, "binary"),
        ([0.99, 0.5], {"unseen": 0.5}, "graded"),
        ([0.05, 0.01], {"unseen": 0.01}, "flat"),
        ([0.99, 0.01], {"unseen": np.inf}, "unresolved"),
        ([1.1, 0.8, 0.01], {}, "graded"),
        ([1.1, 0.8, 0.01], {"spread": 0.2}, "binary"),
    ],
)
def test_kinds_of_incomplete_and_sampled_snapshots(values, options, kind):
    assert snapshot_kind(np.array(values), **options) == kind


def test_unresolved_steps_bound_nothing():
    sigmas = np.array([10.0, 1.0, 0.1])
    values = [np.array([[0.05, 0.01]]), np.array([[0.99, 0.97]]), np.array([[0.99, 0.01]])]
    found = phases_by_eigenvalues(sigmas, values, unseen=[None, np.array([0.97]), None])
    assert found.labels[:, 0].tolist() == ["trivial", "unresolved", "consolidation"]
    assert found.trivial_boundary == (None,)
    assert found.consolidation_boundary == (None,)
    gaps = [np.array([[0.04, 0.01]]), np.array([[0.02, 0.0]]), np.array([[0.98, 0.01]])]
    assert phases_by_gaps(sigmas, gaps, unseen=[None, np.array([0.97]), None]).labels[1, 0] == "unresolved"
