"""Guidance: where an exact denoiser makes the answer known, and that it leaves no trace."""

import math

import catalogue
import diffusers
import numpy as np
import pytest
import torch
from exact_loop import FIXED, loop
from tiny import (
    PIPELINES,
    SCALED_LINEAR,
    ddpm_pipeline,
    dit_call,
    dit_pipeline,
    pixel_call,
    randn,
    sd_call,
    sd_pipeline,
    vae,
)

from diffusers_geometry import record, with_geometry
from diffusers_geometry.descriptors import local_scaling
from diffusers_geometry.exact import GaussianDenoiser, MixtureDenoiser
from diffusers_geometry.guidance import GeometryGuidance, guided
from diffusers_geometry.objectives import FunctionObjective, GuidedStep, PsiObjective, WeightedObjective
from diffusers_geometry.schedule import NoiseLevel
from diffusers_geometry.selfcheck import exact_network
from diffusers_geometry.spectrum import dense_spectrum

LINEAR = {"beta_start": 1e-4, "beta_end": 2e-2}
SCHEDULERS = {
    "DDPM": (lambda **o: diffusers.DDPMScheduler(clip_sample=False, **LINEAR, **o), 2e-5),
    "DDIM": (lambda **o: diffusers.DDIMScheduler(**FIXED, **o), 2e-5),
    "Euler": (lambda **o: diffusers.EulerDiscreteScheduler(**SCALED_LINEAR, **o), 2e-5),
    "EulerAncestral": (lambda **o: diffusers.EulerAncestralDiscreteScheduler(**SCALED_LINEAR, **o), 2e-5),
    "Heun": (lambda **o: diffusers.HeunDiscreteScheduler(**SCALED_LINEAR, **o), 2e-5),
    "LMS": (lambda **o: diffusers.LMSDiscreteScheduler(**SCALED_LINEAR, **o), 2e-5),
    "KDPM2": (lambda **o: diffusers.KDPM2DiscreteScheduler(**SCALED_LINEAR, **o), 2e-5),
    "DPM++": (lambda **o: diffusers.DPMSolverMultistepScheduler(**SCALED_LINEAR, final_sigmas_type="zero", **o), 2e-5),
    "UniPC": (lambda **o: diffusers.UniPCMultistepScheduler(**SCALED_LINEAR, final_sigmas_type="zero", **o), 2e-5),
    "FlowEuler": (lambda **o: diffusers.FlowMatchEulerDiscreteScheduler(), 2e-5),
    "FlowHeun": (lambda **o: diffusers.FlowMatchHeunDiscreteScheduler(), 2e-5),
}
PREDICTIONS = {
    "Heun": ("epsilon", "v_prediction"), "FlowEuler": ("flow",), "FlowHeun": ("flow",), "LMS": ("epsilon", "v_prediction"),
    "EulerAncestral": ("epsilon", "v_prediction"), "KDPM2": ("epsilon", "v_prediction"), "Euler": ("epsilon", "v_prediction"),
}  # fmt: skip
CASES = [(name, p) for name in SCHEDULERS for p in PREDICTIONS.get(name, ("epsilon", "sample", "v_prediction"))]


def constant(wanted):
    """Guidance whose shift of x_0 is ``wanted`` at every step: the tilt of a linear function, its tau² divided out."""

    def objective(x_0, x_t, sigma):
        return (x_0 * wanted).flatten(1).sum(dim=1) * ((1 + sigma**2) / sigma**2 if math.isfinite(sigma) else 1.0)

    return GeometryGuidance(objective, scale=1.0, start=0, stop=1, normalize=False, trust_radius=math.inf)


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_a_constant_shift_of_x_0_is_the_shift_of_the_result(name, prediction):
    """Data that is one point: the sampler must land on it, and under guidance on it plus the shift."""
    make, tolerance = SCHEDULERS[name]
    scheduler = make(**({} if prediction == "flow" else {"prediction_type": prediction}))
    point, wanted = randn(9, seed=1), randn(1, 1, 3, 3, seed=2)
    pipe = loop(GaussianDenoiser(torch.zeros(9, 9), point), scheduler)
    noise = randn(2, 1, 3, 3, seed=3)
    plain = pipe(noise)
    torch.testing.assert_close(plain, point.reshape(1, 1, 3, 3).expand(2, 1, 3, 3), atol=tolerance, rtol=0)
    with guided(pipe, constant(wanted)) as run:
        shifted = pipe(noise)
    torch.testing.assert_close(shifted - plain, wanted.expand(2, 1, 3, 3), atol=2 * tolerance, rtol=0)
    assert len(run.log) == len(scheduler.timesteps)


