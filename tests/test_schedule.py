"""Every scheduler family and prediction type against the host: add_noise, pred_original_sample, and a run that must land."""

import copy
import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch

from diffusers_geometry.schedule import KNOWN_SCHEDULERS, loop_length, loop_position, noise_level, scheduler_family

SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
POINT = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8

CASES = [(name, {"prediction_type": p}) for name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
         for p in ("epsilon", "v_prediction")]  # fmt: skip
for prediction in ("epsilon", "sample", "v_prediction"):
    CASES += [(name, {"prediction_type": prediction, "clip_sample": False}) for name in ("DDPMScheduler", "DDIMScheduler",
              "DDPMParallelScheduler", "DDIMParallelScheduler", "TCDScheduler", "LCMScheduler")]  # fmt: skip
    CASES += [(name, {"prediction_type": prediction}) for name in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
              "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")]  # fmt: skip
    CASES += [(name, {"prediction_type": prediction, "use_karras_sigmas": True}) for name in ("DPMSolverMultistepScheduler",
              "EulerDiscreteScheduler", "UniPCMultistepScheduler")]  # fmt: skip
    if prediction != "sample":  # not implemented by these in diffusers
        CASES += [(name, {"prediction_type": prediction}) for name in ("EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler",
                  "HeunDiscreteScheduler", "KDPM2DiscreteScheduler")]  # fmt: skip
        CASES += [("PNDMScheduler", {"prediction_type": prediction, "skip_prk_steps": True})]
CASES += [(name, {"shift": shift}) for name in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
          "FlowMatchLCMScheduler") for shift in (1.0, 3.0)]  # fmt: skip
CASES += [(name, {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}) for name in
          ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
           "DPMSolverSinglestepScheduler")]  # fmt: skip
CASES += [("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False,
                             "timestep_spacing": "trailing"}), ("DDPMScheduler", {})]  # fmt: skip
CASES += [(name, {"prediction_type": p, "clip_sample": False}) for name in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
          for p in ("epsilon", "v_prediction")]  # fmt: skip
CASES += [("DDPMWuerstchenScheduler", {}), ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True})]
# These end at a positive sigma and so keep sigma_end epsilon, or re-noise at the end by design.
ENDS_NOISY = {"PNDMScheduler", "DEISMultistepScheduler", "LCMScheduler", "TCDScheduler", "CogVideoXDPMScheduler",
              "DDPMWuerstchenScheduler"}  # fmt: skip


def make(name, config, steps=10):
    cls = getattr(diffusers, name)
    base = {} if name.startswith(("EDM", "FlowMatch", "DDPMW")) else SCALED_LINEAR
    scheduler = cls(**{k: v for k, v in {**base, **config}.items() if k in inspect.signature(cls).parameters})
    scheduler.set_timesteps(steps)
    return scheduler


def host_step(scheduler, output, i, x, **options):
    """One step of the host from loop position i, whatever its signature."""
    t = scheduler.timesteps[i]
    if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):  # first order: nothing is known of the step before
        back = scheduler.timesteps[i - 1] if i else None
        return SimpleNamespace(prev_sample=scheduler.step(output, None, t, back, x, **options)[0])
    return scheduler.step(output, t[None] if isinstance(scheduler, diffusers.DDPMWuerstchenScheduler) else t, x, **options)


def identify(case):
    return f"{case[0].removesuffix('Scheduler')}-" + "-".join(str(v) for v in case[1].values())


@pytest.fixture(params=CASES, ids=identify)
def case(request):
    return request.param


def test_every_known_scheduler_is_tested():
    assert set(KNOWN_SCHEDULERS) == {name for name, _ in CASES}


