"""The self-check passes on what is right, and says where on what is broken on purpose."""

import json

import diffusers
import pytest
import torch
from catalogue import CASES
from flow import flux, flux_call
from tiny import SCALED_LINEAR, ddpm_pipeline, dit_call, dit_pipeline, pixel_call, sd_call, sd_pipeline

from diffusers_geometry import cli, schedule
from diffusers_geometry.bundled import DIGITS
from diffusers_geometry.selfcheck import selfcheck


def seeded():
    return torch.Generator().manual_seed(0)


PASSING = {
    "DDPM": (ddpm_pipeline, pixel_call),
    "DDIM behind DDPM": (lambda: ddpm_pipeline(diffusers.DDIMScheduler(clip_sample=False)), pixel_call),
    "SD DDIM": (sd_pipeline, sd_call),
    "SD Euler v": (lambda: sd_pipeline(diffusers.EulerDiscreteScheduler(**SCALED_LINEAR, prediction_type="v_prediction")), sd_call),
    "SD DPM++ v": (
        lambda: sd_pipeline(diffusers.DPMSolverMultistepScheduler(**SCALED_LINEAR, prediction_type="v_prediction")),
        sd_call,
    ),
    "SD flow": (
        lambda: sd_pipeline(
            diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0)
        ),
        sd_call,
    ),
    "SD rescaled": (sd_pipeline, lambda: sd_call(guidance_rescale=0.7)),
    "DiT": (dit_pipeline, dit_call),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_is_right_passes(name):
    make, call = PASSING[name]
    pipe = make()
    pipe(**call(), generator=seeded())
    components, inside = dict(pipe.components), set(pipe.scheduler.__dict__)
    result = selfcheck(pipe, **call(), generator=seeded())
    assert result, result.table()
    assert {c.what for c in result.checks} >= {
        "own network again", "alpha x_0 + sigma noise", "scheduler reads x_0", "certificate", "eigenvalues of D'",
        "largest of D'", "trace of D'", "sample off the manifold", "FLIPD",
    }  # fmt: skip
    assert dict(pipe.components) == components
    assert set(pipe.scheduler.__dict__) == inside


def corrupted_levels(monkeypatch, change):
    """Breaks how every part of the package reads noise levels."""
    import diffusers_geometry.capture
    import diffusers_geometry.exact_network

    def corrupted(scheduler, i, right=schedule.noise_level):
        level = right(scheduler, i)
        return type(level)(**vars(level) | change(level))

    for module in (diffusers_geometry.capture, diffusers_geometry.exact_network):
        monkeypatch.setattr(module, "noise_level", corrupted)


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_corrupted_noise_levels_fail_even_where_everything_agrees(monkeypatch, factor):
    """The exact network and the estimators share the corruption, so that only the scheduler itself can tell."""
    corrupted_levels(monkeypatch, lambda level: {"sigma_t": level.sigma_t * factor, "b": level.b * factor})
    result = selfcheck(sd_pipeline(), **sd_call(), generator=seeded())
    assert not result
    assert "alpha x_0 + sigma noise" in {c.what for c in result.failed}
    assert "FAIL" in result.table()
    assert "answers are wrong" in result.table()


V_PREDICTION = {
    "DDIM": lambda **o: diffusers.DDIMScheduler(**o, clip_sample=False),
    "DDPM": diffusers.DDPMScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "EulerA": diffusers.EulerAncestralDiscreteScheduler,
    "DPM++": diffusers.DPMSolverMultistepScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
}


@pytest.mark.parametrize("name", V_PREDICTION)
@pytest.mark.parametrize("misread", [False, True])
def test_a_misread_prediction_type_fails(monkeypatch, name, misread):
    """v read as epsilon by every part of the package: levels are right and everything agrees but the scheduler."""
    pipe = sd_pipeline(V_PREDICTION[name](**SCALED_LINEAR, prediction_type="v_prediction"))
    if misread:
        corrupted_levels(monkeypatch, lambda level: {"a": 1 / level.alpha_t, "b": -level.sigma_t / level.alpha_t})
    result = selfcheck(pipe, **sd_call(), generator=seeded())
    assert bool(result) is not misread, result.table()
    assert not misread or "scheduler reads x_0" in {c.what for c in result.failed}


