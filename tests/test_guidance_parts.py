"""Parts of the guidance study where the answer is known."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_geometry import record

sys.path += [str(Path(__file__).parent.parent / "examples" / folder) for folder in ("reproduce", "zoo")]

from data import digits_split
from guidance_bench import RANK, REFERENCE_T, SMOKE, Bench
from guidance_study import random_direction, shift_of, shuffled_within
from latent_bench import RANK as LATENT_RANK
from latent_bench import Effort, LatentBench, Model
from latent_quality import DigitJudge
from sample_quality import covered, vendi


def test_vendi_counts_what_is_different():
    assert vendi(np.eye(5)) == pytest.approx(5)
    assert vendi(np.tile([[1.0, 2.0]], (7, 1))) == pytest.approx(1)
    assert vendi(np.repeat(np.eye(2), (3, 1), axis=0) * 4) == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )


def test_coverage_reaches_to_the_third_neighbour():
    manifold = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    # From 0 the third neighbour is 10 away, from 2 it is 8: a point at 20 is within 12's reach of 10, one at 23 within none.
    assert covered(np.array([[20.0], [23.0]]), manifold) == 0.5
    assert covered(manifold, manifold) == 1
    crowd = np.arange(5.0)[:, None]
    assert covered(np.array([[7.0], [7.01]]), crowd) == 0.5


def test_shuffled_labels_keep_their_level():
    sigma = torch.tensor([1.0, 2.0] * 20)
    labels = torch.arange(40.0)
    dealt = shuffled_within(labels, sigma)
    for level in (1.0, 2.0):
        assert dealt[sigma == level].sort().values.tolist() == labels[sigma == level].tolist()
    assert (dealt != labels).float().mean() > 0.5


def test_shifts_are_paired_where_seeds_are():
    plain = {"psi": torch.tensor([[0.0, 2.0], [2.0, 4.0], [4.0, 6.0]])}
    assert shift_of({"psi": plain["psi"] + 1}, plain) == (0.5, 0.0)
    value, error = shift_of({"psi": plain["psi"] + 1}, plain, paired=False)
    assert value == pytest.approx(0.5)
    assert error == pytest.approx(math.sqrt(2 / 3))


def test_the_random_direction_stays_the_same_over_a_run():
    x_t = torch.ones(3, 1, 8, 8, requires_grad=True)
    first, second = (torch.autograd.grad(random_direction(x_t, x_t, s).sum(), x_t)[0] for s in (0.3, 2.0))
    assert torch.equal(first, second)
    assert torch.linalg.matrix_rank(first.flatten(1)) == 3


def test_true_psi_is_that_of_the_whole_jacobian():
    bench = Bench(SMOKE, None)
    sample, kept = bench.generate(1, None)["samples"], bench.pipe.scheduler.alphas_cumprod[REFERENCE_T]
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    expected = []
    for noise in bench.noise:
        matrix = torch.autograd.functional.jacobian(
            lambda x: x - sigma * bench.pipe.unet(x.reshape(1, 1, 8, 8), REFERENCE_T).sample.flatten(),
            (alpha * sample[0] + sigma * noise).flatten(),
        )
        expected.append(torch.linalg.svdvals(matrix.double())[:RANK].log().sum().item())
    assert bench.true_psi(sample)[0].tolist() == pytest.approx(expected, abs=1e-3)


LATENT = {
    "sd-mnist": Model("sd-mnist", 3.0, (), (3, 5), 6, {"start": 0.4, "stop": 0.8}, (-1.0, 1.0), steps=8),
    "dit-mnist": Model("dit-mnist", 2.0, (), (3, 5), 6, {"start": 0.4, "stop": 0.8}, (-1.0, 1.0), steps=8),
}


@pytest.mark.parametrize("name", LATENT)
def test_true_psi_of_latents_is_that_of_the_network_without_conditioning(name, tmp_path):
    bench = LatentBench(LATENT[name], Effort(samples=3, psi_samples=2, noises=1), tmp_path)
    found = bench.run("plain", None)
    assert found["samples"].shape == (3, 1, 32, 32)
    kept = bench.pipe.scheduler.alphas_cumprod[bench.timestep]
    sigma, x_t = (1 - kept).sqrt(), kept.sqrt() * found["latents"][1] + (1 - kept).sqrt() * bench.noise[0]

    def clean(x):
        x = x.reshape(1, 4, 8, 8)
        if name == "sd-mnist":
            nothing = bench.pipe.encode_prompt("", "cpu", 1, False)[0]
            output = bench.network(x, bench.timestep, encoder_hidden_states=nothing).sample
        else:
            output = bench.network(x, timestep=torch.tensor([bench.timestep]), class_labels=torch.tensor([1000])).sample[:, :4]
        return (x - sigma * output).flatten()

    matrix = torch.autograd.functional.jacobian(clean, x_t.flatten(), vectorize=True)
    expected = torch.linalg.svdvals(matrix.double())[:LATENT_RANK].log().sum().item()
    assert found["psi"].shape == (2, 1)
    assert found["psi"][1, 0].item() == pytest.approx(expected, abs=2e-3)
    with record(bench.pipe, [bench.model.reference]) as recording:
        bench.pipe(**bench.call([3], [1]))
    step = recording[0]
    assert step.sigma == pytest.approx(bench.sigma_ref / bench.alpha_ref, rel=1e-5)
    own = step.branch("unconditional").epsilon(step.sample[:1])
    torch.testing.assert_close(bench.unconditional(step.sample[:1], bench.timestep), own, atol=1e-4, rtol=1e-4)


def test_the_judge_knows_the_real_digits_and_jackknifes_a_mean():
    judge, digits = DigitJudge(), digits_split()[1]
    own = torch.cat([(digits.labels == digit).nonzero().flatten()[:4] for digit in range(10)]).reshape(10, 4).T.flatten()
    images, asked = digits.images[own], torch.arange(40) % 10
    found = judge(images, images, asked, 4)
    assert found["asked digit"][0] >= 0.9
    assert found["same digit"] == (1.0, 0.0)
    assert found["precision"][0] == 1.0  # they are among the real ones
    wrong = judge(images, images, torch.cat([asked[:10] + 1, asked[10:]]), 4)
    # The jackknife of a mean over four groups is the standard error of their four means.
    shares = np.array([0.0, *[found["asked digit"][0]] * 3])
    assert wrong["asked digit"][1] == pytest.approx(shares.std(ddof=1) / 2, abs=0.02)
    assert wrong["asked digit"][0] == pytest.approx(found["asked digit"][0] - 0.25, abs=0.03)
