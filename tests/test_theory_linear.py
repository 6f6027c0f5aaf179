"""The closed forms of a linear manifold, against printed samples, each other for random parameters, and matrices."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from diffusers_geometry.exact import LinearManifoldDenoiser
from diffusers_geometry.theory import LinearManifold

RNG = np.random.default_rng(0)
RANDOM = (
    [
        (ratio, tuple(np.exp(RNG.uniform(-4, 2, count))), tuple(RNG.dirichlet(np.full(count, 2.0))))
        for ratio in (0.03, 0.3, 0.8, 1.5, 4.0)
        for count in (1, 2, 3, 4)
    ]
    + [  # many and close variances, and some very far apart
        (0.4, tuple(np.linspace(low, high, count)), (1 / count,) * count)
        for low, high, count in ((1, 1.1, 25), (1, 1.5, 30), (0.5, 2, 20))
    ]
    + [(0.4, tuple(np.logspace(-3, 3, 9)), (1 / 9,) * 9), (0.999, (1.0, 1e-3), (0.5, 0.5)), (0.5, (1.0, 1e6), (1 - 1e-6, 1e-6))]
)


def area(manifold, fn=lambda values: 1.0):
    """Integral of fn times the density, by a substitution that takes the square roots off the edges."""
    total = 0.0
    for low, high in manifold.bulk_edges():
        middle, half = (low + high) / 2, (high - low) / 2

        def integrand(angle, middle=middle, half=half):
            value = middle - half * math.cos(angle)
            return fn(value) * manifold.density(value) * half * math.sin(angle)

        total += quad(integrand, 0, math.pi, epsabs=1e-12, epsrel=1e-11, limit=400)[0]
    return total


def marchenko_pastur(eigenvalue, ratio, variance):
    low, high = variance * (1 - ratio**-0.5) ** 2, variance * (1 + ratio**-0.5) ** 2
    return ratio * math.sqrt((high - eigenvalue) * (eigenvalue - low)) / (2 * math.pi * variance * eigenvalue)


def test_printed_samples_of_one_variance():
    fifth, half = LinearManifold(0.2), LinearManifold(0.5)
    np.testing.assert_allclose(fifth.bulk_edges(), [(1.527864, 10.472136)], atol=1e-6)
    np.testing.assert_allclose(half.bulk_edges(), [(0.171573, 5.828427)], atol=1e-6)
    assert (fifth.atom, half.atom) == (0.8, 0.5)
    t = np.array([0.01, 0.1, 1, 10])
    np.testing.assert_allclose(fifth.final_gap(t), [0.993497, 0.938570, 0.604409, 0.132537], atol=1e-6)
    np.testing.assert_allclose(fifth.effective_dimension(t), [0.199502, 0.195151, 0.161484, 0.063771], atol=1e-6)
    low, high = fifth.bulk_edges()[0]
    np.testing.assert_allclose(fifth.score_edges(t)[0, 0], [-0.650253, -0.614302, -0.395591, -0.086746], atol=1e-6)
    np.testing.assert_allclose(fifth.score_edges(t)[0, 1], [-0.095400, -0.094588, -0.087168, -0.048847], atol=1e-6)
    np.testing.assert_allclose(high / (high + t) - low / (low + t), [0.005549, 0.051971, 0.308423, 0.378995], atol=1e-6)
    np.testing.assert_allclose(fifth.phase_times(), [0.169763, 94.249224], atol=1e-6)
    np.testing.assert_allclose(half.phase_times(), [0.019064, 52.455844], atol=1e-6)
    assert fifth.final_gap_opening() == pytest.approx(13.750776, abs=1e-6)
    assert half.final_gap_opening() == pytest.approx(1.544156, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "fractions", "variances", "bulks", "peaks", "heights", "windows"),
    [
        (0.4, (0.5, 0.5), (1, 0.1), [(0.048702, 0.436517), (0.825002, 5.289779)], [0.600106], [0.157810], [(0.145330, 2.478001)]),
        (0.2, (0.5, 0.5), (1, 0.09), [(0.178092, 0.711782), (2.389545, 8.710580)], [1.304161], [0.293847], [(0.125516, 13.550789)]),
        (0.1, (0.2, 0.3, 0.5), (9, 1, 0.05), [(0.281559, 0.716652), (6.680683, 13.520092), (66.713915, 117.613319)],
         [2.188087, 30.032953], [0.506564, 0.379144], [(0.091805, 52.151171), (2.005740, 449.698480)]),
        (0.95, (0.5, 0.5), (1, 0.1), [(0.000120651, 3.056730)], [], [], []),
    ],
)  # fmt: skip
def test_printed_samples_of_several_variances(ratio, fractions, variances, bulks, peaks, heights, windows):
    manifold = LinearManifold(ratio, variances, fractions)
    np.testing.assert_allclose(manifold.bulk_edges(), bulks, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(manifold.gap_peak_times(), peaks, atol=1e-6)
    np.testing.assert_allclose(manifold.gap_peaks(), heights, atol=1e-6)
    np.testing.assert_allclose(np.reshape(manifold.gap_window(), (-1, 2)), np.reshape(windows, (-1, 2)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("variances", "fraction", "printed"), [((1, 0.1), 0.5, 0.902216), ((1, 0.09), 0.5, 0.956463)])
def test_critical_ratio(variances, fraction, printed):
    """The general minimum is the closed form of two variances, and brackets the split and the merging of the bulks."""
    (found,) = LinearManifold(0.5, variances, (fraction, 1 - fraction)).critical_dim_ratios()
    (a, b), f = variances, fraction
    assert found == pytest.approx((a - b) ** 2 / ((f * a**2) ** (1 / 3) + ((1 - f) * b**2) ** (1 / 3)) ** 3, rel=1e-12)
    assert found == pytest.approx(printed, abs=1e-6)
    assert [len(LinearManifold(found * s, variances, (f, 1 - f)).bulk_edges()) for s in (0.999, 1.001)] == [2, 1]


@pytest.mark.parametrize(("ratio", "variances", "fractions"), RANDOM)
def test_densities_integrate_to_one(ratio, variances, fractions):
    manifold = LinearManifold(ratio, variances, fractions)
    assert manifold.atom + area(manifold) == pytest.approx(1, abs=1e-8)
    mean = np.dot(variances, fractions)  # tr F F^T / d
    assert area(manifold, lambda value: value) == pytest.approx(mean, rel=1e-8)
    t = math.sqrt(manifold.bulk_edges()[0][0] * manifold.bulk_edges()[-1][1]) + 0.1
    assert area(manifold, lambda value: value / (value + t)) == pytest.approx(manifold.effective_dimension(t), rel=1e-8)


@pytest.mark.parametrize(("ratio", "variances", "fractions"), RANDOM)
def test_edges_solve_phi(ratio, variances, fractions):
    """phi crosses zero at every edge: relative to its two terms it is nil there, and has another sign on each side."""
    manifold = LinearManifold(ratio, variances, fractions)
    for edge in manifold._law.edges:
        assert abs(manifold._law.phi(edge.h)) * ratio < 1e-9
        assert manifold._law.phi(edge.h * (1 + 1e-6)) * manifold._law.phi(edge.h * (1 - 1e-6)) < 0
    assert all(low < high for low, high in manifold.bulk_edges())
    assert sorted(np.ravel(manifold.bulk_edges())) == np.ravel(manifold.bulk_edges()).tolist()


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.9])
def test_masses_of_separate_bulks(ratio):
    """Every bulk of well separated variances holds alpha f_k; merged ones hold their sum."""
    variances, fractions = (1e4, 50, 0.1), (0.2, 0.3, 0.5)
    manifold = LinearManifold(ratio, variances, fractions)
    assert len(manifold.bulk_edges()) == 3
    np.testing.assert_allclose(manifold.bulk_masses(), [ratio * f for f in (0.5, 0.3, 0.2)], rtol=1e-12)
    for (low, high), mass in zip(manifold.bulk_edges(), manifold.bulk_masses(), strict=True):
        middle, half = (low + high) / 2, (high - low) / 2
        found = quad(lambda a, m=middle, h=half: manifold.density(m - h * math.cos(a)) * h * math.sin(a), 0, math.pi, epsabs=1e-12)[
            0
        ]
        assert found == pytest.approx(mass, rel=1e-7)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9, 1.5, 4.0])
def test_one_variance_is_marchenko_pastur(ratio):
    manifold, split = LinearManifold(ratio, (2.5,)), LinearManifold(ratio, (2.5, 2.5), (0.3, 0.7))
    low, high = manifold.bulk_edges()[0]
    np.testing.assert_allclose((low, high), [2.5 * (1 - ratio**-0.5) ** 2, 2.5 * (1 + ratio**-0.5) ** 2], rtol=1e-12)
    places = np.linspace(low, high, 23)[1:-1]
    expected = [marchenko_pastur(value, ratio, 2.5) for value in places]
    np.testing.assert_allclose(manifold.density(places), expected, rtol=1e-12)
    np.testing.assert_allclose(split.density(places), expected, rtol=1e-12)
    assert (manifold.density([low * 0.99, high * 1.01, -1.0]) == 0).all()


@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0, 3.0])
def test_effective_dimension_of_one_variance_is_the_root_of_a_quadratic(ratio):
    t = np.logspace(-3, 3, 13)
    a, b = 2.0 * t / ratio, t + 2.0 - 2.0 / ratio
    expected = 1 - t * (-b + np.sqrt(b**2 + 4 * a)) / (2 * a)
    np.testing.assert_allclose(LinearManifold(ratio, (2.0,)).effective_dimension(t), expected, rtol=1e-9)
    assert LinearManifold(ratio).effective_dimension(0.0) == min(ratio, 1)
    assert LinearManifold(ratio).effective_dimension(np.inf) == 0
    for far in (1e9, 1e15, 1e200):  # tr D' -> tr F F^T / t
        assert far * LinearManifold(ratio, (2.0,)).effective_dimension(far) == pytest.approx(2.0, rel=1e-6)
    assert LinearManifold(ratio).effective_dimension(t.reshape(1, 13)).shape == (1, 13)


def test_printed_times_of_the_phases():
    """theory.md A1.1: alpha = .2, f = .25, tau = (4, .25), resolution .1."""
    manifold = LinearManifold(0.2, (4, 0.25), (0.25, 0.75))
    consolidation, trivial = manifold.phase_times(0.1)
    assert trivial == pytest.approx(271.277, abs=1e-3)
    assert consolidation == pytest.approx(0.04776, abs=1e-5)
    assert manifold.final_gap_opening(0.1) == pytest.approx(3.868, abs=1e-3)
    ((close, opening),), (peak,) = manifold.gap_window(0.1), manifold.gap_peak_times()
    assert close == pytest.approx(0.3348, abs=1e-4)
    assert opening == pytest.approx(84.588, abs=1e-3)
    assert peak == pytest.approx(5.322, abs=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_masses_and_critical_ratios_of_random_variances(seed):
    """Where two random variances are apart, bulks hold alpha f_k by quadrature; alpha_c is the closed form and splits them."""
    rng = np.random.default_rng(seed)
    low, high = np.sort(np.exp(rng.uniform(-3, 3, 2)))
    f = rng.uniform(0.1, 0.9)  # share of the larger variance
    expected = (high - low) ** 2 / ((f * high**2) ** (1 / 3) + ((1 - f) * low**2) ** (1 / 3)) ** 3
    (critical,) = LinearManifold(0.5, (high, low), (f, 1 - f)).critical_dim_ratios()
    assert critical == pytest.approx(expected, rel=1e-10)
    ratio = critical * rng.uniform(0.1, 0.9)
    manifold = LinearManifold(ratio, (high, low), (f, 1 - f))
    assert len(manifold.bulk_edges()) == 2
    assert len(LinearManifold(1.001 * critical, (high, low), (f, 1 - f)).bulk_edges()) == 1
    np.testing.assert_allclose(manifold.bulk_masses(), [min(ratio, 1) - ratio * f, ratio * f], rtol=1e-12)
    for (a, b), mass in zip(manifold.bulk_edges(), manifold.bulk_masses(), strict=True):
        middle, half = (a + b) / 2, (b - a) / 2
        integrand = lambda s, m=middle, h=half: float(manifold.density(m - h * math.cos(s))) * h * math.sin(s)  # noqa: E731
        assert quad(integrand, 0, math.pi, epsabs=1e-12, limit=400)[0] == pytest.approx(mass, rel=1e-7)


def test_peaks_and_windows_are_those_of_the_gaps():
    manifold = LinearManifold(0.1, (9, 1, 0.05), (0.2, 0.3, 0.5))
    t = np.logspace(-2, 3, 20_001)
    gaps = manifold.intermediate_gaps(t)
    np.testing.assert_allclose(t[gaps.argmax(1)], manifold.gap_peak_times(), rtol=1e-3)
    np.testing.assert_allclose(gaps.max(1), manifold.gap_peaks(), rtol=1e-6)
    for gap, (close, opening) in zip(gaps, manifold.gap_window(0.2), strict=True):
        inside = t[gap >= 0.2]
        np.testing.assert_allclose([inside[0], inside[-1]], [close, opening], rtol=1e-3)
    assert manifold.gap_window(0.45)[1] is None
    assert manifold.final_gap(manifold.final_gap_opening(0.3)) == pytest.approx(0.3)
    consolidation, trivial = manifold.phase_times(0.1)
    assert manifold.bulk_edges()[0][0] / (manifold.bulk_edges()[0][0] + consolidation) == pytest.approx(0.9)
    assert manifold.bulk_edges()[-1][1] / (manifold.bulk_edges()[-1][1] + trivial) == pytest.approx(0.1)
    assert LinearManifold(0.3, (2.0,)).bulk_width_peak() == (pytest.approx(2 * (1 / 0.3 - 1)), pytest.approx(math.sqrt(0.3)))


def test_variances_that_differ_by_rounding_are_one_group():
    one, two = LinearManifold(0.4, (0.3,)), LinearManifold(0.4, (0.3, 0.1 + 0.2))
    assert one.bulk_edges() == two.bulk_edges()
    assert (LinearManifold(0.4, (1, 0.1)).intermediate_gaps([0.0, np.inf]) == 0).all()
    assert LinearManifold(0.4, (1, 0.1)).final_gap(np.inf) == 0


@pytest.mark.parametrize("dim", [13, 57, 100, 199])
def test_counts_of_the_bulks(dim):
    manifold = LinearManifold(0.4, (1, 0.1))
    counts, values = manifold.bulk_counts(dim), manifold.eigenvalues(dim)
    assert (values > 0).sum() == sum(counts) == round(0.4 * dim)
    assert (values > 0.6).sum() == counts[1]  # the bulks are apart around 0.6
    assert abs(counts[0] - 0.2 * dim) <= 1


@pytest.mark.parametrize("variances", [(1,), (1, 0.1)])
def test_edges_of_the_jacobians_hold_all_of_their_density(variances):
    """Printed samples are in the first test; here every bulk holds its mass, and one draw's exact J has its extremes there."""
    manifold, t = LinearManifold(0.2, variances), np.array([[0.1, 1.0]])
    score, denoised = manifold.score_edges(t), manifold.denoised_edges(t)
    assert score.shape == denoised.shape == (len(variances), 2, 1, 2)
    for j, time in enumerate(t[0]):
        for i, mass in enumerate(manifold.bulk_masses()):
            for density, edges in ((manifold.score_density, score), (manifold.denoised_density, denoised)):
                found = quad(lambda v, fn=density, u=time: float(fn(v, u)), *edges[i, :, 0, j], limit=400)[0]
                assert found == pytest.approx(mass, rel=1e-6)
    values = np.linalg.eigvalsh((draw := basis(600, 0.2, variances, [1 / len(variances)] * len(variances))).T @ draw)
    np.testing.assert_allclose([-1 / (values[0] + 1), -1 / (values[-1] + 1)], [score[0, 0, 0, 1], score[-1, 1, 0, 1]], rtol=0.1)
    with pytest.raises(ValueError, match=r"t=0.0. Expected t = sigma\^2 > 0"):
        manifold.score_edges(0.0)


