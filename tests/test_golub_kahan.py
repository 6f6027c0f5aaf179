"""The largest singular values from products, on spectra that are known."""

import math

import pytest
import torch

from diffusers_geometry import Jacobian
from diffusers_geometry.descriptors import local_rank, local_scaling
from diffusers_geometry.dimension import gap_dim
from diffusers_geometry.exact import GaussianDenoiser, LinearManifoldDenoiser, MixtureDenoiser
from diffusers_geometry.golub_kahan import golub_kahan_memory, golub_kahan_spectrum
from diffusers_geometry.spectrum import randomized_spectrum


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def orthogonal(size, count, seed):
    return torch.linalg.qr(torch.randn(size, count, generator=seeded(seed), dtype=torch.float64))[0]


def prescribed(values, dtype=torch.float32, seed=0, rows=None):
    """A Jacobian with these singular values, and its matrix."""
    size = len(values)
    matrix = ((orthogonal(rows or size, size, seed) * values) @ orthogonal(size, size, seed + 1).T).to(dtype)
    return Jacobian(lambda x: matrix @ x, torch.zeros(size, dtype=dtype)), matrix.double()


def spectra(size):
    i = torch.arange(1, size + 1, dtype=torch.float64)
    return {
        "flat": torch.ones(size, dtype=torch.float64),
        "geometric": 0.9**i,
        "step": torch.where(i <= 12, 1.0, 0.1).double(),
        "power law 1": i**-1,
        "power law 2": i**-2,
        "power law 3": i**-3,
        "rank 10": torch.where(i <= 10, 1 / i, 0.0),
        "two clusters": torch.where(i <= 8, 2.0, torch.where(i <= 24, 1.0, 0.01)).double(),
        "cluster over a power law": torch.where(i <= 6, 2.0, 1 / i),
        "linear": 1 - (i - 1) / size,
    }


NAMES = list(spectra(4))


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_prescribed_spectra(name, size, block_size):
    """Relative error at most tol, residuals that bound the truth, vectors that belong together, no ghosts."""
    truth = spectra(size)[name]
    jacobian, matrix = prescribed(truth, seed=size + block_size)
    found = golub_kahan_spectrum(jacobian, 16, block_size=block_size, generator=seeded(3), vectors=True)
    error = (found.singular_values - truth[:16]).abs()
    assert (error <= 1e-3 * truth[:16] + 1e-6 * truth[0]).all()
    assert (error <= found.bounds + 1e-7 * truth[0]).all()
    assert (found.errors <= found.bounds).all()
    assert found.converged.all()
    # A block of 1 or 2 must start over for every copy of a value, which may cost it the whole space.
    assert found.details["stopped"] == "converged" or name == "rank 10" or block_size < 4
    assert found.products == jacobian.products <= 2 * size
    assert found.products < 2 * size or block_size < 4
    u, v, kept = found.left, found.right, found.singular_values[: found.left.shape[1]]
    eye = torch.eye(len(kept), dtype=torch.float64)
    assert (u.T @ u - eye).abs().max() < 1e-10
    assert (v.T @ v - eye).abs().max() < 1e-10
    assert (matrix @ v - u * kept).norm(dim=0).max() < 1e-6 * truth[0]
    residuals = (matrix.T @ u - v * kept).norm(dim=0)
    assert (residuals <= found.bounds[: len(kept)] + 1e-7 * truth[0]).all()


@pytest.mark.parametrize("name", ["flat", "step", "power law 2", "two clusters"])
@pytest.mark.parametrize("size", [1024, 2048])
def test_large_prescribed_spectra(name, size):
    truth = spectra(size)[name]
    found = golub_kahan_spectrum(prescribed(truth, seed=size)[0], 16)
    assert ((found.singular_values - truth[:16]).abs() <= 1e-3 * truth[:16]).all()
    assert found.products <= size / 3


