"""Random estimates: right in the mean, with error bars that mean what they say, and exact when the budget allows."""

import functools
import math

import diffusers
import numpy as np
import pytest
import torch
from scipy import special
from tiny import SCALED_LINEAR

from diffusers_geometry import Denoiser, Jacobian, estimate_trace
from diffusers_geometry.descriptors import projected_local_scaling
from diffusers_geometry.dimension import flipd
from diffusers_geometry.exact import GaussianDenoiser, LinearManifoldDenoiser, SphereDenoiser
from diffusers_geometry.quadrature import Quadrature, lanczos_quadrature
from diffusers_geometry.schedule import noise_level
from diffusers_geometry.stochastic import _xtrace, estimate_frobenius_norm, rademacher

SEEDS = 200


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def orthogonal(size, count, seed):
    return torch.linalg.qr(torch.randn(size, count, generator=seeded(seed), dtype=torch.float64))[0]


def matrix_jacobian(matrix):
    return Jacobian(lambda x: matrix @ x, torch.zeros(matrix.shape[1], dtype=matrix.dtype))


@functools.cache
def denoiser_matrix(power, size=256, sigma=0.1):
    """D' of data with the covariance spectrum i^-power, in a random basis, and its trace."""
    variances = torch.arange(1, size + 1, dtype=torch.float64) ** -power
    values = variances / (variances + sigma**2)
    basis = orthogonal(size, size, 9)
    return (basis * values) @ basis.T, values


def deviations(estimate, truth, seeds=SEEDS):
    """(estimate - truth) / sem over seeds, without exact recoveries, and the root mean square error."""
    found = [estimate(seeded(seed)) for seed in range(seeds)]
    z = [(e.value - truth) / e.sem for e in found if e.sem > 1e-10 * abs(truth)]
    return np.array(z), math.sqrt(np.mean([(e.value - truth) ** 2 for e in found])), found


def rms(z):
    return math.sqrt(np.mean(np.square(z)))


# ---------------------------------------------------------------- traces


@pytest.mark.parametrize("symmetric", [True, False])
def test_xtrace_is_the_mean_of_its_leave_one_out_estimates(symmetric):
    """Against the definition: the trace on the range of the other images, and one probe for the rest."""
    matrix = torch.randn(20, 20, generator=seeded(0), dtype=torch.float64)
    matrix = matrix + matrix.T if symmetric else matrix
    probes = rademacher(6, torch.Size([20]), matrix, seeded(1)).T
    transposed, samples = matrix.T, []
    for i in range(6):
        q = torch.linalg.qr((transposed @ probes)[:, [j for j in range(6) if j != i]])[0]
        rest = (torch.eye(20).double() - q @ q.T) @ probes[:, i]
        samples.append((torch.trace(q.T @ transposed @ q) + rest @ transposed @ rest).item())
    found = _xtrace(matrix_jacobian(matrix), probes, transposed @ probes)
    assert found.value == pytest.approx(np.mean(samples), rel=1e-10)
    assert found.sem == pytest.approx(1.4 * math.sqrt(5 / 3) * np.std(samples, ddof=1) / math.sqrt(6), rel=1e-10)


@pytest.mark.parametrize("method", ["rademacher", "xtrace"])
@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("budget", [30, 60])
def test_error_bars_of_traces_are_calibrated(method, power, budget):
    matrix, values = denoiser_matrix(power)
    jacobian, truth = matrix_jacobian(matrix), values.sum().item()
    z, _, found = deviations(lambda g: estimate_trace(jacobian, num_products=budget, method=method, generator=g), truth)
    assert len(z) == SEEDS
    assert 0.8 < rms(z) < 1.25
    assert abs(np.mean(z)) < 0.3
    assert {e.products for e in found} == {budget}


def test_auto_takes_xtrace_where_the_budget_exceeds_the_dimension():
    """p = 2: 60 products exceed 3 x 14.7, so XTrace is taken and errs by less than 0.25; for p = 1 (126) Rademacher stays."""
    matrix, values = denoiser_matrix(2)
    z, error, _ = deviations(lambda g: estimate_trace(matrix_jacobian(matrix), num_products=60, generator=g), values.sum().item())
    assert error < 0.25
    assert 0.8 < rms(z) < 1.25
    flat, values = denoiser_matrix(1)
    same = [estimate_trace(matrix_jacobian(flat), num_products=60, method=m, generator=seeded(5)) for m in ("auto", "rademacher")]
    assert (same[0].value, same[0].sem) == pytest.approx((same[1].value, same[1].sem))


