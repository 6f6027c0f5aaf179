"""What users do to their networks around a probe: it must stay right or be refused, and nothing may stay changed."""

import copy
import pickle
import threading

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from tiny import SCALED_LINEAR, ddpm_pipeline, pixel_call, quiet, randn, sd_call, sd_pipeline

from diffusers_geometry import record, with_geometry
from diffusers_geometry.spectrum import dense_spectrum


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def values(pipe, position=2, **options):
    """Singular values of D' at one step of a seeded run, and the step."""
    with record(pipe, [position], **options) as recording:
        pipe(**pixel_call(generator=seeded()))
    step = recording[0]
    return dense_spectrum(step.denoiser.select(0).jacobian(step.sample[0].float())).singular_values, step


@pytest.fixture(scope="module")
def plain():
    return values(ddpm_pipeline())[0]


def offloaded(pipe):
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


def checkpointed(pipe):
    pipe.unet.enable_gradient_checkpointing()


def compiled(pipe):
    pipe.unet.compile(backend="eager")


@pytest.mark.parametrize("engine", ["replay", "drive"])
@pytest.mark.parametrize("change", [offloaded, checkpointed, compiled])
def test_changed_networks_have_the_same_spectrum(change, engine, plain):
    pipe = ddpm_pipeline()
    change(pipe)
    before = {name: (p.dtype, p.device.type) for name, p in pipe.unet.named_parameters()}
    found, step = values(pipe, engine=engine)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert step.engine == engine
    assert {name: (p.dtype, p.device.type) for name, p in pipe.unet.named_parameters()} == before
    if change is checkpointed:
        assert pipe.unet.is_gradient_checkpointing


def test_autocast_around_a_probe_does_not_touch_it(plain):
    pipe = ddpm_pipeline()
    with record(pipe, [2]) as recording:
        pipe(**pixel_call(generator=seeded()))
    with torch.autocast("cpu", torch.bfloat16):
        step = recording[0]
        found = dense_spectrum(step.denoiser.select(0).jacobian(step.sample[0])).singular_values
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_recording_under_autocast_probes_in_float32():
    pipe = ddpm_pipeline()
    with torch.autocast("cpu", torch.bfloat16):
        _, step = values(pipe)
    point = step.sample.float()
    expected = step.level.a * point + step.level.b * pipe.unet(point, step.timestep).sample
    torch.testing.assert_close(step.denoiser.denoised(point), expected, rtol=1e-5, atol=1e-5)


def test_threads_leave_half_precision_weights_as_they_are():
    pipe = ddpm_pipeline().to(torch.float16)
    with record(pipe, [1, 2]) as recording:
        pipe(**pixel_call(generator=seeded()))
    failures = []

    def probe(step):
        try:
            for _ in range(5):
                step.denoiser.denoised(step.sample.float())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=probe, args=(step,)) for step in recording]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float16}


def test_half_precision_probes_follow_the_weights():
    pipe = ddpm_pipeline().to(torch.float16)
    _, step = values(pipe)
    before = step.denoiser.denoised(step.sample.float())
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(2)
    assert not torch.equal(step.denoiser.denoised(step.sample.float()), before)
    pipe.unet.train()
    with pytest.raises(ValueError, match="put into train mode"):
        step.denoiser.denoised(step.sample.float())


def test_attention_processors_come_back_when_a_loop_is_left_early():
    base = sd_pipeline()
    pipe = quiet(diffusers.StableDiffusionPAGPipeline(**base.components, requires_safety_checker=False))
    before = dict(pipe.unet.attn_processors)
    with record(pipe, [2]) as recording:
        pipe(**sd_call(pag_scale=3.0))
    assert recording[0].engine in ("drive", "replay")
    after = pipe.unet.attn_processors
    assert {name: type(p) for name, p in after.items()} == {name: type(p) for name, p in before.items()}
    assert np.isfinite(base(**sd_call()).images).all()


