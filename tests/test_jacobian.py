"""Products against the float64 Jacobian of real (tiny) diffusers networks, and against torch's own jacrev."""

import copy

import pytest
import torch
from tiny import dit, randn, sd_unet, unet2d
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_geometry import Denoiser, Jacobian
from diffusers_geometry.forward_mode import forward_mode

EMBEDDING = randn(1, 5, 8, seed=3)


def wrap(name, network, dtype=torch.float32):
    """(batched map, point) of a tiny network at one timestep."""
    network = copy.deepcopy(network).to(dtype)
    if name == "UNet2D":
        return lambda x: network(x, 300).sample, randn(1, 8, 8).to(dtype)
    if name == "SD":
        return lambda x: network(x, 300, EMBEDDING.to(dtype).expand(len(x), 5, 8)).sample, randn(4, 8, 8).to(dtype)
    return (
        lambda x: network(x, timestep=torch.full((len(x),), 300), class_labels=torch.full((len(x),), 3)).sample[:, :4],
        randn(4, 8, 8).to(dtype),
    )


NETWORKS = {"UNet2D": unet2d, "SD": sd_unet, "DiT": dit}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    module = NETWORKS[request.param]()
    fn, x = wrap(request.param, module, torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        truth = torch.autograd.functional.jacobian(lambda p: fn(p[None])[0], x).reshape(x.numel(), x.numel())
    return (*wrap(request.param, module), truth)


def relative(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def test_dense_against_float64_autograd(network):
    fn, x, truth = network
    jacobian = Jacobian(lambda p: fn(p[None])[0], x, batched_fn=fn)
    assert relative(jacobian.dense(), truth) < 1e-5
    assert jacobian.products == x.numel()
    assert jacobian.backend == "vmap_vjp"
    assert jacobian.fallback_reason is None


def test_stacks_of_products_and_the_adjoint_identity(network):
    fn, x, truth = network
    jacobian = Jacobian(lambda p: fn(p[None])[0], x, chunk_size=3)
    u, v = randn(5, *x.shape, seed=1), randn(5, *x.shape, seed=2)
    forward, reverse = jacobian.jvp(v), jacobian.vjp(u)
    assert jacobian.products == 10
    assert relative(forward.flatten(1), v.flatten(1).double() @ truth.T) < 1e-5
    assert relative(reverse.flatten(1), u.flatten(1).double() @ truth) < 1e-5
    inner = (u * forward).flatten(1).sum(dim=1)
    adjoint = (reverse * v).flatten(1).sum(dim=1)
    torch.testing.assert_close(inner, adjoint, rtol=1e-4, atol=1e-5 * float(u.norm() * forward.norm()))
    torch.testing.assert_close(jacobian.jvp(v[0]), forward[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(jacobian.vjp(u[0]), reverse[0], rtol=1e-4, atol=1e-5)


def test_both_fallbacks_give_the_same_matrix(network):
    fn, x, truth = network
    rows = torch.eye(x.numel())[:7].reshape(7, *x.shape)
    for batched, name in ((fn, "stacked_grad"), (None, "looped_grad")):
        jacobian = Jacobian(lambda p: fn(p[None])[0], x, batched_fn=batched)
        jacobian._fall_back(RuntimeError("NYI"))
        assert relative(jacobian.vjp(rows).flatten(1), truth[:7]) < 1e-5
        assert jacobian.backend == name
        assert "NYI" in jacobian.fallback_reason


def test_what_torch_cannot_vmap_falls_back_and_says_so():
    """Gradient checkpointing refuses vmap over its saved-tensor hooks; the products stay right."""
    from torch.utils.checkpoint import checkpoint

    weight = randn(6, 6).double()

    def fn(x):
        return checkpoint(lambda p: torch.tanh(p @ weight), x, use_reentrant=False)

    x = randn(6, seed=1).double()
    jacobian = Jacobian(fn, x)
    found = jacobian.dense()
    torch.testing.assert_close(found, (1 - torch.tanh(x @ weight) ** 2)[:, None] * weight.T)
    assert jacobian.backend == "looped_grad"
    assert jacobian.fallback_reason


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 7), (7, 3)])
def test_rectangular_maps_use_their_smaller_side(inputs, outputs):
    weight = randn(outputs, inputs).double()
    jacobian = Jacobian(lambda x: torch.sin(weight @ x), randn(inputs, seed=1).double(), chunk_size=2)
    found = jacobian.dense()
    torch.testing.assert_close(found, torch.cos(weight @ jacobian.x)[:, None] * weight)
    assert jacobian.shape == (outputs, inputs)
    assert jacobian.products == 3


def test_forward_mode_leaves_no_switch_turned():
    before = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    with forward_mode():
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Jacobian(torch.sin, torch.zeros(3).half()), TypeError, "x has dtype torch.float16. Expected float32"),
        (lambda: Jacobian(torch.log, -torch.ones(3)).dense(), FloatingPointError, "function at x has 3 non-finite entries of 3"),
        (lambda: Jacobian(torch.sqrt, torch.zeros(2)).dense(), FloatingPointError, "reverse product has"),
        (lambda: Jacobian(torch.sin, torch.zeros(3)).vjp(torch.zeros(2)), ValueError, r"u has shape \(2,\). Expected \(3,\)"),
        (lambda: Jacobian(torch.sin, torch.zeros(3), chunk_size=0), ValueError, "chunk_size=0"),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("of", ["denoised", "score", "epsilon"])