def test_xtrace_is_exact_beyond_the_rank():
    basis = orthogonal(100, 8, 2)
    found = estimate_trace(matrix_jacobian(basis @ basis.T), num_products=30, method="xtrace")
    assert found.value == pytest.approx(8, abs=1e-10)
    assert found.sem < 1e-10
    assert found.products < 30


@pytest.mark.parametrize("method", ["rademacher", "xtrace", "auto"])
def test_a_budget_that_reaches_the_dimension_is_exact(method):
    matrix = torch.randn(12, 12, generator=seeded(3), dtype=torch.float64)
    for budget in (12, 50):
        jacobian = matrix_jacobian(matrix)
        found = estimate_trace(jacobian, num_products=budget, method=method)
        assert (found.value, found.sem, found.bias) == (pytest.approx(matrix.trace().item()), 0, 0)
        assert found.products == jacobian.products == 12
        norm = estimate_frobenius_norm(matrix_jacobian(matrix), num_products=budget)
        assert (norm.value, norm.sem) == (pytest.approx(matrix.norm().item()), 0)


def test_senseless_traces_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 4\) has no trace"):
        estimate_trace(matrix_jacobian(torch.ones(3, 4)), num_products=2)
    with pytest.raises(ValueError, match="num_products=3"):
        estimate_trace(matrix_jacobian(torch.eye(9)), num_products=3, method="xtrace")
    with pytest.raises(ValueError, match="method='hutch'"):
        estimate_trace(matrix_jacobian(torch.eye(9)), num_products=3, method="hutch")
    with pytest.raises(ValueError, match="num_products=1"):
        estimate_frobenius_norm(matrix_jacobian(torch.eye(9)), num_products=1)


def test_error_bars_of_the_frobenius_norm_are_calibrated():
    matrix = denoiser_matrix(1)[0] @ torch.diag(torch.linspace(0.5, 2, 256)).double()
    z, _, _ = deviations(
        lambda g: estimate_frobenius_norm(matrix_jacobian(matrix), num_products=24, generator=g), matrix.norm().item()
    )
    assert 0.8 < rms(z) < 1.25


# ---------------------------------------------------------------- Lanczos quadrature


def log_volume(values, epsilon, size):
    values = torch.cat([values, values.new_zeros(size - len(values))])
    return (0.5 * (values.square() + epsilon**2).log()).sum().item()


def nu(values):
    shares = values[values > 0] / values.sum()
    return math.exp(-(shares * shares.log()).sum().item())


def quadratures(matrix, probes, steps, seeds=SEEDS):
    return [
        lanczos_quadrature(matrix_jacobian(matrix), num_probes=probes, num_steps=steps, generator=seeded(s)) for s in range(seeds)
    ]


@pytest.mark.parametrize("quantity", ["log_volume", "nu"])
def test_quadrature_without_bias_is_calibrated(quantity):
    """Singular values between 0.1 and 1, 12 steps: where the stated bias is below half a standard error, z is standard."""
    values = torch.linspace(0.1, 1, 300, dtype=torch.float64)
    matrix = orthogonal(300, 300, 5) * values @ orthogonal(300, 300, 6).T
    truth = log_volume(values, 0.01, 300) if quantity == "log_volume" else nu(values)
    found = [q.log_volume(0.01) if quantity == "log_volume" else q.local_rank() for q in quadratures(matrix, 12, 12)]
    z = [(e.value - truth) / e.sem for e in found if abs(e.bias) < e.sem / 2]
    assert len(z) > 50
    assert 0.8 < rms(z) < 1.25
    assert all(e.converged == (abs(e.bias) < e.sem / 2) for e in found)


def test_the_trap_of_too_few_steps_is_covered_by_the_bias():
    """theory.md C1: rank 100 of 300 and 20 steps; the standard error alone is many times too small."""
    left, right = (torch.randn(*shape, generator=seeded(s), dtype=torch.float64) for s, shape in ((4, (300, 100)), (3, (100, 300))))
    matrix = left @ right / 170
    truth = log_volume(torch.linalg.svdvals(matrix)[:100], 1e-3, 300)
    found = [q.log_volume(1e-3) for q in quadratures(matrix, 7, 20, seeds=60)]
    misses = [abs(e.value - truth) for e in found]
    assert np.mean([m <= abs(e.bias) + 4 * e.sem for m, e in zip(misses, found, strict=True)]) >= 0.95
    assert np.mean([e.value - truth for e in found]) > 30  # a bias it is: always the same way
    assert not any(e.converged for e in found)