def test_densities_of_the_jacobians_are_the_same_law():
    manifold, t = LinearManifold(0.4, (1, 0.1)), 0.3
    for low, high in manifold.bulk_edges():
        mass = quad(manifold.density, low, high, limit=200)[0]
        ends = [-1 / (value + t) for value in (low, high)]
        assert quad(lambda g: manifold.score_density(g, t), *ends, limit=200)[0] == pytest.approx(mass, rel=1e-6)
        ends = [value / (value + t) for value in (low, high)]
        assert quad(lambda u: manifold.denoised_density(u, t), *ends, limit=200)[0] == pytest.approx(mass, rel=1e-6)
    assert (manifold.score_density([0.0, 1.0], t) == 0).all()
    assert (manifold.denoised_density([-0.1, 0.0, 1.0, 1.1], t) == 0).all()


def test_the_norm_d_is_alpha_times_the_norm_m():
    by_m, by_d = (LinearManifold(0.3, (1, 0.05), norm=norm) for norm in ("m", "d"))
    np.testing.assert_allclose(by_d.edge_fluctuations(100), 0.3 * np.array(by_m.edge_fluctuations(100)), rtol=1e-12)
    np.testing.assert_allclose(by_d.eigenvalues(50), 0.3 * by_m.eigenvalues(50), rtol=1e-12)
    np.testing.assert_allclose(by_d.bulk_edges(), 0.3 * np.array(by_m.bulk_edges()), rtol=1e-12)
    assert by_d.effective_dimension(0.3 * 0.7) == pytest.approx(by_m.effective_dimension(0.7), rel=1e-12)
    assert by_d.density(0.3 * 2.0) == pytest.approx(by_m.density(2.0) / 0.3, rel=1e-12)
    assert LinearManifold(0.2, norm="d").bulk_edges()[0][1] == pytest.approx((1 + math.sqrt(0.2)) ** 2)


