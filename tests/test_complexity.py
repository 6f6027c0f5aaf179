"""Local complexity against exact counts, against counts made by hand, and in real networks."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from relu_networks import by_hand, knots_on_a_line, network, seeded, weights
from tiny import PIPELINES, dit, randn, randomised, sd_unet, unet2d, vae
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from diffusers_geometry import record
from diffusers_geometry.complexity import local_complexity
from diffusers_geometry.difference import orthonormal_directions


@pytest.fixture(autouse=True)
def _same_weights():
    """Layers that torch initialises are the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def delta(fn, x, *radii, **options):
    """Total counts with the axes as directions, at euclidean radii."""
    point = torch.tensor(x, dtype=torch.float64)
    scaled = [radius / math.sqrt(len(x)) for radius in radii]
    return local_complexity(fn, point[None], scaled, num_directions=len(x), **options).value[:, 0].tolist()


# ---------------------------------------------------------------- exact counts


def test_one_dimension_against_exact_knots():
    """theory.md C1: 2, 11, 26, 29 knots; with two vertices delta finds 2, 9, 18, 19, a lower bound."""
    parameters, radii = weights((1, 16, 16, 1), 0), (0.1, 0.3, 1, 3)
    assert [knots_on_a_line(parameters, 0.1 - r, 0.1 + r) for r in radii] == [2, 11, 26, 29]
    assert delta(network(parameters), [0.1], *radii) == [2, 9, 18, 19]


def test_two_dimensions_against_exact_regions():
    """theory.md C1: N lines meet the diamond; with their I intersections it has 1 + N + I regions, which delta is not."""
    parameters, radii = weights((2, 24, 1), 1), (0.05, 0.2, 0.5, 1)
    found = delta(network(parameters), [0.2, -0.1], *radii)
    assert found == [2, 7, 14, 17]
    (weight, bias), x = parameters[0], np.array([0.2, -0.1])
    offsets = weight @ x + bias
    for radius, count, regions in zip(radii, found, (4, 15, 47, 90), strict=True):
        met = np.flatnonzero(np.abs(offsets) < radius * np.abs(weight).max(axis=1))
        corners = [np.linalg.solve(weight[[i, j]], -offsets[[i, j]]) for i, j in itertools.combinations(met, 2)]
        inside = sum(np.abs(corner).sum() <= radius for corner in corners)
        assert len(met) == count
        assert 1 + len(met) + inside == regions


def test_two_hidden_layers():
    """theory.md C1: 0, 5, 9, 16, where the diamond has 1, 8, 21, 73 regions."""
    parameters = weights((2, 12, 12, 1), 1)
    assert delta(network(parameters), [0.2, -0.1], 0.05, 0.2, 0.5, 1) == [0, 5, 9, 16]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_layers_against_counts_by_hand(seed, batch):
    """Random directions, every sample its own, from the shared helper; three draws would not do, four give an error."""
    parameters, x = weights((6, 20, 15, 10, 2), seed), randn(batch, 6, seed=seed).double()
    found = local_complexity(network(parameters), x, (0.1, 0.4), num_directions=4, num_draws=5, generator=seeded(seed))
    generator = seeded(seed)
    for draw in range(5):
        for b in range(batch):
            directions = orthonormal_directions(x.shape[1:], 4, x, generator).numpy()
            assert np.allclose(directions @ directions.T, np.eye(4))
            for i, radius in enumerate(found.euclidean_radii):
                vertices = np.concatenate([x[b].numpy() + radius * directions, x[b].numpy() - radius * directions])
                assert found.counts[draw, i, b].tolist() == by_hand(parameters, vertices)
    assert found.euclidean_radii == pytest.approx((0.1 * math.sqrt(6), 0.4 * math.sqrt(6)))
    assert found.value.shape == found.sem.shape == found.fraction.shape == (2, batch)
    assert (found.kind, found.backend, found.knots, found.num_vertices) == ("exact", "vmap", 45, 8)
    assert [layer.name for layer in found.layers] == ["1", "3", "5"]
    assert found.forwards == 4 + 5 * 2 * batch * 8
    assert found.estimate(batch - 1, 1).products == 5 * 8


@pytest.mark.parametrize("radius", [0.05, 0.5])
def test_the_first_layer_counts_hyperplanes_exactly(radius):
    """A hyperplane meets the cross-polytope when its distance is below r max |u·v|."""
    layer, x = nn.Linear(10, 400).double(), randn(1, 10).double()
    found = local_complexity(nn.Sequential(layer, nn.ReLU()), x, radius, num_directions=6, num_draws=1, generator=seeded(7))
    directions = orthonormal_directions(x.shape[1:], 6, x, seeded(7))
    distances = layer(x)[0].abs() / layer.weight.norm(dim=1)
    reach = radius * math.sqrt(10) * (layer.weight @ directions.T).abs().amax(dim=1) / layer.weight.norm(dim=1)
    assert 0 < int((distances < reach).sum()) < 400
    assert found.value.item() == int((distances < reach).sum())