def test_noise_added_by_the_host(case):
    if case[1].get("invert_sigmas"):
        pytest.skip("the host's scale_noise does not know that its sigmas are inverted")
    generator = torch.Generator().manual_seed(1)
    x_0, epsilon = (torch.randn(1, 3, 4, 4, generator=generator) for _ in range(2))
    count = loop_length(make(*case))
    for i in (0, count // 3, count - 1):
        scheduler = make(*case)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(i)
        timestep = scheduler.timesteps[i : i + 1]
        if case[0].startswith("KDPM2") and i % 2 == 1:
            continue  # add_noise knows only the whole steps; the landing test holds the half ones
        noisy = (
            scheduler.add_noise(x_0, epsilon, timestep)
            if hasattr(scheduler, "add_noise")
            else scheduler.scale_noise(x_0, timestep, epsilon)
        )
        level = noise_level(scheduler, i)
        torch.testing.assert_close(noisy, level.alpha_t * x_0 + level.sigma_t * epsilon, rtol=2e-6, atol=2e-6)


def test_sampler_lands_on_the_point_of_a_delta_distribution(case):
    """x_0 = a x + b o solved for o, at every position; then the host's own steps must end at the point."""
    scheduler, generator = make(*case), torch.Generator().manual_seed(2)
    x = torch.randn(POINT.shape, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    levels = [noise_level(scheduler, i) for i in range(loop_length(scheduler))]
    step_options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for i, (level, t) in enumerate(zip(levels, scheduler.timesteps, strict=False)):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        torch.testing.assert_close(seen, level.c_in * x, rtol=1e-5, atol=1e-6)
        x = host_step(scheduler, (POINT - level.a * x) / level.b, i, x, **step_options).prev_sample
    tolerance = 6 * levels[-1].sigma_t if case[0] in ENDS_NOISY else 2e-6
    assert (x - POINT).abs().max() < tolerance


def test_predicted_clean_sample_of_the_host(case):
    if case[0] in ("LCMScheduler", "TCDScheduler"):
        pytest.skip("their pred_original_sample / denoised carries boundary coefficients of consistency models")
    scheduler, generator = make(*case), torch.Generator().manual_seed(3)
    clipped = getattr(scheduler.config, "clip_sample", False)
    checked = 0
    for i in range(len(scheduler.timesteps) - 1):
        if case[0].startswith("KDPM2") and i % 2 == 1:
            continue  # a half step of the host needs the state that its first half left
        scheduler.is_scale_input_called = True
        x, output = (torch.randn(POINT.shape, generator=generator) for _ in range(2))
        host = copy.deepcopy(scheduler)
        if hasattr(host, "_step_index"):
            host._step_index = i
        predicted = getattr(host_step(host, output, i, x), "pred_original_sample", None)
        if predicted is None:
            continue
        level = noise_level(scheduler, i)
        expected = level.a * x + level.b * output
        expected = expected.clamp(-1, 1) if clipped else expected
        torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-5)
        checked += 1
    if not checked:
        pytest.skip("the host offers no pred_original_sample here")


@pytest.mark.parametrize("name", ["CMStochasticIterativeScheduler", "ScoreSdeVeScheduler", "SCMScheduler", "DDIMInverseScheduler"])
def test_unknown_scheduler_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"{name} is not a scheduler whose noise levels are known.*Swap it"):
        scheduler_family(getattr(diffusers, name)())


def test_subclass_of_a_known_scheduler_is_known():
    class Mine(diffusers.DDIMScheduler):
        pass

    assert scheduler_family(Mine()) == "alphas_cumprod"


def test_bad_positions_and_predictions_are_refused():
    scheduler = make("DDIMScheduler", {})
    with pytest.raises(ValueError, match=r"i=10. Expected 0 <= i < 10"):
        noise_level(scheduler, 10)
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="alpha_t=0 with prediction_type='epsilon'"):
        noise_level(make("DDIMScheduler", zero_snr), 0)


def test_loop_position_of_late_starts():
    scheduler = make("DDIMScheduler", {})
    assert loop_position(scheduler, scheduler.timesteps[4], 0) == 4
    assert loop_position(scheduler, scheduler.timesteps[4], 4) == 4
    with pytest.raises(RuntimeError, match="found 0 times"):
        loop_position(scheduler, 3.5, 0)
