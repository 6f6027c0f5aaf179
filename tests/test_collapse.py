"""Collapse on examples: errors that cover, and images that become latents as the pipeline's own do."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from behind import seeded
from diffusers import AutoencoderKL

from diffusers_geometry.collapse import as_samples, held_out_collapse
from diffusers_geometry.theory import collapse_time_gaussian, sigma_of_time

VARIANCES = torch.tensor([4.0] * 4 + [0.25] * 12).double()
SIGMAS = torch.logspace(-1, 1.5, 60).double()


def measured(seed, points, scale=1.0):
    """Squared errors of a Gaussian's posterior mean on unseen points, the noise of every level its own, (levels, points)."""
    g = seeded(seed)
    x_0 = torch.randn(points, 16, generator=g, dtype=torch.double) * VARIANCES.sqrt()
    noise = torch.randn(len(SIGMAS), points, 16, generator=g, dtype=torch.double)
    shrink = VARIANCES / (VARIANCES + SIGMAS[:, None] ** 2)
    errors = (x_0 - shrink[:, None] * (x_0 + SIGMAS[:, None, None] * noise)).square().sum(2)
    return SIGMAS.numpy(), scale * errors


def test_the_error_of_the_collapse_by_held_out_errors_covers():
    """40 experiments of 60 unseen points: deviations from the closed form are as large as the errors say."""
    truth, z = float(sigma_of_time(collapse_time_gaussian(VARIANCES, math.log(500)))), []
    for seed in range(40):
        data = torch.randn(500, 16, generator=seeded(1000 + seed), dtype=torch.double) * VARIANCES.sqrt()
        found = held_out_collapse(measured(seed, 60), data)
        assert found.sem < 0.1 * truth
        z.append((found.value - truth) / found.sem)
    assert 0.7 < math.sqrt(np.mean(np.square(z))) < 1.35  # 3 standard errors of 40 normal deviates
    assert abs(np.mean(z)) < 3 / math.sqrt(40) + 0.3  # the trapezoid rule's share


def test_no_collapse_within_the_noise_of_the_run_is_none():
    data = torch.randn(500, 16, generator=seeded(1), dtype=torch.double) * VARIANCES.sqrt()
    sigmas, errors = measured(0, 20)
    assert held_out_collapse((sigmas[:5], errors[:5]), data) is None  # information is above log n at every level
    assert held_out_collapse((sigmas, errors), data) is not None


@pytest.mark.parametrize("shift", [None, 0.3])
def test_images_become_latents_as_the_pipelines_scale_them(shift):
    """(mode - shift) * scale, in several chunks: what a pipeline with this vae divides and adds before it decodes."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=2, scaling_factor=1.5, shift_factor=shift, sample_size=8,
    ).eval()  # fmt: skip
    images = torch.rand(20, 3, 8, 8, generator=seeded()) * 2 - 1
    found = as_samples(SimpleNamespace(vae=vae), images, (2, 8, 8), "data")
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(found / 1.5 + (shift or 0.0), mode, rtol=0, atol=1e-6)
    assert torch.equal(as_samples(SimpleNamespace(vae=vae), found, (2, 8, 8), "data"), found)
    with pytest.raises(ValueError, match=r"data has values up to 2. Expected images in \[-1, 1\]"):
        as_samples(SimpleNamespace(vae=vae), 2 * images / images.abs().max(), (2, 8, 8), "data")
