"""What the reproductions stand on: exact denoisers of curved manifolds, a network under another schedule, marks of a run."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from sklearn.datasets import load_digits

from diffusers_geometry import dense_spectrum
from diffusers_geometry.dimension import effective_dimension, flipd
from diffusers_geometry.exact import EmpiricalDenoiser

sys.path.append(str(Path(__file__).parent.parent / "examples" / "reproduce"))

from curved import RADII, DigitDenoiser, digit_derivatives, digit_grid, digit_images, digit_radii, laws, manifolds
from nonlinear_manifolds import window
from runs import SCHEDULES, AtEqualSigma, log_sigmas, rising, shares


def drawn(name, seed=0):
    return manifolds(21, 6)[name].draw(torch.Generator().manual_seed(seed))


def test_circles_match_a_sum_over_their_angles():
    exact, x_0 = drawn("torus")
    sigma, generator = 0.4, torch.Generator().manual_seed(1)
    y = x_0 + sigma * torch.randn(len(x_0), generator=generator, dtype=torch.double)
    inside = y @ exact.basis
    angles = torch.arange(4000).double() * 2 * math.pi / 4000
    unit = torch.stack([angles.cos(), angles.sin()], 1)
    means = [r * (r * unit @ pair / sigma**2).softmax(0) @ unit for r, pair in zip(RADII, inside.split(2), strict=True)]
    torch.testing.assert_close(exact.at(1.0, sigma).denoised(y[None])[0], exact.basis @ torch.cat(means), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_digits_match_a_grid_over_the_whole_domain(sigma):
    parameters = torch.tensor([0.2, -0.3, 0.25]).double()
    x = digit_images(parameters[None])
    y = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    everywhere = digit_grid(0 * parameters, torch.full((3,), 9.0).double(), 40)
    expected = EmpiricalDenoiser(digit_images(everywhere), chunk_size=16384).at(1.0, sigma).denoised(y)
    # At the edges of the domain a sum errs by half a spacing.
    torch.testing.assert_close(DigitDenoiser(parameters).at(1.0, sigma).denoised(y), expected, rtol=0, atol=0.01)


def test_a_digit_moves_with_its_parameters():
    """Unmoved it is the image itself; a step of the parameters by whole pixels, or a quarter turn, moves pixels about."""
    own, still, moved, turned = digit_images(
        torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.4], [1.0, -2.0, 0.4], [0.0, 0.0, math.pi / 2]], dtype=torch.double)
    ).reshape(4, 12, 12)
    torch.testing.assert_close(own[2:10, 2:10], torch.from_numpy(load_digits().images[3]) / 16, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved[:10, 1:], still[2:, :11], rtol=0, atol=1e-12)  # one to the right, two up
    torch.testing.assert_close(turned, own.rot90(-1), rtol=0, atol=1e-9)
    assert (own - still).norm() > 1


def test_laws_of_curvature_hold_where_the_noise_is_small():
    sigma, traces, clean = 1e-3, [], []
    for seed in range(60):
        exact, x_0 = drawn("torus", seed)
        noise = torch.randn(len(x_0), generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        traces.append(effective_dimension(dense_spectrum(exact.at(1.0, sigma).jacobian(x_0 + sigma * noise))).value - len(RADII))
        if seed < 3:
            clean.append(flipd(exact.at(1.0, 10 * sigma), x_0).value - len(RADII))
    first, second = laws(1)["torus"]
    assert np.sqrt(np.mean(np.square(traces))) == pytest.approx(first * sigma, rel=0.3)  # 3 standard errors of 60 draws
    assert np.mean(clean) == pytest.approx(second * (10 * sigma) ** 2, rel=0.02)


def test_radii_of_the_digits_by_differences():
    middle, h = torch.tensor([0.0, 0.0, 0.5]).double(), 1e-3
    tangent, _ = digit_derivatives(middle)
    for i, radius in enumerate(digit_radii()):
        step = h * torch.eye(3).double()[i]
        before, here, after = digit_images(torch.stack([middle - step, middle, middle + step]))
        second = (after - 2 * here + before) / h**2
        second = second - tangent @ torch.linalg.lstsq(tangent, second[:, None]).solution[:, 0]
        assert radius == pytest.approx((((after - before) / (2 * h)).square().sum() / second.norm()).item(), rel=1e-4)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_another_schedule_asks_the_network_at_equal_sigma(schedule):
    network = torch.nn.Identity()
    network.config, network.dtype, network.device = None, torch.float32, torch.device("cpu")
    trained = DDPMScheduler(beta_start=1e-4, beta_end=2e-2)
    used = DDIMScheduler.from_config(trained.config, **SCHEDULES[schedule])
    asked = AtEqualSigma(network, trained, used)
    for timestep in (40, 300, 800):
        at = asked.training_timestep(torch.tensor(timestep))
        low, share = int(at), at - int(at)
        below, above = log_sigmas(trained)[low : low + 2]
        assert below + share * (above - below) == pytest.approx(log_sigmas(used)[timestep], abs=1e-9)
    if schedule == "linear":
        assert asked.training_timestep(300) == pytest.approx(300)


def test_marks_of_a_run():
    sigmas = np.array([100.0, 10.0, 1.0])
    assert rising(sigmas, np.array([0.0, 0.4, 0.8]), 0.6) == pytest.approx(10**0.5)
    assert rising(sigmas, np.array([0.0, 0.4, 0.5]), 0.6) == 0
    assert rising(sigmas, np.array([0.7, 0.4, 0.8]), 0.6) == math.inf
    assert rising(np.array([math.inf, 10.0]), np.array([0.0, 0.8]), 0.6) == 10
    assert shares(np.array([[1.2, 0.95, 0.5, 0.05], [0.05] * 4])).tolist() == pytest.approx([2 / 3, 0])


def test_window_is_the_longest_run_of_right_levels():
    values = np.array([[3.0], [5.0], [3.2], [2.9], [2.6], [math.nan]])
    assert window(np.array([32.0, 16.0, 8.0, 4.0, 2.0, 1.0]), values, 3) == (2.0, 8.0)
    assert window(np.array([2.0, 1.0]), np.array([[9.0], [9.0]]), 3) is None
