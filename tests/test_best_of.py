"""Best of N: scores that are the psi of the samples, a budget that is kept, and the winner's curse."""

import math

import numpy as np
import pytest
import torch
from tiny import ddpm_pipeline, dit_pipeline

from diffusers_geometry import best_of
from diffusers_geometry.best_of import _Judge
from diffusers_geometry.denoiser import Denoiser
from diffusers_geometry.exact import MixtureDenoiser

CALL = {"num_inference_steps": 6, "output_type": "np", "psi_rank": 3, "sigma_ref": 0.5}


def test_scores_are_the_psi_of_the_samples_over_common_noises():
    pipe = ddpm_pipeline()
    found = best_of(pipe, range(10, 15), keep=2, num_noises=3, generator=torch.Generator().manual_seed(4), batch_size=2, **CALL)
    pipe.scheduler.set_timesteps(6)
    sigmas = ((1 - pipe.scheduler.alphas_cumprod) / pipe.scheduler.alphas_cumprod).sqrt()[pipe.scheduler.timesteps]
    place = (sigmas / 0.5).log().abs().argmin()
    timestep = pipe.scheduler.timesteps[place]
    assert found.sigma == pytest.approx(sigmas[place].item(), rel=1e-5)
    kept = pipe.scheduler.alphas_cumprod[timestep].double().item()
    levels = {"alpha_t": math.sqrt(kept), "sigma_t": math.sqrt(1 - kept)}
    denoiser = Denoiser.from_function(lambda x: pipe.unet(x, timestep).sample, **levels)
    noises = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    values = []
    for seed in range(10, 15):
        taken = []
        original = pipe.scheduler.step
        pipe.scheduler.step = lambda *a, taken=taken, original=original, **k: taken.append(original(*a, **k)) or taken[-1]
        image = pipe(generator=torch.Generator().manual_seed(seed), num_inference_steps=6, output_type="np").images[0]
        del pipe.scheduler.step
        x_0 = taken[-1].prev_sample[0]
        matrices = [denoiser.jacobian(levels["alpha_t"] * x_0 + levels["sigma_t"] * e).dense().double() for e in noises]
        values.append([torch.linalg.svdvals(m)[:3].log().sum().item() for m in matrices])
        if seed - 10 in found.kept:
            rank = found.kept.index(seed - 10)
            torch.testing.assert_close(found.samples[rank], x_0, atol=1e-5, rtol=1e-5)
            np.testing.assert_allclose(found.outputs[rank], image, atol=1e-5)
    values = np.array(values)
    np.testing.assert_allclose(found.scores.value, values.mean(1), rtol=1e-4)
    np.testing.assert_allclose(found.scores.sem, values.std(1, ddof=1) / math.sqrt(3), rtol=2e-2)
    assert list(found.kept) == np.argsort(-values.mean(1))[:2].tolist()
    assert found.products == (5 + 2) * 3 * 64
    assert found.seeds == tuple(range(10, 15))
    assert len(found.table().splitlines()) == 1 + 5 + 1


def test_a_conditioned_pipeline_by_products_within_a_budget():
    pipe, budget = dit_pipeline(), 4 * 64 * 2
    options = {"num_inference_steps": 4, "output_type": "np", "psi_rank": 2, "sigma_ref": 1.0, "spectrum": "golub_kahan"}
    options |= {"max_products": budget, "lowest": True, "class_label": 3, "guidance_scale": 4.0}
    few = best_of(pipe, range(3), batch_size=3, **options)
    assert few.num_noises == 2
    assert few.products <= budget
    assert few.kept[0] == int(np.argmin(few.scores.value))
    assert few.outputs[0].shape == (16, 16, 3)
    exact = best_of(pipe, range(3), batch_size=3, **options | {"spectrum": "dense", "max_products": None, "num_noises": 2})
    np.testing.assert_allclose(few.scores.value, exact.scores.value, atol=5e-3)


def test_fresh_noises_are_free_of_the_winners_curse():
    """Equal candidates differ by their noises alone; the largest score is too large, the one measured again is not."""
    exact = MixtureDenoiser(torch.tensor([[0.0, 0], [1.5, 0]]), torch.stack([torch.eye(2) * 0.05, torch.eye(2) * 0.4]))
    denoiser, x_0 = exact.at(0.8, 0.6), torch.tensor([0.7, 0.0], dtype=torch.float64)
    first, again = [], []
    for seed in range(24):
        scores, fresh = [], []
        for candidate in range(6):
            judge = _Judge("dense", 2, 2, 3, None, torch.Generator().manual_seed(100 * seed + candidate))
            scores.append(judge(denoiser, x_0, first=True).value)
            fresh.append(judge(denoiser, x_0, first=False).value)
        first.append(max(scores))
        again.append(fresh[int(np.argmax(scores))])
    truth = _Judge("dense", 2, 2, 600, None, torch.Generator().manual_seed(0))(denoiser, x_0, first=True)
    excess = np.mean(first) - truth.value
    error = math.hypot(np.std(again, ddof=1) / math.sqrt(24), truth.sem)
    assert abs(np.mean(again) - truth.value) < 3 * error
    assert excess > 6 * np.std(first, ddof=1) / math.sqrt(24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 4}, "Expected 1 <= keep <= 3 candidates"),
        ({"num_noises": 1}, "at least 2 draws"),
        (
            {"max_products": 100},
            r"max_products=100. Expected at least 512: 2 noises for 4 measurements of up to 64 products \(dense\)",
        ),
        ({"psi_rank": 65}, "Expected 1 <= psi_rank <= 64"),
        ({"spectrum": "perturbation"}, "Expected one of"),
        ({"seeds": (1, 1)}, "without repeats"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        best_of(ddpm_pipeline(), **{"seeds": range(3), **CALL, **options})
