"""delta of many samples at once: the count of each sample alone, or none."""

from types import SimpleNamespace

import pytest
import torch
from tiny import randn

from diffusers_geometry.batch_complexity import batch_complexity
from diffusers_geometry.complexity import local_complexity
from diffusers_geometry.denoiser import Denoiser
from diffusers_geometry.labels import DatasetRequest, _deltas
from diffusers_geometry.probe import probe_generator


def request(**change):
    return DatasetRequest(**{"psi_rank": 4, **change})


def relu_batch(rows, dim=3, width=40):
    """A batch map with a layer of ReLU units whose hyperplanes differ from sample to sample, and its samples' own maps."""
    weights, biases = randn(rows, dim, width, seed=3), randn(rows, width, seed=4)

    def batch(x):
        return torch.relu(torch.einsum("bd,bdw->bw", x, weights) + biases).sum(dim=1, keepdim=True)

    def alone(i):
        return lambda x: torch.relu(x @ weights[i] + biases[i]).sum(dim=1, keepdim=True)

    return batch, alone, weights, biases


def test_delta_of_a_batch_is_the_count_of_hyperplanes_that_each_sample_meets():
    """With the axes as directions a hyperplane at the distance h of normal w meets the neighbourhood when h < r max|w_i|."""
    x, radius = randn(5, 3, seed=1), 0.2
    batch, alone, weights, biases = relu_batch(5)
    counts = batch_complexity(batch, x, radius, num_directions=3, num_draws=4, generators=[torch.Generator()] * 5)
    heights = (torch.einsum("bd,bdw->bw", x, weights) + biases).abs()
    expected = (heights < radius * 3**0.5 * weights.abs().amax(dim=1)).sum(dim=1)
    assert counts.shape == (1, 5)  # the axes are not random: one draw
    assert counts[0].tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 1
    seeds = [torch.Generator().manual_seed(i) for i in range(5)]
    drawn = batch_complexity(batch, x, radius, num_directions=2, num_draws=4, generators=seeds)
    for i in range(5):
        own = local_complexity(alone(i), x[i : i + 1], radius, num_directions=2, generator=torch.Generator().manual_seed(i))
        assert drawn[:, i].tolist() == own.counts[:, 0, 0].sum(dim=-1).tolist()


LAYOUTS = {
    "twice over": lambda p: torch.cat([p, 5 - p]),
    "interleaved": lambda p: p.repeat_interleave(2, dim=0) * torch.tensor([1.0, -1.0, 7.0]),
    "in one row": lambda p: p.flatten()[None] - 0.1,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_would_be_read_wrongly_is_found_out(layout):
    x = randn(4, 3, seed=1)
    batch, alone, _, _ = relu_batch(4)

    def with_units(fn):
        return lambda p: (torch.relu(LAYOUTS[layout](p)), fn(p))[1]

    denoiser = Denoiser(with_units(batch), select_fn=lambda i: with_units(alone(i)), alpha_t=0.8, sigma_t=0.6)
    step, pairs = SimpleNamespace(sample=x, engine="replay", index=2, sigma_t=0.6), [(0, s) for s in range(4)]
    found = _deltas(denoiser, step, request(delta_radius=1.0, delta_directions=2), pairs)
    for i, pair in enumerate(pairs):
        drawn = probe_generator(2, *pair, 1)
        expected = local_complexity(with_units(alone(i)), x[i : i + 1], 0.6, num_directions=2, generator=drawn)
        assert found[i].value == expected.value.item()
        assert found[i].sem == pytest.approx(expected.sem.item())


def test_delta_of_a_network_whose_units_are_not_seen_says_how_to_go_on():
    denoiser = Denoiser(torch.tanh, select_fn=lambda i: torch.tanh, alpha_t=0.8, sigma_t=0.6)
    step = SimpleNamespace(sample=randn(2, 3), engine="replay", index=2, sigma_t=0.6)
    with pytest.raises(RuntimeError, match=r"delta of the labels: no activation .* Or leave delta out: delta_radius=None."):
        _deltas(denoiser, step, request(delta_directions=2), [(0, 1), (0, 2)])


def test_delta_of_one_network_is_the_same_in_either_form_of_the_sample():
    """x_t of a variance-preserving scheduler, and y = x_t / alpha_t that Euler's takes, meet the same knots of the network."""
    x, alpha_t, sigma_t = randn(4, 3, seed=1), 0.8, 0.6
    batch, alone, _, _ = relu_batch(4)
    forms = {
        "preserving": (Denoiser(batch, select_fn=alone, alpha_t=alpha_t, sigma_t=sigma_t), x, sigma_t),
        "exploding": (
            Denoiser(
                lambda y: batch(alpha_t * y), select_fn=lambda i: lambda y: alone(i)(alpha_t * y), alpha_t=1.0,
                sigma_t=sigma_t / alpha_t,
            ),
            x / alpha_t, sigma_t / alpha_t,
        ),
    }  # fmt: skip
    found = []
    for denoiser, sample, sigma in forms.values():
        step = SimpleNamespace(sample=sample, engine="replay", index=2, sigma_t=sigma)
        found.append(
            [e.value for e in _deltas(denoiser, step, request(delta_radius=0.5, delta_directions=2), [(0, s) for s in range(4)])]
        )
    assert found[0] == found[1]
    assert len(set(found[0])) > 1
