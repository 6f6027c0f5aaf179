"""Spectra by all three methods, and the descriptors and dimensions read from them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_jacobian import NETWORKS, wrap
from tiny import randn

from diffusers_geometry import Denoiser, Estimate, Jacobian, Spectrum
from diffusers_geometry.descriptors import local_rank, local_scaling
from diffusers_geometry.difference import central_difference_columns, choose_step, orthonormal_directions
from diffusers_geometry.dimension import effective_dimension, gap_dim, normal_bundle_dim, spectral_gaps
from diffusers_geometry.exact import GaussianDenoiser, LinearManifoldDenoiser, MixtureDenoiser
from diffusers_geometry.function_values import central_difference_spectrum, perturbation_columns, perturbation_spectrum
from diffusers_geometry.spectrum import dense_spectrum, matrix_spectrum


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix_of(values, rows=20, columns=8, seed=0):
    """A matrix with prescribed singular values."""
    values = torch.as_tensor(values, dtype=torch.float64)
    left = torch.linalg.qr(randn(rows, len(values), seed=seed).double())[0]
    right = torch.linalg.qr(randn(columns, len(values), seed=seed + 1).double())[0]
    return left * values @ right.T


def spectrum_of(values, **kwargs):
    return Spectrum(torch.as_tensor(values, dtype=torch.float64), (len(values), len(values)), "dense", len(values), **kwargs)


def central_differences(denoiser, x, count, of="denoised", seed=0):
    fn = denoiser.canonical_map(of)
    step, error = choose_step(fn, x, scale=denoiser.sigma_t, generator=seeded(seed))
    directions = orthonormal_directions(x.shape, count, x, seeded(seed + 1))
    columns, realised = central_difference_columns(fn, x, directions, step)
    return columns, realised, central_difference_spectrum(columns, realised, step=step, error=error)


# ---------------------------------------------------------------- dense


def test_dense_spectrum_of_a_prescribed_matrix():
    values = [5.0, 2.0, 1.0, 0.1, 1e-6]
    matrix = matrix_of(values)
    found = dense_spectrum(Jacobian(lambda x: matrix @ x, randn(8).double()))
    torch.testing.assert_close(found.singular_values[:5], torch.tensor(values).double(), rtol=1e-6, atol=1e-14)
    assert found.products == 8
    assert found.shape == (20, 8)
    assert (found.eigenvalues, found.asymmetry, found.trace) == (None, None, None)


def test_eigenvalues_asymmetry_and_trace_of_a_square_matrix():
    even, odd = randn(6, 6).double(), randn(6, 6, seed=1).double()
    even, odd = even + even.T, odd - odd.T
    found = matrix_spectrum(even + odd, method="dense", products=6)
    torch.testing.assert_close(found.eigenvalues, torch.linalg.eigvalsh(even).flip(0))
    assert found.asymmetry == pytest.approx((odd.norm() / even.norm()).item())
    assert found.trace.value == pytest.approx(even.trace().item())
    assert matrix_spectrum(torch.zeros(3, 3), method="dense", products=3).asymmetry == 0


def test_a_matrix_with_nan_is_refused():
    with pytest.raises(FloatingPointError, match="the Jacobian has 1 non-finite entries of 4"):
        matrix_spectrum(torch.tensor([[1.0, math.nan], [0.0, 1.0]]), method="dense", products=2)


# ---------------------------------------------------------------- Algorithm 2, central differences


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("sigma_t", [0.1, 0.9])
def test_central_differences_of_networks_in_float32(name, sigma_t):
    """Relative Frobenius error of J at most 2e-3, singular values within 2e-3 of the largest, and the error was foreseen."""
    fn, x = wrap(name, NETWORKS[name]())
    denoiser = Denoiser.from_function(fn, alpha_t=math.sqrt(1 - sigma_t**2), sigma_t=sigma_t)
    truth = denoiser.jacobian(x, "epsilon").dense().double()
    columns, realised, found = central_differences(denoiser, x, x.numel(), "epsilon")
    matrix = torch.linalg.solve(realised.double(), columns.double()).T
    assert (matrix - truth).norm() < 2e-3 * truth.norm()
    values = torch.linalg.svdvals(truth)
    worst = (found.singular_values - values).abs().max()
    assert worst < 2e-3 * values[0]
    assert worst < 2 * found.bound
    assert found.complete
    assert found.products == x.numel()


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.float64, 1e-7)])
def test_the_step_follows_the_curvature_and_not_sigma_alone(sigma, dtype, tolerance):
    """theory.md A3: between two modes h = sigma errs by 1900 %; the chosen step must not."""
    mean = torch.zeros(2, 4, dtype=torch.float64)
    mean[0, 0], mean[1, 0] = 1.0, -1.0
    exact = MixtureDenoiser(mean, 0.01 * torch.eye(4).double().expand(2, 4, 4)).at(1.0, sigma)
    x = torch.tensor([0.01, 0.1, 0.0, 0.0], dtype=dtype)
    denoiser = Denoiser(lambda p: exact.denoised(p), alpha_t=1.0, sigma_t=sigma)
    truth = torch.linalg.svdvals(exact.jacobian(x.double()).dense())
    found = central_differences(denoiser, x, 4)[2]
    assert (found.singular_values - truth).abs().max() < tolerance * truth[0]


def test_fewer_directions_interlace_and_claim_no_error_bar():
    exact = GaussianDenoiser(torch.diag(torch.linspace(0.1, 4, 30).double())).at(0.9, 0.4)
    x = randn(30).double()
    found, full = central_differences(exact, x, 12)[2], dense_spectrum(exact.jacobian(x))
    assert not found.complete
    assert (found.singular_values <= full.singular_values[:12] + 1e-8).all()
    assert (found.singular_values >= full.singular_values[-12:] - 1e-8).all()
    for estimate in (local_scaling(found), local_rank(found), gap_dim(found)):
        assert estimate.sem is None
        assert not estimate.converged
    with pytest.raises(ValueError, match="has no trace"):
        effective_dimension(found)


@pytest.mark.parametrize("count", [15, 20, 30, 60])
def test_denoiser_sees_the_dimension_with_fewer_directions_than_the_score_needs(count):
    """theory.md A3: with k < d - m directions the score cannot tell m; D' can once k > m."""
    basis = randn(60, 12, seed=3).double() / math.sqrt(12)
    denoiser = LinearManifoldDenoiser(basis).at(1.0, 0.1)
    x = randn(60, seed=4).double() * 0.1
    found = central_differences(denoiser, x, count)[2]
    assert (found.singular_values > 1e-6).sum() == 12
    if count >= 24:  # twice m: the smallest kept value is then clear of zero by more than any other drop
        assert gap_dim(found).value == 12
    if count == 30:
        score = central_differences(denoiser, x, count, "score")[2]
        assert normal_bundle_dim(score).value != 12