def test_a_users_own_step_is_put_back():
    pipe, calls = ddpm_pipeline(), []
    original = pipe.scheduler.step

    def mine(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    pipe.scheduler.step = mine
    with record(pipe, 1):
        pipe(**pixel_call(generator=seeded()))
    assert pipe.scheduler.step is mine
    assert len(calls) == 6


def test_the_call_of_another_pipeline_is_noticed():
    pipe = ddpm_pipeline()
    geometry = with_geometry(pipe)
    with record(geometry, 1), pytest.raises(RuntimeError, match="Expected the call of the same object"):
        pipe(**pixel_call(generator=seeded()))
    with record(pipe, 1), pytest.raises(RuntimeError, match="is being recorded already"), record(geometry, 1):
        pass
    with record(pipe, 1), pytest.raises(TypeError, match="pipe is being recorded"):
        with_geometry(pipe)
    assert "step" not in pipe.scheduler.__dict__


def test_copies_made_while_recording_work_afterwards():
    pipe = ddpm_pipeline()
    with record(pipe, 1) as recording:
        duplicate = copy.deepcopy(pipe)
        expected = pipe(**pixel_call(generator=seeded())).images
    assert len(recording) == 1
    for _ in range(2):
        assert np.array_equal(duplicate(**pixel_call(generator=seeded())).images, expected)
    assert len(recording) == 1


def test_a_pipeline_that_copies_its_scheduler_is_recorded_once_a_step():
    class TwoStreams(diffusers.DDPMPipeline):
        @torch.no_grad()
        def __call__(self, generator=None, num_inference_steps=6, **kwargs):
            image, other = randn(1, 1, 8, 8), randn(1, 1, 4, 4, seed=1)
            self.scheduler.set_timesteps(num_inference_steps)
            twin = copy.deepcopy(self.scheduler)
            for t in self.scheduler.timesteps:
                image = self.scheduler.step(self.unet(image, t).sample, t, image, return_dict=False)[0]
                other = twin.step(other * 0.1, t, other, return_dict=False)[0]
            return image.numpy(), other.numpy()

    pipe = TwoStreams(ddpm_pipeline().unet, diffusers.DPMSolverMultistepScheduler())
    alone = pipe()
    with record(pipe, "all") as recording:
        recorded = pipe()
    assert len(recording) == 6
    assert all(np.array_equal(a, b) for a, b in zip(alone, recorded, strict=True))


def test_a_subclass_that_hands_its_arguments_on_is_understood():
    class Mine(diffusers.DDPMPipeline):
        def __call__(self, *args, **kwargs):
            return diffusers.DDPMPipeline.__call__.__wrapped__(self, *args, **kwargs)

    pipe = quiet(Mine(ddpm_pipeline().unet, diffusers.DDPMScheduler()))
    with record(pipe, [2]) as recording, torch.no_grad():
        pipe(1, seeded(), num_inference_steps=6, output_type="np")
    assert recording[0].certificate_error < 2e-5


def test_a_scheduler_that_does_not_fit_is_refused_by_both_engines():
    for engine in ("auto", "drive"):
        with record(ddpm_pipeline(diffusers.EulerDiscreteScheduler()), [1], engine=engine) as recording:
            recording.pipe(**pixel_call(generator=seeded()))
        with pytest.raises(RuntimeError, match="the pipeline and the scheduler do not fit together"):
            _ = recording[0].engine


def test_a_run_that_ends_early_is_reported():
    pipe = with_geometry(sd_pipeline())

    def stop(pipe, i, t, values):
        pipe._interrupt = i >= 1
        return values

    with pytest.raises(RuntimeError, match=r"ended after 2 of 6 steps, before \[5\] were recorded"):
        pipe.analyze_geometry(**sd_call(callback_on_step_end=stop), record_steps=[0, -1], progress=False)


def test_what_cannot_be_met_is_refused_before_the_generation_is_paid_for():
    pipe, steps = with_geometry(sd_pipeline()), []
    call = sd_call(callback_on_step_end=lambda pipe, i, t, values: steps.append(i) or values)
    with pytest.raises(ValueError, match="max_products=3 cannot be met"):
        pipe.analyze_geometry(**call, max_products=3, progress=False)
    assert steps == []


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("strength", [0.5, 0.95])
def test_image_to_image_starts_on_a_timestep_that_comes_twice(scheduler, strength):
    made = getattr(diffusers, scheduler)(**SCALED_LINEAR)
    base = sd_pipeline(made)
    pipe = quiet(diffusers.StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False))
    call = {k: v for k, v in sd_call(strength=strength, generator=seeded()).items() if k not in ("height", "width")}
    with record(pipe, "all") as recording:
        pipe(image=randn(1, 3, 16, 16).clamp(-1, 1) / 2 + 0.5, **call)
    assert [step.index for step in recording] == sorted({step.index for step in recording})
    assert recording[-1].index == len(pipe.scheduler.timesteps) - 1
    assert recording[0].certificate_error < 2e-5


def test_geometry_pipelines_can_be_pickled():
    pipe = with_geometry(ddpm_pipeline())
    loaded = pickle.loads(pickle.dumps(pipe))
    assert type(loaded) is type(pipe)
    assert np.array_equal(loaded(**pixel_call(generator=seeded())).images, pipe(**pixel_call(generator=seeded())).images)
