"""The pipeline's loop taken up at a later step: every solver must go on as if it had begun there."""

import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from behind import NO_CLIP, behind, latent, pixel, seeded
from tiny import ddpm_pipeline, dit_call, dit_pipeline, quiet, randn

from diffusers_geometry.clones import Parents, noised
from diffusers_geometry.exact import GaussianDenoiser
from diffusers_geometry.restart import Restart, Schedule

sys.path.append(str(Path(__file__).parent / "conformance"))
from catalogue import CASES

LOW_ORDER = 0.08  # of 40 steps of Euler's rule, in relative error of the ends
SOLVERS = {
    "DDIM": (pixel("DDIMScheduler", 8, **NO_CLIP), LOW_ORDER),
    "Euler": (latent("EulerDiscreteScheduler"), LOW_ORDER),
    "Heun": (latent("HeunDiscreteScheduler"), 0.003),
    "KDPM2": (latent("KDPM2DiscreteScheduler"), 0.015),
    "LMS": (latent("LMSDiscreteScheduler"), 0.003),
    "PNDM": (latent("PNDMScheduler", skip_prk_steps=True), 0.005),
    "DPM++": (pixel("DPMSolverMultistepScheduler", 8), 0.02),
    "DPM++ third order": (pixel("DPMSolverMultistepScheduler", 8, solver_order=3), 0.02),
    "UniPC": (latent("UniPCMultistepScheduler"), 0.05),
    "DEIS": (latent("DEISMultistepScheduler"), 0.03),
    "DPM singlestep": (pixel("DPMSolverSinglestepScheduler", 8, lower_order_final=True), 0.04),
    "flow": (pixel("FlowMatchEulerDiscreteScheduler", 8), LOW_ORDER),
    "flow Heun": (pixel("FlowMatchHeunDiscreteScheduler", 8), 0.003),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_restarts_as_if_it_began_there(name):
    """Of a Gaussian the flow from sigma to 0 multiplies a direction by sqrt(l / (l + sigma^2)), whatever came before."""
    make, tolerance = SOLVERS[name]
    variances = torch.tensor([4.0] * 32 + [0.25] * 32)
    pipe, call = behind(make, GaussianDenoiser(torch.diag(variances.double())), batch_size=3, num_inference_steps=40)
    schedule = Schedule.of(pipe, (), call)
    parents = Parents.run(pipe, (), call, schedule, schedule.branches(6), 3)
    for step, points in zip(parents.steps, parents.samples, strict=True):
        restart = Restart.at(step, schedule)
        ends, images = restart(points, parents.batch, seeded())
        assert images is None
        assert not restart.whole
        gain = (variances / (variances + step.sigma**2)).sqrt()
        found = (ends / (points / step.alpha_t)).reshape(3, 64)
        worst = (found / gain - 1).abs().max().item()
        assert worst < tolerance, f"sigma={step.sigma:.3g}: {worst:.3g}"


@pytest.mark.parametrize("name", ["DDIM", "Euler", "Heun", "KDPM2", "flow"])
def test_a_deterministic_run_taken_up_again_ends_where_it_ended(name):
    pipe, call = SOLVERS[name][0](batch_size=2, num_inference_steps=8)
    schedule = Schedule.of(pipe, (), call)
    parents = Parents.run(pipe, (), call, schedule, schedule.branches("all"), 2)
    assert len(parents.steps) == 7
    for step, points in zip(parents.steps, parents.samples, strict=True):
        ends, _ = Restart.at(step, schedule)(points, 2, seeded())
        assert torch.equal(ends, parents.finished)


def test_decoding_is_that_of_the_pipeline():
    for pipe, call in (
        latent("DDIMScheduler", **NO_CLIP)(2, num_inference_steps=4),
        (dit_pipeline(), dit_call(num_inference_steps=4)),
    ):
        schedule = Schedule.of(pipe, (), call)
        parents = Parents.run(pipe, (), call, schedule, schedule.branches(1), len(call.get("class_labels", "ab")))
        images = pipe(**call | {"generator": seeded()}).images
        parents = Parents.run(pipe, (), call | {"generator": seeded()}, schedule, schedule.branches(1), len(images))
        decoder = Restart(parents.steps[0].drive, schedule, len(schedule.timesteps))
        ends, decoded = decoder(parents.finished, parents.batch, seeded(), decode=True)
        assert torch.equal(ends, parents.finished)
        np.testing.assert_array_equal(decoded, images)


class IndexGuided(diffusers.DDPMPipeline):
    """A loop that weighs its network by the index of the step, as guidance windows do."""

    between = 0.0

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=8, output_type="np"):
        x = torch.randn(batch_size, 1, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        for i, t in enumerate(timesteps):
            weight = 1 + (i / num_inference_steps) ** 2
            x = self.scheduler.step(weight * self.unet(x, t).sample, t, x).prev_sample
            x = x + self.between * torch.randn(x.shape, generator=generator)
        return (x.numpy(),)


def test_a_loop_that_counts_is_run_whole():
    pipe = quiet(IndexGuided(ddpm_pipeline().unet, diffusers.DDIMScheduler(**NO_CLIP)))
    call = {"batch_size": 2, "generator": seeded()}
    schedule = Schedule.of(pipe, (), call)
    parents = Parents.run(pipe, (), call, schedule, schedule.branches([2, 5]), 2)
    restarts = [Restart.at(step, schedule) for step in parents.steps]
    assert [r.whole for r in restarts] == [True, True]
    for restart, points in zip(restarts, parents.samples, strict=True):
        assert torch.equal(restart(points, 2, seeded())[0], parents.finished)
    IndexGuided.between = 0.1
    try:
        with pytest.raises(RuntimeError, match="IndexGuided gives another model output when its sample is put in before step 5"):
            Restart.at(Parents.run(pipe, (), call, schedule, [5], 2).steps[0], schedule)
    finally:
        IndexGuided.between = 0.0


def test_u_turns_noise_as_the_scheduler_does():
    pipe, call = pixel("DDPMScheduler", **NO_CLIP)(batch_size=2, num_inference_steps=6)
    schedule = Schedule.of(pipe, (), call)
    step = Parents.run(pipe, (), call, schedule, schedule.branches([3]), 2).steps[0]
    x_0 = randn(2, 1, 4, 4, seed=9)
    epsilon = torch.randn(2, 1, 4, 4, generator=seeded(4))
    expected = pipe.scheduler.add_noise(x_0, epsilon, schedule.timesteps[3])
    torch.testing.assert_close(noised(x_0, step.level, seeded(4)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("StableDiffusionImg2ImgPipeline", True),  # starts late, so that its loop is not to be shortened
        ("StableDiffusionXLPipeline EDM", False),
        ("FluxPipeline true CFG", False),  # packed
        ("ZImagePipeline normalised", False),  # lists of samples, a negated output
        ("HunyuanVideoPipeline true CFG", False),
    ],
)
def test_pipelines_of_every_kind_are_taken_up_again(name, whole):
    case = next(case for case in CASES if case.name == name)
    pipe = case.build()
    call = case.arguments(pipe) | {"generator": seeded()}
    schedule = Schedule.of(pipe, (), call)
    positions = schedule.branches("all")
    parents = Parents.run(pipe, (), call, schedule, positions, 1)
    assert [step.index for step in parents.steps] == positions
    for step, points in zip(parents.steps, parents.samples, strict=True):
        restart = Restart.at(step, schedule)
        assert restart.whole is whole
        ends, _ = restart(points, parents.batch, seeded())
        torch.testing.assert_close(ends, parents.finished[:1], rtol=1e-5, atol=1e-5)