def test_a_scheduler_whose_alphas_were_changed_fails():
    """The user's own scheduler adds noise by one table and steps by another."""
    pipe = sd_pipeline()
    scheduler = pipe.scheduler
    right = scheduler.alphas_cumprod.clone()

    class Broken(type(scheduler)):
        def add_noise(self, x_0, noise, timesteps):
            self.alphas_cumprod, kept = right * 0.9, self.alphas_cumprod
            noisy = super().add_noise(x_0, noise, timesteps)
            self.alphas_cumprod = kept
            return noisy

    scheduler.__class__ = Broken
    result = selfcheck(pipe, **sd_call(), generator=seeded())
    assert {c.what for c in result.failed} == {"alpha x_0 + sigma noise"}


def scaled_table(pipe):
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod * 0.9


def scaled_sigmas(pipe):
    class Scaled(type(pipe.scheduler)):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.sigmas = self.sigmas * 1.3

    pipe.scheduler.__class__ = Scaled


@pytest.mark.parametrize(
    ("scheduler", "corrupt"), [("DDIMScheduler", scaled_table), ("EulerDiscreteScheduler", scaled_sigmas),
                               ("DPMSolverMultistepScheduler", scaled_sigmas)],
)  # fmt: skip
def test_a_scheduler_that_is_wrong_throughout_fails(scheduler, corrupt):
    """It adds noise, steps and reads by one corrupted table; only a new one of its class differs."""
    pipe = sd_pipeline(getattr(diffusers, scheduler)(**SCALED_LINEAR))
    assert selfcheck(pipe, **sd_call(), generator=seeded())
    corrupt(pipe)
    result = selfcheck(pipe, **sd_call(), generator=seeded())
    assert "noise level" in {c.what for c in result.failed}


@pytest.mark.parametrize("steps", [10, 50])
def test_runs_that_end_noisy_pass(steps):
    """Stable Diffusion's released configuration ends at sigma = 0.029."""
    pipe = sd_pipeline(diffusers.DDIMScheduler(**SCALED_LINEAR, clip_sample=False, set_alpha_to_one=False))
    result = selfcheck(pipe, **sd_call(num_inference_steps=steps), generator=seeded())
    assert result, result.table()


def test_a_step_cache_fails_by_name():
    pipe = flux(num_layers=2, num_single_layers=2)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
    result = selfcheck(pipe, **flux_call(pipe), generator=seeded())
    assert pipe.transformer.is_cache_enabled
    failed = result.failed[0]
    assert (failed.what, failed.where) == ("no step cache", "transformer")
    assert "disable_cache()" in result.table()


def test_a_callback_that_moves_the_conditioning_fails():
    def shift(pipe, i, t, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * (1 + 0.1 * i)}

    options = {"callback_on_step_end": shift, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    result = selfcheck(sd_pipeline(), **sd_call(), **options, generator=seeded())
    failed = [c for c in result.failed if c.what == "own network again"]
    assert failed
    assert "cannot be evaluated again" in failed[0].failure


def test_command_line(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        cli.main(["selfcheck", str(DIGITS), "--steps", "10"])
    assert ended.value.code == 0
    assert "every answer is the known one" in capsys.readouterr().out
    corrupted_levels(monkeypatch, lambda level: {"sigma_t": level.sigma_t * 1.05, "b": level.b * 1.05})
    with pytest.raises(SystemExit) as ended:
        cli.main(["selfcheck", "--steps", "10", "--json"])
    assert ended.value.code == 1
    rows = json.loads(capsys.readouterr().out)
    assert any(not row["passed"] for row in rows)


CLASSES = ("IFPipeline", "StableDiffusionControlNetPipeline", "StableCascadePriorPipeline", "HunyuanDiTPipeline",
           "CogVideoXPipeline", "AuraFlowPipeline", "Lumina2Pipeline", "ZImagePipeline", "WanPipeline two networks",
           "MochiPipeline", "StableAudioPipeline")  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_other_families_pass(name):
    """Learned variances, second networks, times in [0, 1], channels that are frames, timesteps that run backwards, other signs."""
    case = next(c for c in CASES if c.name == name)
    pipe = case.build()
    result = selfcheck(pipe, **case.arguments(pipe), generator=seeded())
    assert result, result.table()


def test_a_network_that_sees_more_than_the_sample_is_refused():
    case = next(c for c in CASES if c.name == "StableDiffusionInpaintPipeline")
    pipe = case.build()
    with pytest.raises(ValueError, match="is given the scheduler's sample alone.*Expected a network that sees c_in x"):
        selfcheck(pipe, **case.arguments(pipe), generator=seeded())
