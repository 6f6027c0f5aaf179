"""Guidance against memorisation: exact gradients, and samples that are not flagged keep every bit."""

import math

import diffusers
import pytest
import torch
from branches import two_branch_call, two_branches
from tiny import SCALED_LINEAR, ddpm_pipeline, dit_call, dit_pipeline, pixel_call, randn, sd_call, sd_pipeline

from diffusers_geometry.exact import GaussianDenoiser
from diffusers_geometry.guidance import GeometryGuidance, guided
from diffusers_geometry.mitigation import MemorizationObjective
from diffusers_geometry.objectives import GuidedStep
from diffusers_geometry.schedule import NoiseLevel

WHOLE = {"start": 0, "stop": 1}
LOWERED = {**WHOLE, "normalize": False, "trust_radius": math.inf}


def gaussians(dim, rank):
    """(conditional of low rank, unconditional), random."""
    factors = [randn(dim, r, seed=s).double() / math.sqrt(dim) for r, s in ((rank, 1), (dim, 2))]
    return [GaussianDenoiser(f @ f.T, randn(dim, seed=s).double()) for f, s in zip(factors, (3, 4), strict=True)]


def exact_step(alpha, sigma, x_t):
    c, u = (e.at(alpha, sigma) for e in gaussians(6, 2))
    level = NoiseLevel(alpha, sigma, 1 / alpha, -sigma / alpha, 1.0, 0.0)
    return GuidedStep(
        x_t,
        c.denoised(x_t),
        level,
        None,
        {"conditional": c, "unconditional": u}.get,
        lambda n: {"conditional": c, "unconditional": u}[n].denoised(x_t),
    )


@pytest.mark.parametrize(("alpha", "sigma"), [(0.3, math.sqrt(0.91)), (0.8, 0.6), (1.0, 2.0)])
def test_the_gradient_is_that_of_the_guidance_norm(alpha, sigma):
    x_t = randn(3, 6, seed=5).double()
    found = MemorizationObjective([True, False, True]).evaluate(exact_step(alpha, sigma, x_t))
    eye = torch.eye(6, dtype=torch.float64)
    (c, u), precisions = gaussians(6, 2), []
    for exact in (c, u):
        covariance = exact.directions @ exact.variances.diag() @ exact.directions.T
        precisions.append(torch.linalg.inv(alpha**2 * covariance + sigma**2 * eye))
    for i, x in enumerate(x_t):
        difference = sigma * (precisions[0] @ (x - alpha * c.mean) - precisions[1] @ (x - alpha * u.mean))
        assert found.value[i].item() == pytest.approx(difference.norm().item(), rel=1e-9)
        slope = alpha * sigma * (precisions[0] - precisions[1]) @ difference / difference.norm()
        torch.testing.assert_close(found.gradient[i], slope if i != 1 else torch.zeros_like(x))


def test_a_threshold_spares_what_is_below():
    step = exact_step(0.8, 0.6, randn(3, 6, seed=5).double())
    values = MemorizationObjective().evaluate(step).value
    limit = values.sort().values[:2].mean().item()
    for threshold in (limit, lambda sigma: limit + 0 * sigma):
        found = MemorizationObjective(threshold=threshold).evaluate(step)
        assert torch.equal(found.gradient.flatten(1).any(dim=1), values > limit)
        assert torch.equal(found.value, values)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: diffusers.DDIMScheduler(**SCALED_LINEAR, clip_sample=False),
        lambda: diffusers.DDIMScheduler(**SCALED_LINEAR, clip_sample=False, prediction_type="v_prediction"),
        lambda: diffusers.EulerDiscreteScheduler(**SCALED_LINEAR),
        lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=["DDIM", "DDIM-v", "Euler", "flow"],
)
def test_following_the_estimates_lowers_the_guidance_scale_of_flagged_samples(scheduler):
    """To 1.5 as the pipeline itself does it, and to 0, where the unconditional branch is left."""
    exact = gaussians(256, 20)
    pipe = two_branches(*exact, scheduler())
    plain, lower = (pipe(**two_branch_call(3, guidance_scale=w)).images for w in (3.0, 1.5))
    flagged = [False, True, True]
    with guided(pipe, GeometryGuidance(MemorizationObjective(flagged, follow="estimates"), scale=-1.5, **LOWERED)):
        mixed = pipe(**two_branch_call(3)).images
    assert torch.equal(mixed[0], plain[0])
    torch.testing.assert_close(mixed[1:], lower[1:], atol=2e-4, rtol=2e-4)
    assert (plain[1:] - lower[1:]).abs().max() > 0.1
    free = two_branches(exact[1], exact[1], scheduler())(**two_branch_call(3)).images
    with guided(pipe, GeometryGuidance(MemorizationObjective(follow="estimates"), scale=-3.0, **LOWERED)):
        torch.testing.assert_close(pipe(**two_branch_call(3)).images, free, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("follow", ["score", "estimates"])
@pytest.mark.parametrize("name", ["SD", "DiT"])
def test_samples_that_are_not_flagged_keep_every_bit(name, follow):
    make, call = {
        "SD": (sd_pipeline, lambda: sd_call(3, output_type="latent", generator=torch.Generator().manual_seed(0))),
        "DiT": (dit_pipeline, lambda: dit_call(class_labels=[3, 4, 5], generator=torch.Generator().manual_seed(0))),
    }[name]
    pipe = make()
    plain = torch.as_tensor(pipe(**call()).images)
    with guided(pipe, GeometryGuidance(MemorizationObjective([True, False, True], follow=follow), scale=-2.0, **WHOLE)) as run:
        found = torch.as_tensor(pipe(**call()).images)
    assert torch.equal(found[1], plain[1])
    assert not torch.equal(found[0], plain[0])
    assert not torch.equal(found[2], plain[2])
    assert all(log.shift[1] == 0 and log.shift[0] > 0 for log in run.log)


def test_the_score_falls_where_it_is_flagged_and_with_the_scale():
    pipe, values = two_branches(*gaussians(256, 20), diffusers.DDIMScheduler(**SCALED_LINEAR, clip_sample=False)), []
    for scale in (-1e-6, -2.0, -6.0):
        guidance = GeometryGuidance(MemorizationObjective([True, False]), scale=scale, trust="noise", **WHOLE)
        with guided(pipe, guidance) as run:
            pipe(**two_branch_call(2))
        values.append([log.value[0].item() for log in run.log])
    assert values[0][0] == pytest.approx(values[2][0], rel=1e-5)  # before anything was shifted
    assert all(a > b > c for a, b, c in zip(*(v[1:] for v in values), strict=True))


def test_refusals():
    with pytest.raises(ValueError, match="follow='leader'"):
        MemorizationObjective(follow="leader")
    with pytest.raises(ValueError, match="positive spread"):
        MemorizationObjective(spread=0)
    pipe = sd_pipeline()
    with (
        guided(pipe, GeometryGuidance(MemorizationObjective([True]), **WHOLE)),
        pytest.raises(ValueError, match="flagged has 1 entries. Expected 2, one per sample"),
    ):
        pipe(**sd_call(2))
    pixels = ddpm_pipeline()
    with guided(pixels, GeometryGuidance(MemorizationObjective(), **WHOLE)), pytest.raises(ValueError, match="Expected two"):
        pixels(**pixel_call())