def basis(dim, ratio, variances, fractions, seed=0):
    number = round(ratio * dim)
    tau = np.repeat(variances, np.round(np.array(fractions) * number).astype(int))
    return np.random.default_rng(seed).normal(size=(dim, number)) * np.sqrt(tau / number)


@pytest.mark.parametrize(
    ("ratio", "variances", "fractions"), [(0.2, (1,), (1,)), (0.4, (1, 0.1), (0.5, 0.5)), (3.0, (1, 0.1), (0.5, 0.5))]
)
def test_a_matrix_has_the_law(ratio, variances, fractions):
    """Distribution and traces of one draw: eigenvalues are rigid, so that both are right to O(1/d)."""
    factor, manifold = basis(600, ratio, variances, fractions), LinearManifold(ratio, variances, fractions)
    values = np.sort(np.linalg.eigvalsh(factor @ factor.T))
    values = values[-min(600, factor.shape[1]) :]
    share = np.arange(1, len(values) + 1) / 600
    grid = np.linspace(0, values[-1] * 1.1, 4000)
    cumulative = np.concatenate([[0], np.cumsum(manifold.density((grid[1:] + grid[:-1]) / 2) * np.diff(grid))])
    assert np.abs(np.interp(values, grid, cumulative) - share).max() < 0.01
    for t in (0.05, 1.0, 20.0):
        assert (values / (values + t)).sum() / 600 == pytest.approx(manifold.effective_dimension(t), rel=0.01)


