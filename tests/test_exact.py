"""The oracles against closed forms and brute force."""

import math

import numpy as np
import pytest
import torch

from diffusers_geometry.exact import (
    EmpiricalDenoiser,
    GaussianDenoiser,
    LinearManifoldDenoiser,
    MixtureDenoiser,
    SphereDenoiser,
    _bessel_ratio,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eigenvalues(denoiser, x_t):
    return torch.linalg.eigvalsh(denoiser.jacobian(x_t).dense()).flip(0)


@pytest.mark.parametrize(("alpha_t", "sigma_t"), [(1.0, 0.3), (0.8, 0.6), (0.1, 0.995), (0.0, 1.0)])
def test_gaussian_with_any_covariance_and_mean(alpha_t, sigma_t):
    factor, mean = randn(6, 4), randn(6, seed=1)
    covariance = factor @ factor.T  # singular on purpose
    x_t = randn(3, 6, seed=2)
    denoiser = GaussianDenoiser(covariance, mean).at(alpha_t, sigma_t)
    gain = alpha_t * covariance @ torch.linalg.inv(alpha_t**2 * covariance + sigma_t**2 * torch.eye(6))
    torch.testing.assert_close(denoiser.denoised(x_t), mean + (x_t - alpha_t * mean) @ gain.T)
    torch.testing.assert_close(denoiser.jacobian(x_t[0]).dense(), alpha_t * gain)


@pytest.mark.parametrize("as_factor", [True, False])
def test_linear_manifold_keeps_exactly_its_dimension(as_factor):
    basis, variances = torch.linalg.qr(randn(12, 5))[0], torch.tensor([4.0, 1.0, 1.0, 0.1, 0.01]).double()
    exact = LinearManifoldDenoiser(basis * variances.sqrt()) if as_factor else LinearManifoldDenoiser(basis, variances)
    found = eigenvalues(exact.at(0.9, 0.9 * 0.2), randn(12))
    expected = torch.cat([variances / (variances + 0.04), torch.zeros(7)]).double()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_image_shapes_are_kept():
    x_t = randn(2, 3, 4, 4).float()
    denoised = GaussianDenoiser(torch.eye(48)).at(1.0, 1.0).denoised(x_t)
    torch.testing.assert_close(denoised, x_t / 2)


@pytest.mark.parametrize(("mean_norm_squared", "variance", "sigma"), [(4.0, 0.25, 0.5), (1.0, 0.01, 0.9), (4.0, 0.25, 3.0)])
def test_two_modes_exceed_one_at_the_saddle(mean_norm_squared, variance, sigma):
    """theory.md section 0: v/(v+s2) + |mu|^2 s2/(v+s2)^2 along the separation, not clipped."""
    mean = torch.tensor([mean_norm_squared**0.5, 0.0, 0.0], dtype=torch.float64)
    covariances = variance * torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    found = MixtureDenoiser(torch.stack([mean, -mean]), covariances).at(1.0, sigma).jacobian(torch.zeros(3).double()).dense()
    total = variance + sigma**2
    along = variance / total + mean_norm_squared * sigma**2 / total**2
    torch.testing.assert_close(found, torch.diag(torch.tensor([along, variance / total, variance / total]).double()))
    assert (along > 1) == (sigma**2 < mean_norm_squared - variance)


def test_value_of_the_theory_at_the_saddle():
    mean = torch.tensor([[2.0], [-2.0]], dtype=torch.float64)
    found = MixtureDenoiser(mean, torch.full((2, 1, 1), 0.25).double()).at(1.0, 0.5).jacobian(torch.zeros(1).double()).dense()
    assert found.item() == pytest.approx(4.5, abs=1e-12)


def test_mixture_against_brute_force_posterior():
    means, weights = randn(3, 2) * 2, torch.tensor([0.2, 0.5, 0.3])
    covariances = torch.stack(
        [torch.diag(torch.tensor([0.5, 0.0])), 0.3 * torch.eye(2), torch.diag(torch.tensor([0.0, 0.7]))]
    ).double()
    alpha_t, sigma_t, x_t = 0.8, 0.6, torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    found = MixtureDenoiser(means, covariances, weights).at(alpha_t, sigma_t).denoised(x_t)[0]
    generator, parts, masses = torch.Generator().manual_seed(3), [], []
    for mean, covariance, weight in zip(means, covariances, weights, strict=True):
        x_0 = mean + torch.randn(400_000, 2, generator=generator, dtype=torch.float64) * covariance.diagonal().sqrt()
        likelihood = weight * torch.exp(-0.5 * ((x_t - alpha_t * x_0) / sigma_t).square().sum(dim=1))
        masses.append(likelihood.mean())
        parts.append((likelihood[:, None] * x_0).mean(dim=0))
    torch.testing.assert_close(found, sum(parts) / sum(masses), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("dim", "radius", "sigma", "tangential", "radial", "total"),
    [(2, 1.0, 0.3, 0.953880, 0.047367, 1.001247), (10, 1.0, 0.05, 0.988799, 0.011151, 8.910345)],
)
def test_sphere_values_of_the_theory(dim, radius, sigma, tangential, radial, total):
    x_t = torch.zeros(dim, dtype=torch.float64)
    x_t[0] = radius
    found = SphereDenoiser(dim, radius).at(1.0, sigma).jacobian(x_t)
    values = eigenvalues(SphereDenoiser(dim, radius).at(1.0, sigma), x_t)
    torch.testing.assert_close(values[:-1], torch.full((dim - 1,), tangential).double(), rtol=0, atol=6e-7)
    assert values[-1].item() == pytest.approx(radial, abs=6e-7)
    assert values.sum().item() == pytest.approx(total, abs=6e-7)
    direction = randn(dim, seed=4)
    torch.testing.assert_close(found.jvp(direction), found.dense() @ direction)


@pytest.mark.parametrize("dim", [3, 64, 3072])
def test_sphere_is_finite_and_differentiable_at_every_noise(dim):
    """Large orders underflow in the Bessel functions; a central difference is the independent witness."""
    for sigma in (1e-3, 0.1, 1.0, 30.0):
        denoiser = SphereDenoiser(dim).at(1.0, sigma)
        x_t, direction = (
            torch.nn.functional.normalize(randn(dim), dim=0) * 1.1,
            torch.nn.functional.normalize(randn(dim, seed=1), dim=0),
        )
        h = 1e-4 * min(sigma, 1.0)
        ahead, behind = denoiser.denoised(torch.stack([x_t + h * direction, x_t - h * direction]))
        product = denoiser.jacobian(x_t).jvp(direction)
        assert ((ahead - behind) / (2 * h) - product).norm() < 1e-5 * product.norm()


def test_sphere_against_brute_force_posterior():
    x_t = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    x_0 = torch.nn.functional.normalize(randn(2_000_000, 3), dim=1)
    weights = torch.softmax(-((x_t - x_0).square().sum(dim=1)) / (2 * 0.3**2), dim=0)
    mean = weights @ x_0
    covariance = (x_0 - mean).T @ ((x_0 - mean) * weights[:, None]) / 0.3**2
    found = SphereDenoiser(3).at(1.0, 0.3).jacobian(x_t).dense()
    torch.testing.assert_close(found, covariance, rtol=0, atol=1e-2)


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 4096])
def test_empirical_is_the_softmax_average_in_any_chunks(chunk_size):
    data, alpha_t, sigma_t = randn(50, 2, 3), 0.6, 0.8
    x_t = alpha_t * data[:4] + sigma_t * randn(4, 2, 3, seed=1)
    exact = EmpiricalDenoiser(data, chunk_size)
    logits = -((x_t[:, None] - alpha_t * data).flatten(2).square().sum(dim=2)) / (2 * sigma_t**2)
    weights = logits.softmax(dim=1)
    torch.testing.assert_close(exact.weights(x_t, alpha_t, sigma_t), weights)
    torch.testing.assert_close(exact.denoised(x_t, alpha_t, sigma_t).flatten(1), weights @ data.flatten(1))
    centred = data.flatten(1) - weights[0] @ data.flatten(1)
    covariance = centred.T @ (centred * weights[0][:, None]) * (alpha_t / sigma_t) ** 2
    torch.testing.assert_close(exact.at(alpha_t, sigma_t).jacobian(x_t[0]).dense(), covariance)


