"""Every activation is seen, in every form, with its knots where the function bends."""

import math
import warnings

import pytest
import torch
from relu_networks import seeded
from tiny import randn
from torch import nn
from torch.nn import functional as F

from diffusers_geometry.complexity import local_complexity
from diffusers_geometry.difference import orthonormal_directions


@pytest.fixture(autouse=True)
def _same_weights():
    """Layers that torch initialises are the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of TorchScript
        return torch.jit.script(module)


KNOTS = {
    "relu": (F.relu, [0]), "relu6": (F.relu6, [0, 6]), "leaky_relu": (F.leaky_relu, [0]), "hardtanh": (F.hardtanh, [-1, 1]),
    "prelu": (nn.PReLU().double(), [0]), "rrelu": (lambda x: F.rrelu(x, training=False), [0]), "abs": (abs, [0]),
    "threshold": (lambda x: F.threshold(x, 2.5, 0.0), [2.5]), "hardsigmoid": (F.hardsigmoid, [-3, 3]),
    "softshrink": (lambda x: F.softshrink(x, 1.5), [-1.5, 1.5]), "hardshrink": (F.hardshrink, [-0.5, 0.5]),
    "clamp": (lambda x: x.clamp(-2, 4), [-2, 4]), "clamp_max": (lambda x: torch.clamp_max(x, 2), [2]),
    "clamp_min": (lambda x: x.clamp_min(1), [1]), "clip": (lambda x: x.clip(max=3.5), [3.5]),
    "maximum": (lambda x: torch.maximum(x, torch.tensor(2.0).double()), [2]), "max": (lambda x: torch.max(x, x.new_zeros(1)), [0]),
    "minimum": (lambda x: torch.minimum(x, 1 - x), [0.5]),
}  # fmt: skip
PROXIES = {
    "silu": F.silu, "gelu": lambda x: F.gelu(x, approximate="tanh"), "mish": F.mish, "elu": F.elu, "selu": F.selu, "celu": F.celu,
    "softplus": F.softplus, "log_sigmoid": F.logsigmoid, "sigmoid": lambda x: x * torch.sigmoid(x),
}  # fmt: skip


def units_on_a_grid(activation):
    """2001 units on a line with pre-activations x + c, c from -10 to 10."""
    offsets = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    return lambda x: activation(x + offsets)


@pytest.mark.parametrize("name", KNOTS)
def test_piecewise_linear_activations_bend_at_their_knots(name):
    """Knots within 0.304 of a pre-activation are met: 61 units of a grid of 0.01, and twice as many for two knots."""
    activation, knots = KNOTS[name]
    grid = torch.linspace(-9, 9, 100001, dtype=torch.float64)
    with torch.no_grad():
        bends = activation(grid).diff().diff().abs() > 1e-9
    positions = grid[1:-1][bends]
    for knot in knots:  # the oracle: the function bends there and nowhere else
        assert (positions - knot).abs().min() < 1e-3
    assert all(min(abs(p - k) for k in knots) < 1e-3 for p in positions.tolist())
    found = local_complexity(units_on_a_grid(activation), torch.zeros(1, 1).double(), 0.304, num_directions=1)
    assert found.value.item() == 61 * len(knots)
    (layer,) = found.layers
    assert (layer.name, layer.function, layer.kind, layer.units) == (name, name, "exact", 2001)
    assert layer.knots == found.knots == 2001 * len(knots)
    assert found.fraction.item() == pytest.approx(61 / 2001)


@pytest.mark.parametrize("name", PROXIES)
def test_smooth_activations_are_a_labelled_proxy(name):
    found = local_complexity(units_on_a_grid(PROXIES[name]), torch.zeros(1, 1).double(), 0.304, num_directions=1)
    assert found.value.item() == 61
    assert (found.layers[0].function, found.kind) == (name, "proxy")
    assert "(proxy)" in str(found)


def test_gated_units_change_sign_with_their_gate():
    """GEGLU, SwiGLU and F.glu: only the gate's half counts."""
    from diffusers.models.activations import GEGLU, ApproximateGELU, SwiGLU

    x = randn(1, 5).double()
    directions = orthonormal_directions(x.shape[1:], 3, x, seeded(2))
    radius = 0.5 * math.sqrt(5)
    vertices = torch.cat([x + radius * directions, x - radius * directions])
    glu, gate = nn.Sequential(nn.Linear(5, 40), nn.GLU()), slice(20, 40)
    for module, units in ((GEGLU(5, 20), gate), (SwiGLU(5, 20), gate), (glu, gate), (ApproximateGELU(5, 40), slice(40))):
        module = module.double()
        values = (module[0] if module is glu else module.proj)(vertices)[:, units]
        found = local_complexity(module, x, 0.5, num_directions=3, num_draws=1, generator=seeded(2))
        expected = int(((values > 0).any(dim=0) & (values <= 0).any(dim=0)).sum())
        assert 0 < expected == found.value.item()
        assert (found.kind, found.knots) == ("proxy", values.shape[1])