def test_the_bias_sums_the_rest_of_a_geometric_sequence():
    """Value minus truth: 1 is left after changes of 2 and 1; at least the last change, at most three times it."""
    assert Quadrature._bias(11.0, 12.0, 14.0) == pytest.approx(1.0)
    assert Quadrature._bias(9.0, 8.0, 4.0) == pytest.approx(-1.0)  # never less than the change itself
    assert Quadrature._bias(11.0, 12.0, 13.5) == pytest.approx(2.0)
    assert Quadrature._bias(11.0, 12.0, 13.0) == pytest.approx(3.0)
    assert Quadrature._bias(5.0, 5.0, 9.0) == 0.0


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("quantity", ["log_volume", "nu"])
def test_coverage_where_the_bias_is_large(power, quantity):
    values = torch.arange(1, 301, dtype=torch.float64) ** -power
    matrix = orthogonal(300, 300, 5) * values @ orthogonal(300, 300, 6).T
    truth = log_volume(values, 0.1, 300) if quantity == "log_volume" else nu(values)
    found = [q.log_volume(0.1) if quantity == "log_volume" else q.local_rank() for q in quadratures(matrix, 16, 9, seeds=100)]
    assert np.mean([abs(e.value - truth) <= abs(e.bias) + 4 * e.sem for e in found]) >= 0.95


def test_a_logarithm_that_reaches_below_the_smallest_node_says_so():
    """A geometric spectrum down to 2e-7 at epsilon = 1e-4: 16 steps miss 750 nats, and the last changes alone do not show it."""
    values = 0.95 ** torch.arange(1, 301, dtype=torch.float64)
    matrix = orthogonal(300, 300, 5) * values @ orthogonal(300, 300, 6).T
    truth = log_volume(values, 1e-4, 300)
    found = [q.log_volume(1e-4) for q in quadratures(matrix, 8, 16, seeds=20)]
    assert np.mean([abs(e.value - truth) for e in found]) > 500
    assert all(abs(e.value - truth) <= abs(e.bias) + 4 * e.sem for e in found)
    assert not any(e.converged for e in found)


def test_quadrature_is_exact_for_few_distinct_values_and_for_a_full_budget():
    basis = orthogonal(200, 20, 1)
    projector = lanczos_quadrature(matrix_jacobian(basis @ basis.T), num_probes=4, num_steps=6)
    assert not projector.exact
    for row_nodes, row_weights in zip(*projector.levels[0], strict=True):
        assert row_weights.sum().item() == pytest.approx(200, abs=1e-8)
        assert ((row_nodes < 1e-6) | ((row_nodes - 1).abs() < 1e-6) | (row_weights < 1e-6)).all()
    matrix = torch.randn(30, 20, generator=seeded(2), dtype=torch.float64)
    full = lanczos_quadrature(matrix_jacobian(matrix), num_probes=4, num_steps=6)
    values = torch.linalg.svdvals(matrix)
    assert full.exact
    assert full.products == 20
    assert (full.log_volume(0.1).value, full.log_volume(0.1).sem) == (pytest.approx(log_volume(values, 0.1, 20)), 0)
    assert full.local_rank().value == pytest.approx(nu(values))


def test_density_integrates_to_one_and_finds_the_bulk():
    values = torch.cat([torch.full((60,), 1.0), torch.full((240,), 0.2)]).double()
    matrix = orthogonal(300, 300, 5) * values @ orthogonal(300, 300, 6).T
    found = lanczos_quadrature(matrix_jacobian(matrix), num_probes=12, num_steps=10)
    points = torch.linspace(-0.5, 1.7, 221).double()
    density = found.density(points, 0.05)
    assert sum(e.value for e in density) * 0.01 == pytest.approx(1, abs=1e-3)
    upper = [e for p, e in zip(points, density, strict=True) if p > 0.6]
    mass, sem = sum(e.value for e in upper) * 0.01, sum(e.sem for e in upper) * 0.01
    assert abs(mass - 0.2) < 4 * sem
    assert all(abs(e.bias) < 1e-3 for e in density)


@pytest.mark.parametrize(("options", "message"), [({"num_probes": 3}, "num_probes=3"), ({"num_steps": 3}, "num_steps=3")])
def test_senseless_quadratures_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lanczos_quadrature(matrix_jacobian(torch.eye(100)), **options)
    with pytest.raises(ValueError, match="epsilon=0"):
        lanczos_quadrature(matrix_jacobian(torch.eye(10))).log_volume(0)
    with pytest.raises(ValueError, match="width=0"):
        lanczos_quadrature(matrix_jacobian(torch.eye(10))).density(torch.zeros(1), 0)


# ---------------------------------------------------------------- FLIPD