def tall(x_0, x_t, sigma):
    return x_0.flatten(1)[:, 0] - 0.1 * x_t.flatten(1).square().sum(dim=1)


@pytest.mark.parametrize("name", list(PIPELINES))
def test_scale_0_is_bit_identical_and_scale_1_is_not(name):
    make, call, _ = PIPELINES[name]
    pipe = make()

    def run():
        torch.manual_seed(0)  # DiT has no generator for its scheduler
        return pipe(**call(generator=torch.Generator().manual_seed(0)))[0]

    plain = run()
    with guided(pipe, GeometryGuidance(tall, scale=0.0)) as unguided:
        assert np.array_equal(run(), plain)
    assert unguided.log == []
    with guided(pipe, GeometryGuidance(tall, scale=lambda progress: 0.0, trust="noise")):
        assert np.array_equal(run(), plain)
    with guided(pipe, GeometryGuidance(tall, scale=1.0)) as steered:
        assert not np.array_equal(run(), plain)
    positions = [entry.position for entry in steered.log]
    total = len(pipe.scheduler.timesteps)
    assert positions == [i for i in range(total) if 0.2 <= i / (total - 1) <= 0.8]
    assert np.array_equal(run(), plain)
    assert "step" not in pipe.scheduler.__dict__
    assert "set_timesteps" not in pipe.scheduler.__dict__


def test_samples_of_a_batch_do_not_influence_one_another():
    pipe, noise = sd_pipeline(), randn(2, 4, 8, 8, seed=5)
    words = sd_call(2)
    guidance = GeometryGuidance(tall, scale=3.0, start=0, stop=1, trust_radius=0.5)

    def run(rows, **change):
        own = {k: v[rows] for k, v in words.items() if k.endswith("_embeds")}
        with guided(pipe, guidance):
            return pipe(**{**words, **own, "latents": noise[rows], "output_type": "latent"}, **change)[0]

    both = run(slice(None))
    for i in range(2):
        torch.testing.assert_close(run(slice(i, i + 1)), both[i : i + 1], atol=1e-5, rtol=1e-5)
    huge = noise.clone()
    huge[1] *= 100  # a neighbour with a gradient of another size
    with guided(pipe, guidance):
        beside = pipe(**{**words, "latents": huge, "output_type": "latent"})[0]
    torch.testing.assert_close(beside[0], both[0], atol=1e-5, rtol=1e-5)


def test_both_halves_of_a_doubled_batch_are_shifted_alike():
    """DiT puts [x, x] through its scheduler; the constant shift arrives in the one result there is."""
    scheduler = diffusers.DDIMScheduler(**FIXED)
    pipe, wanted = dit_pipeline(scheduler), 0.1 * randn(1, 4, 8, 8, seed=2)
    point = randn(256, seed=1)
    pipe.transformer = exact_network(GaussianDenoiser(torch.zeros(256, 256), point), scheduler, like=pipe.transformer)
    taken = []
    original = scheduler.step
    scheduler.step = lambda *args, **kwargs: taken.append(original(*args, **kwargs)) or taken[-1]
    with guided(pipe, constant(wanted)) as run:
        pipe(**dit_call(generator=torch.Generator().manual_seed(0)))
    final = taken[-1].prev_sample
    assert final.shape == (2, 4, 8, 8)
    torch.testing.assert_close(final, (point.reshape(1, 4, 8, 8) + wanted).expand(2, 4, 8, 8), atol=1e-4, rtol=0)
    assert run.log[0].value.shape == (1,)
    assert scheduler.__dict__["step"] is not original  # the user's own patch is still there