# ---------------------------------------------------------------- invariances and errors


def test_an_affine_map_has_no_knots():
    linear = nn.Sequential(nn.Linear(9, 20), nn.LeakyReLU(1.0), nn.Linear(20, 9))
    found = local_complexity(linear, randn(2, 9), (0.1, 10.0))
    assert (found.kind, found.knots, found.layers, found.table()) == ("affine", 0, (), [])
    assert torch.equal(found.value, torch.zeros(2, 2).double())
    assert torch.equal(found.fraction, found.value)
    embedded = local_complexity(lambda x: linear(x) + F.silu(torch.ones(9)), randn(1, 9), 0.1)
    assert embedded.kind == "affine"


def test_layers_that_do_not_depend_on_the_sample_are_left_out():
    first, time = nn.Linear(9, 20), nn.Linear(4, 20)
    found = local_complexity(lambda x: F.relu(first(x) + F.silu(time(torch.ones(len(x), 4)))), randn(2, 9), 0.5)
    assert ([layer.function for layer in found.layers], found.kind, found.knots) == (["relu"], "exact", 20)


def test_scales():
    """Positive scales of a layer, and one scale of everything, change nothing. A larger neighbourhood meets more."""
    parameters, x = weights((6, 20, 15, 2), 3), randn(2, 6).double()
    options = {"num_directions": 4, "generator": None}
    plain = local_complexity(network(parameters), x, (0.1, 0.3, 1.0), **options)
    (a, p), (b, q), last = parameters
    scaled = network([(4 * a, 4 * p), (b / 4, q), last])
    assert torch.equal(local_complexity(scaled, x, (0.1, 0.3, 1.0), **options).counts, plain.counts)
    wider = network([(a / 8, p), (b, q), last])
    assert torch.equal(local_complexity(wider, 8 * x, (0.8, 2.4, 8.0), **options).counts, plain.counts)
    first = plain.counts[..., 0]
    assert (first[:, 0] <= first[:, 1]).all()
    assert (first[:, 1] <= first[:, 2]).all()


def test_models_of_different_size_compare_at_the_radius_per_coordinate():
    """Hyperplanes at random distances: the same fraction at d = 16 and d = 1024, within 5 %; at equal r it falls eightfold."""

    def fraction(size, radius):
        normals = F.normalize(randn(20000, size, seed=size), dim=1)
        offsets = torch.linspace(0, 1, 20000)
        fn = functools.partial(lambda x, w, b: F.relu(F.linear(x, w, b)), w=normals, b=offsets)
        return local_complexity(fn, torch.zeros(1, size), radius, num_directions=8).fraction.item()

    reach = fraction(16, 0.3)
    assert reach == pytest.approx(0.3 * 1.81, rel=0.03)  # theory.md C1: E max |u_i| = 0.453 at d = 16, k = 8, times sqrt(16)
    assert fraction(1024, 0.3) == pytest.approx(reach, rel=0.05)
    assert fraction(1024, 0.3 / 8) == pytest.approx(reach / 8, rel=0.05)


def test_standard_errors_of_the_draws():
    """Calibrated over 200 seeds; unknown for one draw; none for the axes, which are not drawn."""
    net, x = network(weights((12, 60, 40, 1), 0)), randn(1, 12).double()
    found = [local_complexity(net, x, 0.3, num_directions=3, num_draws=5, generator=seeded(s)).estimate() for s in range(200)]
    truth = np.mean([e.value for e in found])
    z = np.array([(e.value - truth) / e.sem for e in found if e.sem])
    assert len(z) > 195
    assert 0.7 < np.sqrt(np.mean(np.clip(z, -4, 4) ** 2)) < 1.25
    one = local_complexity(net, x, 0.3, num_directions=3, num_draws=1)
    assert (one.sem, one.estimate().sem, one.estimate().converged, one.table()[0]["sem"]) == (None, None, False, None)
    assert "error unknown" in str(one)
    axes = local_complexity(net, x, 0.3, num_directions=12)
    assert (axes.counts.shape[0], axes.sem.item(), axes.estimate().sem) == (1, 0, 0)
    several = local_complexity(net, x, 0.3, num_directions=3, num_draws=6)
    assert several.sem[0, 0].item() == pytest.approx(several.estimate().sem)
    assert sum(row["count"] for row in several.table()) == pytest.approx(several.estimate().value)


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_do_not_matter(chunk_size):
    net, x = network(weights((6, 20, 15, 2), 3)), randn(2, 6).double()
    found = local_complexity(net, x, 0.3, num_directions=4, chunk_size=chunk_size)
    assert torch.equal(found.counts, local_complexity(net, x, 0.3, num_directions=4).counts)