FORMS = {
    "module": nn.ReLU(), "module in place": nn.ReLU(inplace=True), "functional": F.relu, "torch": torch.relu,
    "torch_": torch.relu_, "method": lambda x: x.relu(), "method in place": lambda x: x.relu_(),
    "functional in place": lambda x: F.relu(x, inplace=True), "F.relu_": F.relu_,
    "maximum": lambda x: torch.maximum(x, torch.zeros(())), "clamp": lambda x: x.clamp(min=0),
    "clamp keyword": lambda x: torch.clamp(input=x, min=0), "clamp in place": lambda x: x.clamp_(0),
    "clamp_min": lambda x: x.clamp_min(0), "threshold": nn.Threshold(0, 0), "aten": lambda x: torch.ops.aten.relu(x),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_call_is_seen(form):
    first, second, x = nn.Linear(6, 30), nn.Linear(30, 20), randn(2, 6)
    before = x.clone()

    def fn(points):
        return FORMS[form](second(FORMS[form](first(points))))

    found = local_complexity(fn, x, (0.05, 0.3), num_directions=3, generator=seeded(1))
    plain = local_complexity(
        nn.Sequential(first, nn.ReLU(), second, nn.ReLU()), x, (0.05, 0.3), num_directions=3, generator=seeded(1)
    )
    assert torch.equal(found.counts, plain.counts)
    assert found.counts.sum() > 0
    assert (found.kind, found.backend, found.uncounted) == ("exact", "vmap", ())
    assert torch.equal(x, before)


def test_compiled_and_fused_modules_are_seen():
    """A compiled module runs as written; a transformer layer leaves its fused path, which hides its activation, by itself."""
    plain = nn.Sequential(nn.Linear(6, 30), nn.ReLU())
    compiled = torch.compile(plain, backend="eager")
    x = randn(1, 6)
    compiled(x)
    found = [local_complexity(module, x, 0.3, num_directions=3) for module in (compiled, plain)]
    assert torch.equal(found[0].counts, found[1].counts)
    assert (len(found[0].layers), found[0].uncounted) == (1, ())
    layer = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True).eval()
    found = local_complexity(layer, randn(1, 3, 8), 0.3)
    assert ([la.function for la in found.layers], found.knots, found.uncounted) == (["relu"], 3 * 24, ())


def test_what_is_not_counted_is_said():
    pooled = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    assert local_complexity(pooled, randn(1, 1, 8, 8), 0.1).uncounted == ("max_pool2d",)
    hidden = scripted(nn.Sequential(nn.Linear(9, 9), nn.SiLU()))
    found = local_complexity(nn.Sequential(nn.Linear(9, 9), nn.ReLU(), hidden), randn(1, 9), 0.1)
    assert ([layer.function for layer in found.layers], found.uncounted) == (["relu"], ("hidden silu",))
    assert "not counted: hidden silu" in str(found)


BENDS = {
    "tanh": (lambda: torch.tanh, ""), "square": (lambda: torch.square, ""),
    "scripted": (lambda: scripted(nn.ReLU()), "hidden relu"), "pooled": (lambda: nn.MaxPool1d(3), "max_pool1d"),
    "where": (lambda: lambda x: torch.where(x > 0, x, 0 * x), "where"),
    "rnn": (lambda: nn.RNN(9, 9, nonlinearity="relu"), "hidden relu"), "lstm": (lambda: nn.LSTM(9, 9), "hidden "),
}  # fmt: skip


@pytest.mark.parametrize("name", BENDS)
@pytest.mark.parametrize("at", [0.0, 0.3])
def test_a_map_that_bends_without_an_activation_in_sight_is_refused(name, at):
    """At 0 an odd function has no second difference, and a homogeneous one none to one side."""
    make, called = BENDS[name]
    module = make()

    def fn(x):
        output = module(x)
        return output[0] if isinstance(output, tuple) else output

    with pytest.raises(RuntimeError, match=f"no activation that depends on x was seen, and the function is not affine.*{called}"):
        local_complexity(fn, at * randn(1, 9), 0.1)