def test_empirical_is_stable_at_small_and_infinite_noise():
    data = randn(200, 64).float() * 10
    x_t = data[:3] + 1e-3
    exact = EmpiricalDenoiser(data, 64)
    torch.testing.assert_close(exact.denoised(x_t, 1.0, 1e-3), data[:3])
    torch.testing.assert_close(exact.denoised(x_t, 0.0, 1.0), data.mean(dim=0).expand(3, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianDenoiser(torch.ones(2, 3)), r"covariance has shape \(2, 3\). Expected \(d, d\)"),
        (lambda: GaussianDenoiser(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "not symmetric"),
        (lambda: GaussianDenoiser(torch.diag(torch.tensor([1.0, -1.0]))), "eigenvalue -1"),
        (lambda: LinearManifoldDenoiser(torch.eye(3)[:, :2], torch.tensor([1.0, 0.0])), "Expected 2 positive numbers"),
        (lambda: MixtureDenoiser(torch.zeros(2, 3), torch.zeros(2, 2, 2)), r"Expected \(2, 3, 3\)"),
        (lambda: SphereDenoiser(1), "Expected dim >= 2"),
        (lambda: EmpiricalDenoiser(torch.zeros(0, 3)), "n >= 1"),
        (lambda: SphereDenoiser(4).at(1.0, 1.0).denoised(torch.zeros(1, 3)), "Expected 4, the dimension of the data"),
        (lambda: SphereDenoiser(4).at(1.0, 0.0), "Expected finite alpha_t >= 0 and sigma_t > 0"),
    ],
)
def test_what_is_not_a_distribution_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_area_law_of_the_empirical_denoiser():
    """theory.md A4: the integral of E tr D' over log sigma is log n for n points (3.69 nats for 40)."""
    data, generator = randn(40, 3), torch.Generator().manual_seed(5)
    log_sigma = np.linspace(np.log(2e-3), np.log(60), 60)
    traces = []
    for s in np.exp(log_sigma):
        x_t = data.repeat(8, 1) + s * torch.randn(320, 3, generator=generator, dtype=torch.float64)
        weights = EmpiricalDenoiser(data).weights(x_t, 1.0, float(s))
        mean = weights @ data
        traces.append(((weights @ data.square().sum(dim=1)) - mean.square().sum(dim=1)).mean().item() / s**2)
    tail = 0.5 * torch.linalg.eigvalsh(torch.cov(data.T, correction=0) / 60**2).log1p().sum().item()
    assert np.trapezoid(traces, log_sigma) + tail == pytest.approx(np.log(40), abs=0.1)


