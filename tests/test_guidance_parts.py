"""Parts of the guidance study where the answer is known."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "examples" / "reproduce"))

from guidance_bench import RANK, REFERENCE_T, SMOKE, Bench
from guidance_study import random_direction, shift_of, shuffled_within
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