@pytest.mark.parametrize("count", [0, 61])
def test_number_of_directions_is_checked(count):
    with pytest.raises(ValueError, match=rf"num_directions={count}. Expected 1 <= num_directions <= 60"):
        orthonormal_directions(torch.Size([60]), count, torch.zeros(60), seeded())


# ---------------------------------------------------------------- Algorithm 1, perturbation


BASIS = randn(60, 12, seed=5).double() / math.sqrt(12)
CLEAN = BASIS @ randn(12, seed=6).double()


def manifold_columns(t0):
    """theory.md A3's check: d = 60, m = 12, F_ij ~ N(0, 1/m), around a point of the manifold."""
    fn = LinearManifoldDenoiser(BASIS).at(1.0, math.sqrt(t0)).canonical_map("score")
    return perturbation_columns(fn, CLEAN, math.sqrt(t0), num_samples=2400, generator=seeded(7))


def manifold_run(t0, centred):
    return perturbation_spectrum(*manifold_columns(t0), centred=centred)


@pytest.mark.parametrize("t0", [1e-3, 1e-2, 5e-2, 0.2, 1.0])
def test_perturbation_recovers_the_dimension_when_centred(t0):
    found = normal_bundle_dim(manifold_run(t0, centred=True))
    assert found.value == 12
    assert found.sem == 0