@pytest.mark.parametrize("dim", [2, 3, 10, 64, 399, 400, 1024, 3072, 12288])
def test_bessel_ratio_at_every_size(dim):
    """Against Perron's continued fraction, long enough for every kappa, and beyond that Hankel's series."""
    for factor in (1e-3, 0.5, 1.0, 1.0001, 1.01, 1.2, 2, 4, 20, 1e8, 1e12):
        kappa = factor * dim / 2
        expected = 0.0
        if kappa < 3e5:
            for k in range(int(6 * kappa) + 500, -1, -1):
                expected = kappa / (dim + 2 * k + kappa * expected)
        else:
            expected = 1 - (dim - 1) / (2 * kappa) + (dim - 1) * (dim - 3) / (8 * kappa**2)
        assert _bessel_ratio(np.array([kappa]), dim)[0] == pytest.approx(expected, rel=1e-11)


def test_sphere_where_bessel_functions_underflow():
    """For large d the ratio is (sqrt(1 + z^2) - 1) / z, z = 2 kappa / d; for large kappa it is 1."""
    for dim, radius, sigma in ((4096, 64.0, 1.4), (12288, 110.0, 1.0), (3, 1.0, 1e-5)):
        point = torch.zeros(1, dim)
        point[0, 0] = radius
        z = 2 * radius**2 / sigma**2 / dim
        ratio = (math.sqrt(1 + z**2) - 1) / z if dim > 3 else 1.0
        found = SphereDenoiser(dim, radius).at(1.0, sigma).denoised(point)[0, 0].item()
        assert found == pytest.approx(radius * ratio, rel=2e-3)


def test_close_points_far_from_the_origin_keep_their_digits():
    first = randn(3072).double() * 10
    second = first.clone()
    second[0] += 1e-6
    exact = EmpiricalDenoiser(torch.stack([first, second]))
    weight = exact.weights(first[None] - torch.eye(3072).double()[:1] * 3e-5, 1.0, 1e-5)[0]
    assert (weight[1] / weight[0]).log().item() == pytest.approx((3e-5**2 - 3.1e-5**2) / 2e-10, rel=1e-6)


@pytest.mark.parametrize("make", [
    lambda bad: EmpiricalDenoiser(bad), lambda bad: LinearManifoldDenoiser(bad), lambda bad: GaussianDenoiser(bad),
    lambda bad: GaussianDenoiser(torch.eye(3), bad[0]),
])  # fmt: skip
def test_what_is_not_finite_is_no_data(make):
    bad = torch.eye(3)
    bad[0, 1] = math.nan
    with pytest.raises(ValueError, match="has 1 non-finite entries. Expected finite numbers"):
        make(bad)