def test_chunks_are_halved_when_memory_runs_out():
    net, x, calls = network(weights((6, 20, 15, 2), 3)), randn(1, 6).double(), []

    def exhausted(points):
        calls.append(None)
        if len(calls) == 4:  # after two plain evaluations and the trial of vmap
            raise torch.OutOfMemoryError("out of memory")
        return net(points)

    with pytest.warns(UserWarning, match="out of memory with chunk_size=8; going on with 4"):
        found = local_complexity(exhausted, x, 0.3, num_directions=4)
    assert torch.equal(found.counts, local_complexity(net, x, 0.3, num_directions=4).counts)


def test_a_function_that_vmap_refuses_is_evaluated_point_by_point():
    net, x = network(weights((6, 20, 15, 2), 3)), randn(2, 6).double()
    looped = local_complexity(lambda p: net(p * float(p.detach().sum().item() < 1e9)), x, 0.3, num_directions=4)
    assert looped.backend == "looped"
    assert "item()" in looped.fallback_reason
    assert torch.equal(looped.counts, local_complexity(net, x, 0.3, num_directions=4).counts)


def test_senseless_calls_are_refused():
    net, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU()), randn(2, 6)
    with pytest.raises(ValueError, match="num_directions=7. Expected 1 <= num_directions <= 6"):
        local_complexity(net, x, 0.1, num_directions=7)
    for radius in (0, -1.0, math.inf, math.nan, ()):
        with pytest.raises(ValueError, match="neighborhood_radius=.*Expected one or more finite radii > 0"):
            local_complexity(net, x, radius, num_directions=2)
    for dtype in (torch.float16, torch.int64):
        with pytest.raises(TypeError, match=f"x has dtype {dtype}. Expected float32 or float64"):
            local_complexity(net, x.to(dtype), 0.1, num_directions=2)
    with pytest.raises(ValueError, match=r"x has shape \(6,\). Expected \(B, \*dims\)"):
        local_complexity(net, x[0], 0.1)
    for draws in (0, 2, 3):
        with pytest.raises(ValueError, match=f"num_draws={draws}. Expected 1 .* or at least 4"):
            local_complexity(net, x, 0.1, num_directions=2, num_draws=draws)
    with pytest.raises(ValueError, match="chunk_size=0"):
        local_complexity(net, x, 0.1, num_directions=2, chunk_size=0)
    with pytest.raises(ValueError, match="Expected a neighborhood_radius above the rounding of x"):
        local_complexity(net, 1 + x.abs(), 1e-9, num_directions=2)
    with pytest.raises(FloatingPointError, match="layer '1' are not finite"):
        local_complexity(net, x * math.inf, 0.1, num_directions=2)


@pytest.mark.parametrize("layer", [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.BatchNorm2d(2), nn.RReLU()])
def test_training_mode_is_refused(layer):
    net, x = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), layer), randn(1, 2, 6, 6)
    with pytest.raises(RuntimeError, match=r"is in training mode. Expected a deterministic network.*call .eval\(\)"):
        local_complexity(net, x, 0.1)
    assert local_complexity(net.eval(), x, 0.1).kind == "exact"
    assert _get_current_function_mode_stack() == []


def test_random_and_branching_networks_are_refused():
    linear, x = nn.Linear(9, 9), randn(1, 9)
    with pytest.raises(RuntimeError, match="gives other activations at the same point"):
        local_complexity(lambda p: F.relu(linear(p) + 0.1 * torch.randn(9)), x, 0.1)
    centre = linear(x).sum().item()
    with pytest.raises(RuntimeError, match="Expected the same path at every point"):
        local_complexity(lambda p: F.relu(linear(p)) if linear(p).sum().item() == centre else F.silu(linear(p)), x, 0.1)


# ---------------------------------------------------------------- real networks


