"""psi, nu and delta of generators, and the change of their Jacobian, against what is known of them exactly."""

import math

import numpy as np
import pytest
import torch
from relu_networks import network, seeded, weights
from tiny import randn, vae
from torch import nn

from diffusers_geometry.complexity import local_complexity
from diffusers_geometry.generators import generator_geometry
from diffusers_geometry.variation import jacobian_variation

# ---------------------------------------------------------------- the smooth companion


@pytest.fixture(autouse=True)
def _same_weights():
    """Layers that torch initialises are the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def quadratic(size=5, outputs=7, seed=0):
    """f(x) = A x + ½ xᵀHx: J = A + Hx, and J moves by H r v."""
    matrix, curvature = randn(outputs, size, seed=seed).double(), randn(outputs, size, size, seed=seed + 1).double()
    curvature = (curvature + curvature.transpose(1, 2)) / 2

    def fn(x):
        return x @ matrix.T + torch.einsum("bi,oij,bj->bo", x, curvature, x) / 2

    return fn, lambda x: matrix + curvature @ x, curvature


@pytest.mark.parametrize("radius", [0.01, 1.0])
@pytest.mark.parametrize("size", [1, 12])
def test_variation_of_a_quadratic_map(radius, size):
    """radius |H|_F / |J|_F in every dimension, without bias and with error bars that mean what they say."""
    fn, jacobian, curvature = quadratic(size)
    x = randn(size).double()
    truth = radius * curvature.norm().item() / jacobian(x).norm().item()
    found = [jacobian_variation(fn, x, radius, num_products=64, generator=seeded(s)) for s in range(50)]
    values, sems = np.array([e.value for e in found]), np.array([e.sem for e in found])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(50) + 2 * abs(np.mean([e.bias for e in found]))
    assert values.std() / truth < 0.25
    assert 0.75 < np.sqrt(np.mean(((values - truth) / sems) ** 2)) < 1.3
    assert {e.products for e in found} == {64}


def test_variation_of_linear_and_of_piecewise_linear_maps():
    linear = nn.Linear(6, 4).double()
    found = jacobian_variation(linear, randn(6).double(), 0.5)
    assert (found.value, found.sem) == (0, 0)
    net, x = network(weights((6, 30, 4), 0)), randn(6).double()
    near = 0.5 * local_complexity(net, x[None], 1e-6, num_directions=6).value.item()
    assert near == 0
    assert jacobian_variation(net, x, 1e-6).value == 0
    assert jacobian_variation(net, x, 0.5).value > 0.05


def test_senseless_variations_are_refused():
    fn, _, _ = quadratic()
    for options in ({"num_products": 6}, {"num_products": 9}, {"neighborhood_radius": 0.0}):
        with pytest.raises(ValueError, match="Expected an even number of at least 8 products and a finite radius > 0"):
            jacobian_variation(fn, randn(5).double(), **{"neighborhood_radius": 0.1, **options})
    with pytest.raises(ValueError, match="the Jacobian vanishes at x"):
        jacobian_variation(lambda x: x.square(), torch.zeros(5), 0.1)


# ---------------------------------------------------------------- generators


class Coupling(nn.Module):
    """One affine coupling layer of a normalising flow: its log-determinant is the sum of its log scales."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 6))

    def scale_and_shift(self, z):
        return self.net(z[:, :3]).chunk(2, dim=1)

    def forward(self, z):
        scale, shift = self.scale_and_shift(z)
        return torch.cat([z[:, :3], z[:, 3:] * scale.exp() + shift], dim=1)


def test_a_normalising_flow_scales_volume_by_its_log_determinant():
    flow, z = Coupling().double(), randn(6).double()
    found = generator_geometry(flow, z, 0.2, num_directions=3)
    assert found.local_scaling.value == pytest.approx(flow.scale_and_shift(z[None])[0].sum().item(), abs=1e-10)
    assert (found.local_scaling.rank, found.spectrum.shape, found.local_complexity.kind) == (6, (6, 6), "exact")
    assert "local rank nu" in str(found)


def test_a_relu_generator():
    """psi and nu from the product of the weights of the active units; delta as by itself."""
    parameters, z = weights((4, 30, 20, 12), 5), randn(4).double()
    (a, p), (b, q), (c, _) = parameters
    first = a @ z.numpy() + p
    second = b @ np.maximum(first, 0) + q
    values = np.linalg.svd(c @ ((second > 0)[:, None] * b) @ ((first > 0)[:, None] * a), compute_uv=False)
    net = network(parameters)
    shares = values / values.sum()
    for options in ({}, {"num_singular_values": 4}):
        found = generator_geometry(net, z, (0.1, 0.3), num_directions=4, **options)
        assert found.local_scaling.value == pytest.approx(np.log(values).sum(), rel=1e-6)
        assert found.local_rank.value == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
        assert torch.equal(found.local_complexity.counts, local_complexity(net, z[None], (0.1, 0.3), num_directions=4).counts)
        assert found.spectrum.method == ("golub_kahan" if options else "dense")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_decoder_of_a_vae():
    net, z = vae(), randn(4, 4, 4)
    found = generator_geometry(lambda z: net.decode(z).sample, z, 0.1, num_singular_values=5)
    matrix = torch.func.jacrev(lambda z: net.decode(z[None]).sample)(z).reshape(-1, z.numel())
    top = torch.linalg.svdvals(matrix)[:5].double()
    assert torch.allclose(found.spectrum.singular_values, top, rtol=1e-2)
    assert found.local_scaling.value == pytest.approx(top.log().sum().item(), abs=0.02)
    assert not found.local_scaling.converged
    assert found.local_complexity.kind == "proxy"