def test_the_trust_radius_and_the_target():
    level = NoiseLevel(alpha_t=0.8, sigma_t=0.6, a=1.25, b=-0.75, c_in=1.0, timestep=1.0)
    tau = 0.6  # sigma / sqrt(1 + sigma²) of a normalised pair
    x_t, denoised = randn(3, 5, seed=1), randn(3, 5, seed=2)
    step = GuidedStep(x_t, denoised, level)
    weights = randn(5, seed=3) * 7

    def value(x_0, x_t, sigma):
        return x_0 @ weights

    def shift(previous=None, scale=2.0, **options):
        return GeometryGuidance(value, **options).shift(step, scale, previous)[0]

    unit = weights / weights.norm()
    torch.testing.assert_close(shift(trust="noise"), (2 * tau * unit).expand(3, 5))
    torch.testing.assert_close(shift(trust="noise", scale=-2.0), (-2 * tau * unit).expand(3, 5))
    torch.testing.assert_close(shift(trust="noise", normalize=False, trust_radius=1e9), (2 * tau**2 * weights).expand(3, 5))
    cut = shift(trust="noise", trust_radius=0.1)
    torch.testing.assert_close(cut.norm(dim=1), torch.full((3,), 0.1 * tau * math.sqrt(5)))
    moved = denoised + torch.tensor([0.0, 0.01, 100.0])[:, None]
    lengths = shift(previous=moved, trust_radius=0.5).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([0.0, 0.5 * 0.01 * math.sqrt(5), 2 * tau]), rtol=1e-4, atol=1e-6)
    target = (denoised @ weights)[0].item()
    aimed = shift(trust="noise", target=target)
    assert aimed[0].norm() < 1e-5
    assert (((denoised[1:] + aimed[1:]) @ weights - target).abs() < (denoised[1:] @ weights - target).abs()).all()


def test_a_tilted_gaussian_moves_as_its_closed_form_says():
    """The tilt exp(s V) of Gaussian data moves the mean by s C grad V. The flow starts from noise that was not moved, so that
    y - (moved mean) shrinks from sigma_max as sqrt(v + sigma²) along each axis, and the rest arrives."""
    variance = torch.tensor([1.0, 0.3, 0.1, 0.05])
    exact, direction = GaussianDenoiser(torch.diag(variance)), torch.tensor([1.0, 1.0, 0.0, 0.0])
    pipe, noise = loop(exact, diffusers.DDIMScheduler(**FIXED)), randn(200, 4, seed=7)

    def value(x_0, x_t, sigma):  # E[V | x_t] in closed form; tau² is undone, so that the shift is the tilt's own sigma² grad
        alpha_t = 1 / math.sqrt(1 + sigma**2)
        return exact.denoised(x_t, alpha_t, sigma * alpha_t) @ direction * (1 + sigma**2)

    plain = pipe(noise, 500)
    with guided(pipe, GeometryGuidance(value, 1.5, 0, 1, normalize=False, trust_radius=math.inf)) as run:
        moved = pipe(noise, 500) - plain
    kept = 1 - (variance / (variance + run.log[0].sigma ** 2)).sqrt()
    torch.testing.assert_close(moved, (1.5 * variance * direction * kept).expand(200, 4), atol=1e-4, rtol=0.01)


def test_the_exact_psi_gradient_agrees_with_differences():
    exact = MixtureDenoiser(randn(3, 6, seed=1), torch.stack([torch.diag(randn(6, seed=i).abs() + 0.1) for i in range(2, 5)]))
    for denoiser, x_t in ((exact.at(0.8, 0.6), randn(6, seed=9).double()), (recorded_denoiser(), None)):
        x_t = x_t if x_t is not None else denoiser[1]
        denoiser = denoiser[0] if isinstance(denoiser, tuple) else denoiser
        step = GuidedStep(x_t[None], x_t[None], level_of(denoiser), lambda i, d=denoiser: d)

        def psi(x, denoiser=denoiser):
            return local_scaling(dense_spectrum(denoiser.jacobian(x)), rank=4).value

        for method in ("dense", "golub_kahan"):
            found = PsiObjective(4, method).evaluate(step)
            assert found.value.item() == pytest.approx(psi(x_t), abs=1e-4)
            h = 1e-4 if x_t.dtype == torch.float64 else 2e-2
            for seed in (1, 2, 3):
                v = randn(*x_t.shape, seed=seed).to(x_t)
                difference = (psi(x_t + h * v) - psi(x_t - h * v)) / (2 * h)
                slope = ((found.gradient[0] / denoiser.alpha_t) * v).sum().item()
                size = (found.gradient.norm() / denoiser.alpha_t * v.norm()).item()
                assert abs(difference - slope) < (1e-5 if x_t.dtype == torch.float64 else 5e-3) * size