def test_the_centring_trap():
    """Uncentred columns count the mean score as a normal direction, and in the end see nothing else."""
    found = [normal_bundle_dim(manifold_run(t0, centred=False)).value for t0 in (1e-3, 1e-2, 0.2, 1.0, 10.0)]
    assert found == [12, 12, 11, 11, 59]
    spike = math.sqrt(10.0) * torch.linalg.solve(BASIS @ BASIS.T + 10.0 * torch.eye(60), CLEAN).norm()
    assert (10.0 * manifold_columns(10.0)[0].mean(dim=0)).norm() == pytest.approx(spike.item(), rel=0.05)


def test_perturbation_values_compare_with_dense_ones_and_carry_error_bars():
    variances = torch.tensor([4.0, 1.0, 0.25, 0.05]).double()
    exact = GaussianDenoiser(torch.diag(variances)).at(0.8, 0.6)
    clean = randn(4).double()
    truth = dense_spectrum(exact.jacobian(0.8 * clean))
    columns, xi = perturbation_columns(exact.canonical_map("denoised"), 0.8 * clean, 0.6, num_samples=4000, generator=seeded(1))
    found = perturbation_spectrum(columns, xi)
    assert found.products == 4000
    deviation = (found.singular_values - truth.singular_values) / found.singular_value_sems
    assert deviation.abs().max() < 4
    trace = effective_dimension(found)
    assert abs(trace.value - truth.trace.value) < 4 * trace.sem
    psi, reference = local_scaling(found, rank=4), local_scaling(truth, rank=4)
    assert abs(psi.value - reference.value) < 4 * psi.sem
    assert psi.bias is None


def test_error_bars_of_perturbation_are_calibrated():
    """Root mean square of (estimate - mean over seeds) / sem over 100 seeds, for nu and the trace, within 20 %."""
    exact = GaussianDenoiser(torch.diag(torch.linspace(0.05, 3, 10).double())).at(1.0, 0.5)
    truth = dense_spectrum(exact.jacobian(torch.zeros(10).double()))
    nus, traces = [], []
    for seed in range(100):
        fn = exact.canonical_map("denoised")
        columns, xi = perturbation_columns(fn, torch.zeros(10).double(), 0.5, num_samples=300, generator=seeded(seed))
        found = perturbation_spectrum(columns, xi)
        nus.append(local_rank(found))
        traces.append((found.trace.value - truth.trace.value) / found.trace.sem)
    centre = np.mean([n.value for n in nus])
    assert 0.8 < np.sqrt(np.mean([((n.value - centre) / n.sem) ** 2 for n in nus])) < 1.25
    assert 0.8 < np.sqrt(np.mean(np.square(traces))) < 1.25


def test_perturbation_with_fewer_samples_than_dimensions_is_marked_incomplete():
    exact = GaussianDenoiser(torch.eye(20)).at(1.0, 0.5)
    columns, xi = perturbation_columns(exact.canonical_map(), torch.zeros(20), 0.5, num_samples=12, generator=seeded())
    found = perturbation_spectrum(columns, xi)
    assert not found.complete
    assert len(found.singular_values) == 9  # 12 samples, less a jackknife group of 2, less the mean


def test_perturbation_refuses_one_sample():
    with pytest.raises(ValueError, match="num_samples=1"):
        perturbation_columns(torch.sin, torch.zeros(3), 0.1, num_samples=1, generator=seeded())


# ---------------------------------------------------------------- descriptors and dimensions


@pytest.mark.parametrize("factor", [1e-4, 0.5, 3.0, 1e5])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_scaling_laws_of_psi_and_nu(factor, seed):
    """psi(cA) = psi(A) + R log c, and nu(cA) = nu(A)."""
    matrix = matrix_of([3.0, 1.0, 0.2, 0.01, 1e-5], seed=seed)
    plain, scaled = (matrix_spectrum(m, method="dense", products=8) for m in (matrix, factor * matrix))
    psi, psi_scaled = local_scaling(plain), local_scaling(scaled)
    assert psi.rank == psi_scaled.rank == 4
    assert psi_scaled.value == pytest.approx(psi.value + psi.rank * math.log(factor), abs=1e-9)
    assert local_rank(scaled).value == pytest.approx(local_rank(plain).value, rel=1e-9)