VARIANCES = torch.cat([torch.ones(10), torch.full((10,), 0.01)]).double()
SCHEDULES = {
    "DDPM": (diffusers.DDPMScheduler(), "epsilon"),
    "SD scaled_linear": (diffusers.DDIMScheduler(**SCALED_LINEAR), "epsilon"),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler(), "flow_prediction"),
}


def network(exact, level, prediction):
    """The denoiser of a network that predicts what the scheduler asks for, as a user would wrap it."""

    def predict(x_t):
        return (exact.denoised(x_t, level.alpha_t, level.sigma_t) - level.a * x_t) / level.b

    return Denoiser.from_function(predict, alpha_t=level.alpha_t, sigma_t=level.sigma_t, prediction_type=prediction)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("position", [2, 10, 30, 45])
def test_flipd_of_the_linear_manifold_and_the_sphere(schedule, position):
    """theory.md A4 at a clean point, through each scheduler's own noise levels."""
    scheduler, prediction = SCHEDULES[schedule]
    scheduler.set_timesteps(50)
    level = noise_level(scheduler, position)
    basis, shares = orthogonal(100, 20, 3), VARIANCES / (VARIANCES + level.sigma**2)
    manifold = network(LinearManifoldDenoiser(basis, VARIANCES), level, prediction)
    coordinates = VARIANCES.sqrt() * torch.randn(20, generator=seeded(4)).double()
    expected = shares.sum() + level.sigma**2 * (coordinates**2 / (VARIANCES + level.sigma**2) ** 2).sum()
    assert flipd(manifold, basis @ coordinates).value == pytest.approx(expected.item(), rel=1e-6)
    at_mean = (1 - (1 - shares) ** 2).sum().item() if level.sigma < 1e6 else 0.0
    average = np.mean([
        flipd(manifold, basis @ (VARIANCES.sqrt() * torch.randn(20, generator=seeded(s)).double())).value for s in range(60)
    ])  # fmt: skip
    spread = math.sqrt(2 * ((level.sigma**2 * VARIANCES / (VARIANCES + level.sigma**2) ** 2) ** 2).sum().item() / 60)
    assert abs(average - at_mean) < 4 * spread + 1e-6
    sphere = network(SphereDenoiser(10, 1.0), level, prediction)
    clean = torch.nn.functional.normalize(torch.randn(10, generator=seeded(5)).double(), dim=0)
    kappa = 1 / level.sigma**2
    ratio = special.ive(5, kappa) / special.ive(4, kappa)
    assert flipd(sphere, clean).value == pytest.approx(2 * kappa * (1 - ratio), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("dim", "sigma", "expected"), [(2, 0.3, 1.024881), (10, 0.05, 8.960527)])
def test_flipd_of_the_sphere_as_tabulated(dim, sigma, expected):
    point = torch.zeros(dim).double()
    point[0] = 1
    assert flipd(SphereDenoiser(dim).at(1.0, sigma), point).value == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("timestep", "truth", "peer"), [(10, 8.1, 7), (50, 8.3, 4.6), (100, 8.5, 2.0), (250, 8.6, -0.5), (500, 5.1, -0.8)]
)
def test_flipd_on_stable_diffusions_own_schedule(timestep, truth, peer):
    """A known implementation takes SD's betas for linear ones between the same ends and says -0.5 where the truth is 8.6."""

    def scales(**config):
        alpha_bar = diffusers.DDPMScheduler(**config).alphas_cumprod[timestep].double().item()
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    alpha_t, sigma_t = scales(**{k: v for k, v in SCALED_LINEAR.items() if k != "steps_offset"})
    basis = orthogonal(64, 8, 1)
    exact = LinearManifoldDenoiser(basis)

    def epsilon(x):
        return (x - alpha_t * exact.denoised(x, alpha_t, sigma_t)) / sigma_t

    clean = torch.nn.functional.normalize(basis @ torch.randn(8, generator=seeded(0)).double(), dim=0) * math.sqrt(14.6)
    s2 = (sigma_t / alpha_t) ** 2
    found = flipd(Denoiser.from_function(epsilon, alpha_t=alpha_t, sigma_t=sigma_t), clean)
    assert found.value == pytest.approx(8 / (1 + s2) + s2 * 14.6 / (1 + s2) ** 2, rel=1e-6)
    assert found.value == pytest.approx(truth, abs=0.06)
    assert (found.sem, found.products) == (0, 64)
    wrong_alpha, wrong_sigma = scales(beta_start=SCALED_LINEAR["beta_start"], beta_end=SCALED_LINEAR["beta_end"])
    trace = Jacobian(lambda x: epsilon(x[None])[0], wrong_alpha * clean).dense().trace()
    wrong = 64 - wrong_sigma * trace + epsilon(wrong_alpha * clean[None]).square().sum()
    assert wrong.item() == pytest.approx(peer, abs=0.6)