@pytest.mark.parametrize("multiplicity", [3, 5, 6, 7])
@pytest.mark.parametrize("block_size", [2, 4])
def test_every_copy_of_a_repeated_value_is_found(multiplicity, block_size):
    """More copies than starting directions, and not a multiple of them: a Krylov space shows a few and looks converged."""
    i = torch.arange(256)
    levels = [torch.tensor(v).double() for v in (2.0, 1.9, 1.8)]
    truth = 0.5 * 0.97 ** i.double()
    for level, value in enumerate(levels):
        truth[level * multiplicity : (level + 1) * multiplicity] = value
    truth = truth.sort(descending=True).values
    for seed in range(3):
        for count in (6, 8, 12, 16):
            found = golub_kahan_spectrum(prescribed(truth, seed=seed)[0], count, block_size=block_size, generator=seeded(seed))
            error = (found.singular_values - truth[:count]).abs()
            assert (error <= found.bounds + 1e-6).all(), (seed, count)
            assert (error <= 1e-3 * truth[:count]).all(), (seed, count)
            assert found.converged.all()


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("count", [4, 16])
def test_a_plateau_of_close_values_is_resolved_before_it_is_believed(sigma, count):
    variances = torch.linspace(4, 1, 40).double()
    exact = LinearManifoldDenoiser(orthogonal(1024, 40, 1), variances).at(1.0, sigma)
    truth = variances / (variances + sigma**2)
    found = golub_kahan_spectrum(exact.jacobian(torch.randn(1024, generator=seeded(2)).double()), count)
    error = (found.singular_values - truth[:count]).abs()
    assert (error <= 1e-3 * truth[:count]).all()
    assert (error <= found.bounds).all()
    assert (error <= found.errors + 1e-12).all()


@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_plateaus_over_a_decaying_rest(block_size):
    """Inside a plateau Ritz values stand still by accident: the estimated error alone would believe a third of these runs.

    With a block of 2 one run in 54 still takes the ninth value for the eighth, 1.3e-3 below it: the start nearly missed that one.
    """
    plateaus = {120: 0.98 - 0.001 * torch.arange(40), 300: torch.linspace(1, 0.99, 60), 200: torch.linspace(1, 0.97, 25)}
    wrong = 0
    for size, plateau in plateaus.items():
        truth = torch.cat([plateau, 0.3 * 0.9 ** torch.arange(size - len(plateau))]).double()
        for seed in range(6):
            jacobian = prescribed(truth, torch.float64, seed=2 * seed)[0]
            for count in (4, 8, 16):
                found = golub_kahan_spectrum(jacobian, count, block_size=block_size, generator=seeded(seed))
                error = (found.singular_values - truth[:count]).abs()
                assert (error <= 2e-3 * truth[:count]).all(), (size, seed, count)
                wrong += bool((error > 1e-3 * truth[:count]).any() or (error > found.bounds).any())
    assert wrong <= (1 if block_size == 2 else 0)


def test_a_spent_budget_claims_nothing_that_may_be_wrong():
    truth = spectra(256)["two clusters"]
    for block_size, count, budget in ((1, 3, 6), (4, 16, 32), (4, 16, 48), (2, 12, 40)):
        found = golub_kahan_spectrum(prescribed(truth)[0], count, max_products=budget, block_size=block_size)
        error = (found.singular_values - truth[:count]).abs()
        assert found.products <= budget
        assert (error <= found.bounds + 1e-6).all()
        assert (error[found.converged] <= 1e-3 * truth[:count][found.converged]).all()


def test_a_million_fold_range_in_float64():
    truth = torch.logspace(0, -12, 128, dtype=torch.float64)
    found = golub_kahan_spectrum(prescribed(truth, torch.float64)[0], 40, tol=1e-6)
    torch.testing.assert_close(found.singular_values, truth[:40], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rows", "columns"), [(40, 20), (20, 40), (1, 12), (12, 1)])
def test_rectangular_maps_to_the_last_value(rows, columns):
    matrix = torch.randn(rows, columns, generator=seeded(5), dtype=torch.float64)
    count = min(rows, columns)
    found = golub_kahan_spectrum(Jacobian(lambda x: matrix @ x, torch.zeros(columns).double()), count)
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(matrix), rtol=1e-9, atol=1e-12)
    assert found.complete


def test_a_zero_map():
    found = golub_kahan_spectrum(Jacobian(lambda x: 0 * x, torch.zeros(10)), 3)
    assert found.singular_values.tolist() == [0, 0, 0]
    assert found.details["stopped"] == "exhausted"
    assert local_rank(found).value == 0


def test_the_budget_is_kept_and_what_it_leaves_is_said():
    truth = spectra(256)["linear"]
    jacobian, _ = prescribed(truth)
    found = golub_kahan_spectrum(jacobian, 16, max_products=80)
    assert found.details["stopped"] == "budget"
    assert jacobian.products <= 80
    assert not found.converged.all()
    error = (found.singular_values - truth[:16]).abs()
    assert error.max() > 1e-3
    assert (error <= found.bounds).all()
    psi = local_scaling(found, rank=16)
    assert not psi.converged
    assert psi.bias > 0
    exact = golub_kahan_spectrum(prescribed(truth)[0], 16, max_products=512)
    assert exact.converged.all()