def hooked(call, module, vertices, activation=nn.SiLU):
    """Sign changes of the input of every activation module, by hooks, one vertex at a time."""
    inputs = {}
    handles = [
        m.register_forward_pre_hook(lambda m, args, name=name: inputs.setdefault(name, []).append(args[0].clone()))
        for name, m in module.named_modules()
        if isinstance(m, activation)
    ]
    total = 0
    with torch.no_grad():
        positive = []
        for vertex in vertices:
            inputs.clear()
            call(vertex[None])
            positive.append({(n, i): v > 0 for n, calls in inputs.items() for i, v in enumerate(calls)})
    for handle in handles:
        handle.remove()
    for key in positive[0]:
        states = torch.stack([p[key] for p in positive])
        total += int((states.any(dim=0) & ~states.all(dim=0)).sum())
    return total


NETWORKS = {
    "UNet2DModel": (unet2d, lambda net: lambda x: net(x, torch.tensor(7)).sample, (1, 8, 8), "conv_act"),
    "AutoencoderKL": (vae, lambda net: lambda z: net.decode(z).sample, (4, 8, 8), "decoder.conv_act"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_diffusers_networks_against_hooks(name):
    """Every layer is seen and named by its module; the network is left as it was."""
    make, call, shape, last = NETWORKS[name]
    net, x = make(), randn(1, *shape)
    state, forward = {k: v.clone() for k, v in net.state_dict().items()}, F.silu
    output = call(net)(x)
    found = local_complexity(call(net), x, 0.1, num_draws=1, generator=seeded(4))
    directions = orthonormal_directions(x.shape[1:], 8, x, seeded(4))
    radius = 0.1 * math.sqrt(x.numel())
    assert found.value.item() == hooked(call(net), net, torch.cat([x + radius * directions, x - radius * directions])) > 50
    assert (found.kind, found.backend, found.layers[-1].name) == ("proxy", "vmap", last)
    modules = dict(net.named_modules())
    assert all(layer.name.partition("#")[0] in modules for layer in found.layers)
    assert not any("time" in layer.name for layer in found.layers)
    assert torch.equal(call(net)(x), output)
    assert F.silu is forward
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert "forward" not in {key for m in net.modules() for key in m.__dict__}
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert _get_current_function_mode_stack() == []


def test_attention_networks_name_their_gated_units():
    text, net = randn(1, 5, 8), sd_unet()
    found = local_complexity(lambda x: net(x, 5, text).sample, randn(1, 4, 8, 8), 0.1)
    gates = [layer for layer in found.layers if layer.function == "gelu"]
    assert all(layer.name.endswith(".transformer_blocks.0.ff.net.0") for layer in gates)
    assert len(gates) == 4
    transformer = dit()
    found = local_complexity(lambda x: transformer(x, torch.tensor([5]), torch.tensor([1])).sample, randn(1, 4, 8, 8), 0.1)
    assert [layer.name for layer in found.layers] == ["transformer_blocks.0.ff.net.0", "transformer_blocks.1.ff.net.0"]


def test_a_relu_decoder_is_exact():
    from diffusers import AutoencoderTiny

    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    net, z = randomised(AutoencoderTiny(**channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))), randn(1, 4, 4, 4)
    found = local_complexity(lambda z: net.decode(z).sample, z, 0.05, num_draws=1, generator=seeded(4))
    directions = orthonormal_directions(z.shape[1:], 8, z, seeded(4))
    vertices = torch.cat([z + sign * found.euclidean_radii[0] * directions for sign in (1, -1)])
    assert found.value.item() == hooked(lambda z: net.decode(z).sample, net, vertices, nn.ReLU) > 10
    assert (found.kind, {layer.function for layer in found.layers}) == ("exact", {"relu"})


@pytest.mark.parametrize("name", ["DDPM", "SD-DDIM"])
def test_recorded_denoisers(name):
    """A recorded step's map is counted like any other; the pipeline's own loop counts the same as replay, and is left as it was."""
    make, call, _ = PIPELINES[name]
    found = {}
    for engine in ("replay", "drive"):
        pipe = make()
        with record(pipe, steps=[2], engine=engine) as recording:
            pipe(**call(), generator=seeded(0))
        step = recording[0]
        fn = step.denoiser.select(0).canonical_map("denoised")
        before = fn(step.sample[:1])
        found[engine] = local_complexity(fn, step.sample[:1], 0.1 * step.sigma_t, num_draws=1)
        assert torch.equal(fn(step.sample[:1]), before)
        assert step.engine == engine
    assert found["replay"].value.item() > 20
    assert torch.equal(found["replay"].counts, found["drive"].counts)
    branches = 2 if name == "SD-DDIM" else 1
    single = local_complexity(
        lambda x: pipe.unet(x, step.timestep, *([randn(1, 5, 8)] if branches == 2 else [])).sample, step.sample[:1], 0.1
    )
    assert found["replay"].knots == branches * single.knots
