"""What follows a step: the maps "decoded", "decoder" and "sampled" against what the pipeline itself makes, and closed forms."""

import diffusers
import numpy as np
import pytest
import torch
from tiny import PIPELINES, SCALED_LINEAR, ddpm_pipeline, dit_call, dit_pipeline, pixel_call, randn, sd_call, sd_pipeline

from diffusers_geometry import Denoiser, record, with_geometry
from diffusers_geometry.continuation import Continuation
from diffusers_geometry.exact import GaussianDenoiser
from diffusers_geometry.schedule import noise_level
from diffusers_geometry.selfcheck import exact_network

DETERMINISTIC = {
    "DDIM": lambda: diffusers.DDIMScheduler(**SCALED_LINEAR, clip_sample=False),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**SCALED_LINEAR),
    "DPM++": lambda: diffusers.DPMSolverMultistepScheduler(**SCALED_LINEAR),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**SCALED_LINEAR),
    "PNDM": lambda: diffusers.PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=True),
}


def recorded(pipe, call, steps=3):
    with record(pipe, steps) as recording:
        output = pipe(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    return recording, output


@pytest.mark.parametrize(
    ("case", "output_type"),
    [("SD-Euler", "np"), ("SD-Euler", "latent"), ("SD-PNDM", "np"), ("SD-rescaled", "latent"), ("DiT", "np")],
)
def test_decoding_the_final_sample_gives_the_pipelines_own_image(case, output_type):
    make, call, _ = PIPELINES[case]
    pipe = make()
    _, images = recorded(pipe, call(output_type="np"))
    recording, _ = recorded(pipe, call(output_type=output_type))
    x_0 = recording.final_sample[:1]
    decoded = recording[0].denoiser.continuation.decode(x_0)[0]
    ours = (decoded / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours, images[0], atol=1e-6)


@pytest.mark.parametrize("case", ["SD-DDIM", "SD-rescaled", "DiT"])
def test_the_chain_rule_holds_between_the_maps(case):
    """d image / dy = (d image / dx_0) D', each by its own products; the decoder's against the autoencoder's own derivative."""
    make, call, _ = PIPELINES[case]
    pipe = make()
    recording, _ = recorded(pipe, call())
    step = recording[1]
    denoiser, x_t = step.denoiser.select(0), step.sample[0]
    decoded, decoder, denoised = (denoiser.jacobian(x_t, of).dense() for of in ("decoded", "decoder", "denoised"))
    scaling = pipe.vae.config.scaling_factor
    torch.testing.assert_close(decoded, decoder @ denoised / scaling, rtol=1e-3, atol=1e-5 * float(decoded.abs().max()))
    z = denoiser.denoised(x_t[None])[0].detach() / scaling
    own = torch.func.jacrev(lambda z: pipe.vae.decode(z[None]).sample[0])(z).reshape(decoder.shape)
    torch.testing.assert_close(decoder, own, rtol=1e-3, atol=1e-5 * float(own.abs().max()))


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("position", [0, 3, -2])
def test_sampling_a_gaussian_has_the_gain_of_its_steps(name, position):
    """An exact Gaussian's sampler is linear. Its gain along each axis is what the real scheduler does to that axis alone."""
    variances = torch.linspace(0.1, 3.0, 256, dtype=torch.float64)
    pipe = sd_pipeline(DETERMINISTIC[name]())
    pipe.unet = exact_network(GaussianDenoiser(torch.diag(variances)), pipe.scheduler, like=pipe.unet)
    recording, _ = recorded(pipe, sd_call(num_inference_steps=8, guidance_scale=1.0), [position])
    step = recording[0]
    measured = step.denoiser.select(0).jacobian(step.sample[0], "sampled").dense().double()
    torch.testing.assert_close(measured, torch.diag(measured.diagonal()), rtol=0, atol=1e-4 * float(measured.abs().max()))
    if name in ("DDIM", "Euler"):  # one-step solvers without a memory: the gain is a product
        gain = step.sigma_t * torch.ones_like(variances)
        levels = [noise_level(pipe.scheduler, i) for i in range(step.index, len(pipe.scheduler.timesteps))]
        last = (
            (float(pipe.scheduler.final_alpha_cumprod) ** 0.5, float((1 - pipe.scheduler.final_alpha_cumprod) ** 0.5))
            if (name == "DDIM")
            else (1.0, 0.0)
        )
        after = [*[(level.alpha_t, level.sigma_t) for level in levels[1:]], last]
        for level, (alpha_t, sigma_t) in zip(levels, after, strict=True):
            power = level.alpha_t**2 * variances + level.sigma_t**2
            kept, noise = level.alpha_t * variances / power, level.sigma_t / power
            gain = (alpha_t * kept + sigma_t * noise) * gain
        torch.testing.assert_close(measured.diagonal(), gain, rtol=2e-4, atol=1e-6)
    h, axis = 0.1, 17
    pair = [step.sample.clone(), step.sample.clone()]
    pair[0].view(-1)[axis] += h
    pair[1].view(-1)[axis] -= h
    ends = [step.ending.continuation().sample(x_t) for x_t in pair]
    difference = (ends[0] - ends[1]).flatten()[axis] / (2 * h) * step.sigma_t
    assert float(difference) == pytest.approx(float(measured[axis, axis]), rel=1e-3)


def test_one_sampler_has_one_spectrum_whatever_the_scheduler_scales():
    """The same steps behind DDIM (variance preserving) and Euler (exploding) decide by the same noise."""
    spectra = []
    for name in ("DDIM", "Euler"):
        options = {"timestep_spacing": "leading", **SCALED_LINEAR}
        extra = {"clip_sample": False, "set_alpha_to_one": True} if name == "DDIM" else {}
        scheduler = getattr(diffusers, f"{name}{'' if name == 'DDIM' else 'Discrete'}Scheduler")(**options, **extra)
        pipe = sd_pipeline(scheduler)
        recording, _ = recorded(pipe, sd_call(height=8, width=8, num_inference_steps=5), [2])
        step = recording[0]
        x_t = randn(4, 4, 4, seed=5) * (1 + step.sigma**2) ** 0.5 * step.alpha_t
        spectra.append(torch.linalg.svdvals(step.denoiser.select(0).jacobian(x_t, "sampled").dense()))
    torch.testing.assert_close(*spectra, rtol=1e-3, atol=1e-4 * float(spectra[0][0]))


def test_stochastic_samplers_are_no_map():
    recording, _ = recorded(sd_pipeline(diffusers.EulerAncestralDiscreteScheduler(**SCALED_LINEAR)), sd_call())
    with pytest.raises(RuntimeError, match="draws noise. Expected a deterministic sampler"):
        recording[0].denoiser.select(0).jacobian(recording[0].sample[0], "sampled")


def test_a_moved_sampler_is_noticed():
    """Break it on purpose: a callback that moves the sample makes the run end elsewhere than sampling on does."""
    pipe = sd_pipeline(DETERMINISTIC["DDIM"]())

    def push(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * 1.05}

    with record(pipe, [1]) as recording:
        pipe(**sd_call(), generator=torch.Generator().manual_seed(0), callback_on_step_end=push)
    with pytest.raises(RuntimeError, match="ends .* away from where StableDiffusionPipeline ended"):
        recording[0].denoiser.select(0).jacobian(recording[0].sample[0], "sampled")


@pytest.mark.parametrize("of", ["decoded", "decoder", "sampled"])
def test_every_sample_of_a_batch_has_its_own_ending(of):
    pipe = sd_pipeline(DETERMINISTIC["DDIM"]())
    pair = sd_call(2)
    latents = randn(2, 4, 8, 8, seed=9)
    spectra = []
    for rows in (slice(0, 2), slice(1, 2)):
        call = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in pair.items()}
        with record(pipe, [2]) as recording:
            pipe(**call, latents=latents[rows].clone())
        step = recording[0]
        jacobian = step.denoiser.select(len(step.sample) - 1).jacobian(step.sample[-1], of)
        v = randn(3, *jacobian.x.shape, seed=2)
        spectra.append(jacobian.jvp(v))
        u = randn(3, *jacobian.value.shape, seed=3)
        torch.testing.assert_close((spectra[-1] * u).sum(), (jacobian.vjp(u) * v).sum(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*spectra, rtol=1e-3, atol=1e-5 * float(spectra[0].abs().max()))


@pytest.mark.parametrize("of", ["decoded", "decoder", "sampled"])
@pytest.mark.parametrize("method", ["dense", "golub_kahan"])
def test_traces_hold_shapes_units_and_both_spectra(of, method):
    pipe = with_geometry(sd_pipeline(DETERMINISTIC["DDIM"]()))
    plain = sd_call(height=8, width=8)
    options = {"record_steps": [2], "progress": False, "spectrum": method}
    if method == "golub_kahan":
        options |= {"num_singular_values": 4, "max_products": 500}
    trace = pipe.analyze_geometry(**plain, generator=torch.Generator().manual_seed(0), of=of, **options)
    reference = pipe.analyze_geometry(**plain, generator=torch.Generator().manual_seed(0), record_steps=[2], progress=False)
    step = trace.steps[0]
    outputs = {"sampled": [4, 4, 4]}.get(of, [3, 8, 8])
    assert (step.details["input_shape"], step.details["output_shape"]) == ([4, 4, 4], outputs)
    assert "per" in trace.settings["units"]
    kept = step.denoised_singular_values.shape[1]
    np.testing.assert_allclose(
        step.denoised_singular_values, reference.steps[0].denoised_singular_values[:, :kept], rtol=2e-3, atol=1e-5
    )
    with record(pipe, [2]) as recording:
        pipe(**plain, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(recording[0].denoiser.select(0).jacobian(recording[0].sample[0], of).dense())
    found = step.singular_values[0]
    np.testing.assert_allclose(found, exact[: len(found)], rtol=2e-3, atol=1e-5 * float(exact[0]))
    assert step.products <= trace.settings["plan"]["products"]


def test_pixel_models_are_their_own_image():
    pipe = ddpm_pipeline(diffusers.DDIMScheduler(clip_sample=False))
    recording, _ = recorded(pipe, pixel_call())
    denoiser, x_t = recording[1].denoiser.select(0), recording[1].sample[0]
    torch.testing.assert_close(denoiser.jacobian(x_t, "decoded").dense(), denoiser.jacobian(x_t, "denoised").dense())
    with pytest.raises(ValueError, match="DDPMPipeline has no decoder"):
        denoiser.jacobian(x_t, "decoder").dense()


def test_a_generator_by_hand():
    weight = randn(5, 3)
    continuation = Continuation.from_decoder(lambda z: z @ weight.T)
    denoiser = Denoiser.from_function(lambda x: 0 * x, alpha_t=1.0, sigma_t=0.5, continuation=continuation)
    torch.testing.assert_close(denoiser.jacobian(randn(3), "decoder").dense(), weight)
    torch.testing.assert_close(denoiser.jacobian(randn(3), "decoded").dense(), weight)
    with pytest.raises(ValueError, match="has no such map"):
        denoiser.jacobian(randn(3), "sampled")


def test_what_is_not_known_is_refused():
    alone = Denoiser.from_function(lambda x: x, alpha_t=1.0, sigma_t=0.5)
    with pytest.raises(ValueError, match="needs to know what follows this step"):
        alone.jacobian(randn(3), "decoded")
    pipe = with_geometry(dit_pipeline())
    with pytest.raises(ValueError, match="Expected 'auto', 'dense', 'golub_kahan' or 'randomized'"):
        pipe.analyze_geometry(**dit_call(), of="decoded", spectrum="central_difference", progress=False)
    recording, _ = recorded(sd_pipeline(), sd_call())
    conditional = recording[0].branch("conditional").select(0)
    with pytest.raises(ValueError, match="Expected branch='guided'"):
        conditional.jacobian(recording[0].sample[0], "sampled")
    assert conditional.jacobian(recording[0].sample[0], "decoded").value.shape == (3, 16, 16)


def test_half_precision_decoders_are_probed_in_float32_and_left_alone():
    pipe = sd_pipeline(DETERMINISTIC["DDIM"]()).to(torch.bfloat16)
    pipe.vae.config.force_upcast  # noqa: B018 - the decoder must not be upcast for good by a probe
    before = {name: (p.dtype, p.data_ptr()) for name, p in pipe.vae.named_parameters()}
    recording, _ = recorded(pipe, sd_call(output_type="pt"), [2])
    jacobian = recording[0].denoiser.select(0).jacobian(recording[0].sample[0].float(), "decoded")
    u, v = randn(3, 16, 16), randn(4, 8, 8)
    assert float((jacobian.jvp(v) * u).sum()) == pytest.approx(float((jacobian.vjp(u) * v).sum()), rel=1e-3)
    assert {name: (p.dtype, p.data_ptr()) for name, p in pipe.vae.named_parameters()} == before


def test_a_decoder_that_cuts_its_gradient_is_noticed():
    """Half of the path runs under no_grad: products are finite, adjoint, and wrong."""
    weight, other = randn(5, 3), randn(5, 3, seed=1)

    def decoder(z):
        with torch.no_grad():
            hidden = z @ other.T
        return z @ weight.T + hidden

    denoiser = Denoiser.from_function(lambda x: 0.5 * x, alpha_t=1.0, sigma_t=0.5, continuation=Continuation.from_decoder(decoder))
    for of in ("decoder", "decoded"):
        with pytest.raises(RuntimeError, match=f"the derivative of of='{of}' differs"):
            denoiser.jacobian(randn(3), of)