def test_what_is_read_from_the_largest_values_knows_what_it_does_not_know():
    """psi of the values in hand has an error; nu of all values has not; a gap is certain where the rest is smaller than it."""
    truth = spectra(256)["step"]
    found = golub_kahan_spectrum(prescribed(truth)[0], 16)
    assert not found.complete
    assert gap_dim(found).value == 12
    assert gap_dim(found).converged  # the drop of 0.9 exceeds the last value, 0.1
    psi = local_scaling(found)
    assert psi.value == pytest.approx(4 * math.log(0.1), abs=1e-4)
    assert (psi.rank, psi.converged) == (16, False)  # more values above the threshold may follow
    assert local_scaling(found, rank=16).converged
    assert local_scaling(found, relative_threshold=0.5).converged
    assert local_rank(found).bias is None
    flat = golub_kahan_spectrum(prescribed(spectra(64)["flat"])[0], 16)
    assert not gap_dim(flat).converged


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_exact_denoisers_take_a_third_of_the_dense_products(sigma):
    """d = 1024: a covariance with a power law, a manifold, and a saddle between two modes."""
    size = 1024
    variances = torch.arange(1, size + 1, dtype=torch.float64) ** -2 * 100
    basis = orthogonal(size, 24, 1)
    means = torch.zeros(2, size, dtype=torch.float64)
    means[0], means[1] = basis[:, 0], -basis[:, 0]
    covariances = (basis * 0.25 @ basis.T).expand(2, size, size)
    denoisers = {
        "gaussian": GaussianDenoiser(torch.diag(variances)),
        "manifold": LinearManifoldDenoiser(basis, torch.linspace(4, 0.25, 24).double()),
        "saddle": MixtureDenoiser(means, covariances),
    }
    for name, exact in denoisers.items():
        x = 0.01 * torch.randn(size, generator=seeded(2))
        denoiser = exact.at(1.0, sigma)
        truth = torch.linalg.svdvals(denoiser.jacobian(x.double()).dense())
        found = golub_kahan_spectrum(denoiser.jacobian(x), 16)
        error = (found.singular_values - truth[:16]).abs()
        assert (error <= 1e-3 * truth[:16] + 1e-5).all(), name
        assert (error <= found.bounds).all(), name
        assert found.products <= size / 3, (name, found.products)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "num_singular_values=0. Expected 1 <= num_singular_values <= 20"),
        (21, {}, "num_singular_values=21"),
        (3, {"tol": 0}, "tol=0"),
        (3, {"block_size": 0}, "block_size=0"),
        (3, {"max_products": 5, "block_size": 2}, "max_products=5. Expected at least 6"),
    ],
)
def test_senseless_requests_are_refused(count, options, message):
    with pytest.raises(ValueError, match=message):
        golub_kahan_spectrum(Jacobian(torch.sin, torch.zeros(20)), count, **options)


def test_a_rerun_is_the_same_run_and_a_seed_another():
    jacobian = prescribed(spectra(64)["linear"])[0]
    runs = [golub_kahan_spectrum(jacobian, 4, max_products=24, generator=seeded(s)).singular_values for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_memory_is_what_the_bases_take():
    assert golub_kahan_memory((16384, 16384), 300) == 12 * 158 * (2 * 16384 + 2 * 158)
    assert golub_kahan_memory((10, 10), 1000) == 12 * 10 * (20 + 20)


@pytest.mark.parametrize("name", NAMES)
def test_randomized_values_lie_below_within_their_bound(name):
    truth = spectra(128)[name]
    jacobian, _ = prescribed(truth)
    found = randomized_spectrum(jacobian, 20, num_oversamples=8)
    error = truth[:20] - found.singular_values
    assert (error > -1e-6 * truth[0]).all()
    assert (error <= found.bounds).all()
    assert found.products == jacobian.products == 2 * 28 + 5
    assert found.details["bias"] <= 0
    if name == "rank 10":  # theory.md C1: exact from the rank on
        assert error.abs().max() < 1e-6
    else:
        assert not found.converged.all()


def test_randomized_psi_of_the_theory():
    """theory.md C1, the range finder: exact from the rank on, below that the top k values from below."""
    matrix = orthogonal(60, 20, 1) * torch.linspace(1, 3, 20).double() @ orthogonal(40, 20, 2).T
    jacobian = Jacobian(lambda x: matrix @ x, torch.zeros(40).double())
    psi = local_scaling(randomized_spectrum(jacobian, 20, num_oversamples=0), rank=20)
    assert psi.value == pytest.approx(torch.linspace(1, 3, 20).double().log().sum().item(), abs=1e-9)
    with pytest.raises(ValueError, match="num_singular_values=41"):
        randomized_spectrum(jacobian, 41)
