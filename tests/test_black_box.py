"""Networks that give no gradients: products by differences, on one function and in a pipeline."""

import numpy as np
import pytest
import torch
from tiny import ddpm_pipeline, pixel_call, randn
from torch import nn

from diffusers_geometry import Denoiser, Jacobian, estimate_trace, golub_kahan_spectrum, record, with_geometry
from diffusers_geometry.budget import STEP_PRODUCTS
from diffusers_geometry.dimension import flipd
from diffusers_geometry.exact import LinearManifoldDenoiser, MixtureDenoiser
from diffusers_geometry.selfcheck import exact_network
from diffusers_geometry.spectrum import dense_spectrum

BASIS = torch.linalg.qr(randn(64, 8, seed=1).double())[0]
MANIFOLD = LinearManifoldDenoiser(BASIS, torch.tensor([4.0] * 4 + [0.25] * 4))


def black_box(fn):
    """The same function in NumPy's hands: no graph survives."""
    return lambda x: torch.from_numpy(fn(torch.from_numpy(x.numpy())).detach().numpy())


class Session(nn.Module):
    """A network behind an inference session: NumPy in, NumPy out."""

    def __init__(self, network):
        super().__init__()
        self._run, self.config, self.dtype, self.device = [network], network.config, network.dtype, network.device

    def forward(self, sample, timestep, **kwargs):
        with torch.no_grad():
            output = self._run[0](torch.from_numpy(sample.detach().numpy().copy()), timestep).sample.numpy()
        return type(self._run[0](sample.detach(), timestep))(sample=torch.from_numpy(output))


def pipeline():
    pipe = ddpm_pipeline()
    pipe.unet = Session(exact_network(MANIFOLD, pipe.scheduler, like=pipe.unet)).eval()
    return with_geometry(pipe)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_products_of_a_black_box(sigma):
    mean = torch.zeros(2, 16).double()
    mean[0, 0], mean[1, 0] = 1.0, -1.0
    exact = MixtureDenoiser(mean, 0.04 * torch.eye(16).double().expand(2, 16, 16)).at(1.0, sigma)
    x = 0.1 * randn(16)
    truth = exact.jacobian(x.double()).dense()
    denoiser = Denoiser(black_box(exact.denoised), alpha_t=1.0, sigma_t=sigma)
    jacobian = denoiser.jacobian(x, derivative="difference")
    error = (jacobian.dense().double() - truth).norm(dim=0).max()
    assert error < 2e-3 * truth.norm()
    assert error < 4 * jacobian.step_error
    assert jacobian.backend == "difference"
    assert jacobian.products == 16
    assert 0 < jacobian.step_products <= STEP_PRODUCTS
    v = 7 * randn(3, 16, seed=4)
    torch.testing.assert_close(jacobian.jvp(v).double(), v.double() @ truth.T, rtol=5e-3, atol=5e-3)
    found = dense_spectrum(denoiser.jacobian(x, derivative="difference"))
    assert (found.singular_values - torch.linalg.svdvals(truth)).abs().max() <= found.bound
    trace = estimate_trace(denoiser.jacobian(x, derivative="difference"), num_products=16)
    assert abs(trace.value - truth.trace().item()) <= trace.bias
    assert flipd(denoiser, x, derivative="difference").value == pytest.approx(flipd(exact, x.double()).value, abs=2e-2)


def test_reverse_products_need_the_users_word_that_j_is_symmetric():
    denoiser = Denoiser(black_box(MANIFOLD.at(1.0, 0.5).denoised), alpha_t=1.0, sigma_t=0.5)
    x = randn(64)
    for method in (lambda j: j.vjp(x), lambda j: golub_kahan_spectrum(j, 4)):
        with pytest.raises(TypeError, match="no reverse products. Expected .* symmetric=True where you know"):
            method(denoiser.jacobian(x, derivative="difference"))
    found = golub_kahan_spectrum(denoiser.jacobian(x, derivative="difference", symmetric=True), 8)
    truth = torch.tensor([4 / 4.25] * 4 + [0.5] * 4).double()
    assert (found.singular_values - truth).abs().max() < 2e-3
    assert ((found.singular_values - truth).abs() <= found.bounds).all()


def test_a_black_box_pipeline_is_refused_unless_it_is_declared():
    pipe = pipeline()
    with pytest.raises(RuntimeError, match="For a black box pass derivative='difference'"):
        pipe.analyze_geometry(**pixel_call(generator=seeded()), record_steps=[2], progress=False)


@pytest.mark.parametrize("engine", ["auto", "replay", "drive"])
@pytest.mark.parametrize("options", [{}, {"spectrum": "golub_kahan", "symmetric": True, "num_singular_values": 8}])
def test_a_black_box_pipeline(engine, options):
    pipe = pipeline()
    request = {"record_steps": [3, 5], "derivative": "difference", "probe_engine": engine, "progress": False, "flipd": True}
    trace = pipe.analyze_geometry(**pixel_call(generator=seeded()), **request, **options)
    for step in trace.steps:
        shares = np.array([4.0] * 4 + [0.25] * 4)
        shares = shares / (shares + step.sigma**2)
        assert step.singular_values[0, :8] == pytest.approx(shares, abs=3e-3)
        assert step.effective_dimension.value[0] == pytest.approx(shares.sum(), abs=4 * step.effective_dimension.sem[0] + 2e-2)
        assert step.backend == "difference"
        assert step.engine == ("replay" if engine == "replay" else "drive")
        assert (step.refusal is not None) == (engine == "auto")
        assert np.isfinite(step.flipd.value[0])
        assert step.products <= trace.settings["plan"]["products"]
    assert trace.steps[0].details["step"] > 0


def test_recording_a_black_box_gives_its_denoiser():
    pipe = pipeline()
    with record(pipe, [3], derivative="difference") as recording:
        pipe(**pixel_call(generator=seeded()))
    step = recording[0]
    matrix = step.denoiser.jacobian(step.sample[0], derivative="difference").dense()
    assert isinstance(step.denoiser.jacobian(step.sample[0]), Jacobian)
    assert matrix.trace().item() == pytest.approx(sum(v / (v + step.sigma**2) for v in [4.0] * 4 + [0.25] * 4), abs=2e-2)
    with pytest.raises(ValueError, match="derivative='none'"):
        record(pipe, derivative="none")