def level_of(denoiser):
    return NoiseLevel(denoiser.alpha_t, denoiser.sigma_t, 1.0, 1.0, 1.0, 0.0)


def recorded_denoiser():
    pipe = ddpm_pipeline()
    with record(pipe, [3]) as recording:
        pipe(**pixel_call(generator=torch.Generator().manual_seed(0)))
    return recording[0].denoiser.select(0), recording[0].sample[0]


@pytest.mark.parametrize(("make", "call"), [(ddpm_pipeline, pixel_call), (sd_pipeline, sd_call), (dit_pipeline, dit_call)])
def test_exact_psi_in_a_pipeline_is_that_of_the_recorded_denoiser(make, call):
    """Guided by psi itself, the value logged at a step is that of the denoiser recorded there, which is the model's own."""
    pipe = make()
    guidance = GeometryGuidance(PsiObjective(3, "golub_kahan"), scale=1.0, start=0.5, stop=0.7)
    with guided(pipe, guidance) as run, record(pipe, [3, 4]) as recording:
        pipe(**call(generator=torch.Generator().manual_seed(0)))
    assert [entry.position for entry in run.log] == [3]
    step = recording[0]
    assert step.engine == "replay"
    spectrum = dense_spectrum(step.denoiser.select(0).jacobian(step.sample[0]))
    assert run.log[0].value[0].item() == pytest.approx(local_scaling(spectrum, rank=3).value, abs=2e-3)
    with record(pipe, [4]) as plain:
        pipe(**call(generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(plain[0].sample, recording[1].sample)
    assert all(not module._forward_hooks for module in pipe.components.values() if isinstance(module, torch.nn.Module))


def test_weighted_objectives_are_in_units_of_their_spread():
    step = GuidedStep(randn(2, 3, seed=1), randn(2, 3, seed=2), level_of(GaussianDenoiser(torch.eye(3)).at(0.8, 0.6)))
    parts = [(FunctionObjective(lambda x_0, x_t, s: x_0[:, 0] * 10, spread=10), 2.0), (lambda x_0, x_t, s: x_0[:, 1], -1.0)]
    found = WeightedObjective(parts).evaluate(step)
    torch.testing.assert_close(found.value, 2 * step.denoised[:, 0] - step.denoised[:, 1])
    torch.testing.assert_close(found.gradient, torch.tensor([[2.0, -1.0, 0.0]]).expand(2, 3))


def test_a_scorer_of_decoded_images_as_the_hook_for_clip():
    """A vision model from transformers, tiny and random, scores the decoded clean estimate."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **sizes)).eval()
    pipe = sd_pipeline()
    decoder = vae()

    def score(x_0, x_t, sigma):
        return vision(decoder.decode(x_0).sample).pooler_output[:, 0]

    with guided(pipe, GeometryGuidance(score, scale=5.0, start=0, stop=1, trust="noise")) as up:
        pipe(**sd_call(generator=torch.Generator().manual_seed(0)))
    with guided(pipe, GeometryGuidance(score, scale=-5.0, start=0, stop=1, trust="noise")) as down:
        pipe(**sd_call(generator=torch.Generator().manual_seed(0)))
    assert up.log[-1].value.item() > down.log[-1].value.item() + 1e-3


def test_guided_runs_can_be_analysed_and_geometry_pipelines_generate():
    pipe = with_geometry(ddpm_pipeline())
    call = {"num_inference_steps": 6, "output_type": "np"}
    guidance = GeometryGuidance(tall, scale=4.0)
    images = pipe.generate_with_geometry(1, torch.Generator().manual_seed(0), guidance=guidance, **call).images
    with guided(pipe, guidance):
        trace = pipe.analyze_geometry(generator=torch.Generator().manual_seed(0), record_steps=[2, 3], progress=False, **call)
    assert np.array_equal(trace.images, images)
    assert {step.engine for step in trace.steps} == {"replay"}
    assert not np.array_equal(pipe(generator=torch.Generator().manual_seed(0), **call).images, images)


def test_every_call_in_the_block_starts_anew():
    """The trust radius looks at the estimate of the step before, which must not be that of the call before."""
    pipe, guidance = ddpm_pipeline(), GeometryGuidance(tall, scale=3.0, start=0, stop=1)

    def images():
        return pipe(**pixel_call(generator=torch.Generator().manual_seed(0))).images

    with guided(pipe, guidance):
        alone = images()
    with guided(pipe, guidance) as run:
        assert np.array_equal(images(), alone)
        assert np.array_equal(images(), alone)
    assert len(run.log) == 6


def test_nothing_is_left_patched_after_an_exception():
    pipe = ddpm_pipeline()
    before = dict(pipe.scheduler.__dict__)

    def broken(x_0, x_t, sigma):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError), guided(pipe, GeometryGuidance(broken)):
        pipe(**pixel_call())
    assert set(pipe.scheduler.__dict__) - set(before) <= {"num_inference_steps", "timesteps", "custom_timesteps"}
    assert "step" not in pipe.scheduler.__dict__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeometryGuidance(tall, start=0.9, stop=0.1), "start=0.9, stop=0.1. Expected 0 <= start <= stop <= 1"),
        (lambda: GeometryGuidance(tall, trust="me"), "trust='me'.*Expected 'update' or 'noise'"),
        (lambda: GeometryGuidance(tall, scale=math.nan), "scale=nan. Expected a finite number"),
        (lambda: GeometryGuidance(tall, target=1.0, target_bin=3), "target=1.0, target_bin=3. Expected one of them"),
        (lambda: GeometryGuidance(tall, target_bin=3), "target_bin=3 with a function. Expected a GeometryReward"),
        (lambda: GeometryGuidance([]), "no objectives. Expected at least one"),
        (lambda: PsiObjective(0), "rank=0, method='dense'. Expected a positive rank"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_use_is_refused():
    pipe = ddpm_pipeline()
    with pytest.raises(TypeError, match="objective is a int. Expected a GeometryReward"):
        GeometryGuidance(3)
    with pytest.raises(TypeError, match="guidance is a function. Expected GeometryGuidance"), guided(pipe, tall):
        pass
    with (
        guided(pipe, GeometryGuidance(tall)),
        pytest.raises(RuntimeError, match="guided already"),
        guided(pipe, GeometryGuidance(tall)),
    ):
        pass
    with (
        record(pipe),
        pytest.raises(RuntimeError, match="being recorded. Expected the recording inside"),
        guided(pipe, GeometryGuidance(tall)),
    ):
        pass
    refused = pytest.raises(ValueError, match=r"returned shape \(\). Expected a differentiable tensor of shape \(1,\)")
    with refused, guided(pipe, GeometryGuidance(lambda x_0, x_t, s: x_0.sum())):
        pipe(**pixel_call())
    with (
        pytest.raises(FloatingPointError, match="the objective's value"),
        guided(pipe, GeometryGuidance(lambda x, y, s: (x * math.nan).flatten(1).sum(1))),
    ):
        pipe(**pixel_call())
    with pytest.raises(ValueError, match=r"scale\(0.2\) = inf"), guided(pipe, GeometryGuidance(tall, scale=lambda p: math.inf)):
        pipe(**pixel_call())


@pytest.mark.parametrize("name", ["CogVideoXPipeline", "StableCascadeDecoderPipeline"])
def test_schedulers_with_steps_and_ends_of_their_own(name):
    """CogVideoX's DPM step names five arguments; Wuerstchen's last timestep is where the last step leads."""
    case = next(c for c in catalogue.CASES if c.name == name)
    ends = []
    for scale in (None, 0.0, 2.0):
        pipe = case.build()
        if case.schedulers:
            pipe.scheduler = case.schedulers[0](pipe)
        call = case.arguments(pipe) | {"generator": torch.Generator().manual_seed(0)}
        with record(pipe, [-1]) if scale is None else guided(pipe, GeometryGuidance(tall, scale, 0.0, 1.0)) as run:
            output = pipe(**call)[0]
        ends.append(torch.as_tensor(np.asarray(output)))
    assert len(run.log) == len(pipe.scheduler.timesteps) - (name == "StableCascadeDecoderPipeline")
    assert torch.equal(ends[0], ends[1])
    assert (ends[2] - ends[0]).abs().max() > 1e-3