def test_flipd_averages_to_d_at_noised_points():
    """Why it is never evaluated at x_t (theory.md A4)."""
    exact = LinearManifoldDenoiser(orthogonal(100, 20, 3), VARIANCES).at(1.0, 0.5)
    basis = orthogonal(100, 20, 3)
    noised = []
    for seed in range(40):
        clean = basis @ (VARIANCES.sqrt() * torch.randn(20, generator=seeded(seed)).double())
        noised.append(flipd(exact, clean + 0.5 * torch.randn(100, generator=seeded(1000 + seed)).double()).value)
    assert abs(np.mean(noised) - 100) < 4 * np.std(noised) / math.sqrt(40)


def test_flipd_estimates_with_an_error_bar_and_is_zero_at_pure_noise():
    variances = torch.arange(1, 257, dtype=torch.float64) ** -2
    denoiser = GaussianDenoiser(torch.diag(variances)).at(0.9, 0.09)
    clean = variances.sqrt() * torch.randn(256, generator=seeded(1)).double()
    truth = flipd(denoiser, clean).value
    z, error, _ = deviations(lambda g: flipd(denoiser, clean, num_products=60, generator=g), truth, seeds=60)
    assert error < 0.25
    assert (len(z) == 0) or abs(z).max() < 6
    pure = GaussianDenoiser(torch.eye(8)).at(0.0, 1.0)
    assert flipd(pure, torch.ones(8)).value == 0


# ---------------------------------------------------------------- psi from projections


@pytest.mark.parametrize(("count", "expected"), [(10, -14.119), (15, -8.965), (30, -4.024), (59, -0.0928)])
def test_projected_psi_has_the_corrections_of_the_theory(count, expected):
    """theory.md C1, D = 60, R = 10: the shift itself, and that subtracting it leaves psi."""
    values = torch.linspace(0.5, 2, 10).double()
    matrix = orthogonal(60, 10, 1) * values @ orthogonal(10, 10, 2).T
    truth = values.log().sum().item()
    for projection in ("orthonormal", "gaussian"):
        found = [
            projected_local_scaling(matrix_jacobian(matrix), count, 10, projection=projection, generator=seeded(s))
            for s in range(SEEDS)
        ]
        z = np.array([(e.value - truth) / e.sem for e in found])
        assert abs(z.mean()) < 4 / math.sqrt(SEEDS)
        if count > 10:  # at k = R one factor has a single degree of freedom: its logarithm has a long tail
            assert 0.8 < rms(z) < 1.25
        assert {e.sem for e in found} == {found[0].sem}
    shift = 0.5 * sum(torch.digamma(torch.tensor([(count - i) / 2, (60 - i) / 2])).diff().neg().item() for i in range(10))
    assert shift == pytest.approx(expected, abs=6e-4)
    probes = torch.linalg.qr(torch.randn(60, count, generator=seeded(7), dtype=torch.float64))[0]
    raw = torch.linalg.svdvals(probes.T @ matrix)[:10].log().sum().item()
    corrected = projected_local_scaling(matrix_jacobian(matrix), count, 10, generator=seeded(7))
    assert raw - corrected.value == pytest.approx(expected, abs=6e-4)


def test_projected_psi_agrees_between_counts_and_is_exact_at_the_end():
    matrix = torch.randn(60, 10, generator=seeded(3), dtype=torch.float64)
    truth = torch.linalg.svdvals(matrix).log().sum().item()
    for count in (10, 20, 40):
        found = projected_local_scaling(matrix_jacobian(matrix), count, 10, generator=seeded(count))
        assert abs(found.value - truth) < 4 * found.sem
        assert (found.products, found.rank) == (count, 10)
    exact = projected_local_scaling(matrix_jacobian(matrix), 60, 10)
    assert (exact.value, exact.sem) == (pytest.approx(truth, abs=1e-9), 0)


@pytest.mark.parametrize(
    ("count", "rank", "projection"), [(9, 10, "gaussian"), (61, 10, "gaussian"), (20, 0, "gaussian"), (20, 10, "haar")]
)
def test_senseless_projections_are_refused(count, rank, projection):
    with pytest.raises(ValueError, match=rf"num_products={count}"):
        projected_local_scaling(matrix_jacobian(torch.ones(60, 10).double()), count, rank, projection=projection)