def test_tracy_widom():
    """Printed: mean and deviation at d = 200, m = 40; and the extreme eigenvalues of 200 draws of two variances."""
    low, high = LinearManifold(0.2).edge_fluctuations(200)[0]
    np.testing.assert_allclose([*low, *high], [1.633, 0.110, 10.095, 0.397], atol=6e-4)
    manifold = LinearManifold(0.4, (1, 0.1))
    draws = []
    for seed in range(200):
        factor = basis(200, 0.4, (1, 0.1), (0.5, 0.5), seed)
        values = np.linalg.eigvalsh(factor.T @ factor)
        draws.append([values[0], values[39], values[40], values[-1]])
    predicted = np.reshape([v for bulk in manifold.edge_fluctuations(200) for v in bulk], (4, 2))
    # Tracy and Widom's law is itself off by O(d^(-2/3)): a tenth of a deviation or two, and of the deviation.
    assert (np.abs(np.mean(draws, axis=0) - predicted[:, 0]) < 0.5 * predicted[:, 1]).all()
    np.testing.assert_allclose(np.std(draws, axis=0), predicted[:, 1], rtol=0.3)


def test_the_exact_denoiser_has_the_effective_dimension():
    factor, manifold = basis(300, 0.4, (1, 0.1), (0.5, 0.5)), LinearManifold(0.4, (1, 0.1))
    exact = LinearManifoldDenoiser(torch.from_numpy(factor))
    for t in (0.1, 1.0):
        matrix = exact.at(alpha_t=1.0, sigma_t=math.sqrt(t)).jacobian(torch.zeros(300, dtype=torch.float64)).dense()
        assert matrix.trace().item() / 300 == pytest.approx(manifold.effective_dimension(t), rel=0.015)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim_ratio": 0.0}, r"dim_ratio=0.0. Expected a finite number > 0"),
        ({"dim_ratio": 0.5, "variances": (1, -0.1)}, r"variances=\(1.0, -0.1\). Expected finite numbers > 0"),
        ({"dim_ratio": 0.5, "variances": ()}, r"variances=\(\). Expected finite"),
        (
            {"dim_ratio": 0.5, "variances": (1, 2), "fractions": (0.5, 0.6)},
            r"fractions=\(0.5, 0.6\). Expected 2 numbers > 1e-20 that sum to 1",
        ),
        ({"dim_ratio": 0.5, "variances": (1, 2), "fractions": (1.0,)}, r"Expected 2 numbers"),
        ({"dim_ratio": 0.4, "variances": 2.0}, r"variances=2.0. Expected a sequence of numbers, one for each group of columns"),
        ({"dim_ratio": 0.4, "fractions": 1.0}, r"fractions=1.0. Expected a sequence of numbers"),
        ({"dim_ratio": 0.5, "norm": "n"}, r"norm='n'. Expected 'm' or 'd'"),
    ],
)
def test_bad_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearManifold(**arguments)


def test_bad_questions_are_refused():
    manifold = LinearManifold(0.4, (1, 0.1))
    for ask in (manifold.effective_dimension, manifold.final_gap, manifold.intermediate_gaps):
        with pytest.raises(ValueError, match=r"t=-1. Expected t = sigma\^2 >= 0"):
            ask(-1)
    with pytest.raises(ValueError, match=r"Expected t = sigma\^2 > 0"):
        manifold.score_density([-1.0], 0.0)
    with pytest.raises(ValueError, match=r"resolution=0.6. Expected 0 < resolution < 0.5"):
        manifold.phase_times(0.6)
    with pytest.raises(ValueError, match=r"dim=1. Expected at least 2"):
        manifold.edge_fluctuations(1)
    with pytest.raises(ValueError, match=r"dim_ratio=1.5 leaves no normal space"):
        LinearManifold(1.5).final_gap(1.0)
    with pytest.raises(ValueError, match=r"dim_ratio=1 has its lowest edge at zero"):
        LinearManifold(1).edge_fluctuations(10)
    assert LinearManifold(1).bulk_edges()[0][0] == 0