def test_every_map_of_every_prediction_is_the_same_denoiser(prediction_type, of):
    """theory.md 0.1: a linear denoiser written as each kind of prediction has one D', one J and one epsilon Jacobian."""
    alpha_t, sigma_t = (0.8, 0.6) if prediction_type != "flow_prediction" else (0.4, 0.6)
    variances = torch.tensor([3.0, 0.5, 0.0], dtype=torch.float64)
    gain = alpha_t * variances / (alpha_t**2 * variances + sigma_t**2)
    predictions = {
        "epsilon": lambda x: (x - alpha_t * gain * x) / sigma_t,
        "sample": lambda x: gain * x,
        "v_prediction": lambda x: alpha_t * (x - alpha_t * gain * x) / sigma_t - sigma_t * gain * x,
        "flow_prediction": lambda x: (x - alpha_t * gain * x) / sigma_t - gain * x,
    }
    denoiser = Denoiser.from_function(
        predictions[prediction_type], alpha_t=alpha_t, sigma_t=sigma_t, prediction_type=prediction_type
    )
    x_t, sigma = torch.ones(3, dtype=torch.float64), sigma_t / alpha_t
    denoised = variances / (variances + sigma**2)
    expected = {"denoised": denoised, "score": (denoised - 1) / sigma**2, "epsilon": (1 - denoised) / sigma}[of]
    found = denoiser.jacobian(x_t, of).dense()
    torch.testing.assert_close(found, torch.diag(expected))
    torch.testing.assert_close(denoiser.as_denoised(found, torch.eye(3).double(), of), torch.diag(denoised))
    score = -(alpha_t**0) * x_t / (alpha_t**2 * variances + sigma_t**2)
    torch.testing.assert_close(denoiser.score(x_t[None])[0], score)
    torch.testing.assert_close(denoiser.epsilon(x_t[None])[0], -sigma_t * score)


@pytest.mark.parametrize("of", ["denoised", "score", "epsilon"])
def test_pure_noise_gives_zero_and_not_a_division(of):
    denoiser = Denoiser.from_function(lambda x: -torch.tanh(x), alpha_t=0.0, sigma_t=1.0, prediction_type="v_prediction")
    found = denoiser.jacobian(torch.ones(3), of).dense()
    assert found.count_nonzero() == 0
    assert denoiser.as_denoised(found, torch.eye(3), of).count_nonzero() == 0
    assert denoiser.sigma == float("inf")


def test_variance_exploding_v_prediction_is_the_normalised_one():
    sigma = 2.0
    denoiser = Denoiser.from_function(lambda x: 0 * x, alpha_t=1.0, sigma_t=sigma, prediction_type="v_prediction")
    torch.testing.assert_close(denoiser.denoised(torch.ones(1, 3)), torch.full((1, 3), 1 / (1 + sigma**2)))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="prediction_type='noise'. Expected one of"):
        Denoiser.from_function(torch.sin, alpha_t=1.0, sigma_t=1.0, prediction_type="noise")
    with pytest.raises(ValueError, match="of='psi'. Expected one of"):
        Denoiser.from_function(torch.sin, alpha_t=1.0, sigma_t=1.0).jacobian(torch.zeros(3), "psi")
    with pytest.raises(ValueError, match="alpha_t=0 with prediction_type='epsilon'"):
        Denoiser.from_function(torch.sin, alpha_t=0.0, sigma_t=1.0)


@pytest.mark.parametrize("options", [
    {}, {"stride": 2}, {"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (2, 1)}, {"groups": 2},
    {"stride": (3, 2), "padding": 2}, {"padding": "same"},
])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_forward_products_through_every_kind_of_convolution(options, bias):
    """The backward that is written out must be the transposed convolution for every geometry."""
    groups = options.get("groups", 1)
    weight, shift = randn(6, 4 // groups, 3, 3).double(), randn(6, seed=1).double() if bias else None

    def fn(x):
        return torch.nn.functional.conv2d(torch.sin(x)[None], weight, shift, **options)[0]

    x = randn(4, 9, 8, seed=2).double()
    jacobian, v = Jacobian(fn, x), randn(3, 4, 9, 8, seed=3).double()
    found = jacobian.jvp(v)
    assert jacobian.forward_backend == "double_vjp"
    expected = torch.stack([torch.func.jvp(fn, (x,), (t,))[1] for t in v])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_forward_products_fall_back_and_say_so():
    class Once(torch.autograd.Function):
        """Has a forward derivative and a backward that cannot be differentiated again."""

        @staticmethod
        def forward(x):
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

        @staticmethod
        def jvp(ctx, tangent):
            return 2 * ctx.saved_tensors[0] * tangent

        @staticmethod
        def vmap(info, in_dims, x):
            return Once.apply(x), in_dims[0]

    x = randn(5).double()
    jacobian = Jacobian(Once.apply, x)
    torch.testing.assert_close(jacobian.jvp(torch.eye(5).double()), torch.diag(2 * x))
    assert jacobian.forward_backend in ("vmap_jvp", "looped_jvp")
    assert jacobian.forward_fallback_reason