def test_values_of_the_descriptors():
    assert local_rank(spectrum_of([1.0, 1.0, 1.0, 1.0])).value == pytest.approx(4)
    assert local_rank(spectrum_of([1.0, 0.5, 0.25, 0.125])).value == pytest.approx(3.117142, abs=5e-7)
    psi = local_scaling(spectrum_of([math.e, 1.0, 1e-4]))
    assert (psi.value, psi.rank, psi.per_direction) == (pytest.approx(1.0), 2, pytest.approx(0.5))
    fixed = local_scaling(spectrum_of([math.e, 1.0, 1e-4]), rank=3)
    assert (fixed.value, fixed.rank) == (pytest.approx(1 + math.log(1e-4)), 3)
    assert (fixed.sem, fixed.bias, fixed.converged) == (0.0, 0.0, True)


def test_psi_is_half_the_log_determinant():
    matrix = randn(20, 8).double()
    psi = local_scaling(matrix_spectrum(matrix, method="dense", products=8)).value
    assert psi == pytest.approx(0.5 * torch.logdet(matrix.T @ matrix).item(), abs=1e-10)


def test_a_zero_map_has_no_directions():
    zero = spectrum_of([0.0, 0.0, 0.0])
    assert (local_scaling(zero).value, local_scaling(zero).rank, local_rank(zero).value, gap_dim(zero).value) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relative_threshold": 1.0}, "relative_threshold=1.0. Expected 0 <="),
        ({"rank": 4}, "rank=4. Expected 1 <= rank <= 3"),
        ({"rank": 0}, "rank=0"),
    ],
)
def test_senseless_psi_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        local_scaling(spectrum_of([1.0, 0.5, 0.0]), **options)


def test_gaps_and_gap_dimension():
    values = [1.0, 0.9, 0.5, 0.05]
    torch.testing.assert_close(spectral_gaps(spectrum_of(values)), torch.tensor([0.1, 0.4, 0.45, 0.05]).double())
    assert gap_dim(spectrum_of(values)).value == 3
    assert gap_dim(spectrum_of([0.9, 0.9, 0.9])).value == 3  # all kept: the drop is to zero
    assert spectral_gaps(spectrum_of(values, complete=False))[-1] == 0
    with pytest.raises(ValueError, match="1 singular values. Expected at least 2"):
        normal_bundle_dim(spectrum_of([1.0]))


def test_effective_dimension_of_the_theory_table():
    """theory.md A4: d = 100, 10 dims of variance 1 and 10 of 0.01; tr D', nu and psi at three noise levels."""
    variances = torch.cat([torch.ones(10), torch.full((10,), 0.01), torch.zeros(80)]).double()
    rows = {0.01: (19.899990, 19.999757, -0.100503), 0.1: (14.900990, 18.927643, -7.030975), 1.0: (5.099010, 11.004985, -53.082677)}
    for sigma, (trace, nu, psi) in rows.items():
        found = dense_spectrum(GaussianDenoiser(torch.diag(variances)).at(1.0, sigma).jacobian(torch.zeros(100).double()))
        assert effective_dimension(found).value == pytest.approx(trace, abs=6e-7)
        assert local_rank(found).value == pytest.approx(nu, abs=6e-7)
        assert local_scaling(found, relative_threshold=1e-6).value == pytest.approx(psi, abs=6e-7)


def test_an_estimate_prints_its_error():
    assert str(Estimate(1.5)) == "1.5"
    assert str(Estimate(1.5, sem=0.25)) == "1.5 ± 0.25"
    assert str(Estimate(1.5, sem=None)) == "1.5 (error unknown)"


def test_a_normal_bundle_that_is_cut_off_has_not_converged():
    """A score has d - m equal large values: from the largest few its dimension cannot be read."""
    exact = LinearManifoldDenoiser(torch.linalg.qr(randn(40, 5).double())[0]).at(1.0, 0.3)
    score = dense_spectrum(exact.jacobian(torch.zeros(40).double(), "score"))
    assert (normal_bundle_dim(score).value, normal_bundle_dim(score).converged) == (5, True)
    cut = replace(score, singular_values=score.singular_values[:16], bounds=None, complete=False)
    assert not normal_bundle_dim(cut).converged
