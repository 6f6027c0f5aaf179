"""Recording on real (tiny) pipelines: nothing changes, nothing stays, and what is recorded can be evaluated again."""

import diffusers
import numpy as np
import pytest
import torch
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
)

from diffusers_geometry import record
from diffusers_geometry.capture import resolve_steps
from diffusers_geometry.forward_mode import forward_mode


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def state_of(pipe):
    """Everything that recording might leave behind: instance attributes, class, hooks."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for c in pipe.components.values()
             if isinstance(c, torch.nn.Module) for m in c.modules()]  # fmt: skip
    return type(pipe), set(pipe.scheduler.__dict__) - {"step"}, "step" in pipe.scheduler.__dict__, hooks, set(pipe.__dict__)


@pytest.fixture(params=PIPELINES)
def case(request):
    make, call, engine = PIPELINES[request.param]
    return make(), call, engine


def test_images_are_identical_and_nothing_stays_patched(case):
    pipe, call, _ = case
    plain = pipe(**call(generator=seeded())).images
    before = state_of(pipe)
    generator = seeded()
    with record(pipe, 3) as recording:
        recorded = pipe(**call(generator=generator)).images
    assert np.array_equal(plain, recorded)
    assert state_of(pipe) == before
    left = generator.get_state()
    assert len(recording[0].denoiser.denoised(recording[0].sample)) == 1
    assert state_of(pipe) == before
    assert torch.equal(left, generator.get_state())
    assert np.array_equal(plain, pipe(**call(generator=seeded())).images)


def test_engines_certificates_and_derivatives(case):
    """drive is the pipeline bit for bit; the chosen engine is certified; forward and reverse products are adjoint."""
    pipe, call, engine = case
    with record(pipe, [0, 2, -1]) as recording:
        pipe(**call(generator=seeded()))
    assert [step.engine for step in recording] == [engine] * 3
    for step in recording:
        driven = step.drive.verified([step.sample])[0]
        assert torch.equal(driven, step.model_output)
        assert step.certificate_error < 3e-5
        assert (step.refusal is None) == (engine == "replay")
        x_0 = step.level.a * step.sample + step.level.b * step.model_output
        torch.testing.assert_close(step.denoiser.denoised(step.sample), x_0, rtol=1e-4, atol=1e-4 * float(x_0.abs().max()))
    step = recording[1]
    jacobian = step.denoiser.jacobian(step.sample[0], "epsilon")
    u, v = randn(*step.sample.shape[1:], seed=1), randn(*step.sample.shape[1:], seed=2)
    forward, reverse = jacobian.jvp(v), jacobian.vjp(u)
    assert (u * forward).sum().item() == pytest.approx((reverse * v).sum().item(), abs=1e-4 * float(forward.norm() * u.norm()))
    h = 0.03 * step.sigma_t
    ahead, behind = (step.denoiser.epsilon((step.sample[0] + s * h * v)[None])[0] for s in (1, -1))
    difference = (ahead - behind) / (2 * h) * step.alpha_t
    assert (difference - forward).norm() < 2e-2 * forward.norm()


def test_both_engines_give_the_same_jacobian():
    for make, call, _ in (PIPELINES["SD-Euler"], PIPELINES["DiT"], PIPELINES["DDPM"]):
        matrices = []
        for engine in ("replay", "drive"):
            pipe = make()
            with record(pipe, [2], engine=engine) as recording:
                pipe(**call(generator=seeded()))
            assert recording[0].engine == engine
            matrices.append(recording[0].denoiser.jacobian(recording[0].sample[0], "epsilon").dense())
        assert (matrices[0] - matrices[1]).norm() < 1e-4 * matrices[1].norm()


def test_replay_of_a_nonlinear_guidance_is_refused_and_would_have_been_wrong():
    """guidance_rescale agrees on the trajectory to rounding; its replayed derivative is per cents off."""
    pipe, call, _ = sd_pipeline(), sd_call(guidance_rescale=0.7), None
    with record(pipe, [1]) as recording:
        pipe(**call, generator=seeded())
    step = recording[0]
    assert step.engine == "drive"
    assert "replay" in step.refusal
    with record(pipe, [1], engine="replay") as forced:
        pipe(**call, generator=seeded())
    with pytest.raises(RuntimeError, match="differs from"):
        forced[0].denoiser  # noqa: B018


@pytest.mark.parametrize("batch", [2, 3])
def test_every_sample_of_a_batch_has_its_own_conditioning(batch):
    embeddings = randn(batch, 5, 8, seed=3)
    pipe, call = sd_pipeline(), sd_call(batch)
    with record(pipe, [1]) as recording:
        pipe(**call, generator=seeded())
    step = recording[0]
    together = step.denoiser.denoised(step.sample)
    for i in range(batch):
        alone = step.denoiser.select(i).denoised(step.sample[i : i + 1].expand(4, *step.sample.shape[1:]))
        assert (alone - together[i]).abs().max() < 1e-4 * together.abs().max()
    other = step.denoiser.select(0).denoised(step.sample[1:2])[0]
    assert (other - together[1]).abs().max() > 1e-3 * together.abs().max(), "conditioning must matter in this test"
    assert embeddings.shape[0] == len(step.sample)
    with pytest.raises(ValueError, match=rf"multiple of {batch}"):
        step.denoiser.denoised(step.sample[:1])


def test_samples_of_a_batch_through_the_driven_loop():
    pipe = sd_pipeline()
    with record(pipe, [1], engine="drive") as driven:
        pipe(**sd_call(2), generator=seeded())
    with record(pipe, [1], engine="replay") as replayed:
        pipe(**sd_call(2), generator=seeded())
    x = driven[0].sample[1]
    first, second = (r[0].denoiser.select(1).jacobian(x, "epsilon").dense() for r in (driven, replayed))
    assert (first - second).norm() < 1e-4 * second.norm()


def test_branches_combine_to_the_guided_jacobian():
    """D'_w = D'_u + w (D'_c - D'_u), and the conditional branch is a call with guidance_scale = 1."""
    for pipe, call, weight in ((sd_pipeline(), sd_call(), 7.5), (dit_pipeline(), dit_call(), 4.0)):
        with record(pipe, [2]) as recording:
            pipe(**call, generator=seeded())
        step, x = recording[0], recording[0].sample[0]
        guided, conditional, unconditional = (
            step.branch(name).jacobian(x, "epsilon").dense() for name in ("guided", "conditional", "unconditional")
        )
        combined = unconditional + weight * (conditional - unconditional)
        assert (guided - combined).norm() < 1e-4 * guided.norm()
        assert weight * (conditional - unconditional).norm() > 1e-3 * guided.norm(), "the branches must differ in this test"
        with record(pipe, [0]) as single:
            pipe(**(call | {"guidance_scale": 1.0}), generator=seeded())
        alone = single[0].denoiser.denoised(recording[0].sample[:1])
        assert alone.shape == recording[0].sample[:1].shape


def test_a_branch_is_evaluated_without_the_others_where_that_is_the_same():
    pipe, rows = sd_pipeline(), []
    with record(pipe, [1]) as recording:
        pipe(**sd_call(2), generator=seeded())
    step, x = recording[0], recording[0].sample[0].expand(3, *recording[0].sample.shape[1:])
    denoisers = {name: step.branch(name).select(0) for name in ("guided", "conditional", "unconditional")}
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = {name: denoiser.denoised(x) for name, denoiser in denoisers.items()}
    handle.remove()
    assert rows == [6, 3, 3]
    combined = found["unconditional"] + 7.5 * (found["conditional"] - found["unconditional"])
    torch.testing.assert_close(combined, found["guided"], atol=1e-4, rtol=1e-4)


def test_branches_that_lean_on_one_another_are_evaluated_together():
    """As in perturbed attention guidance, whose layers mix the copies of one sample."""

    def mixed(module, args, output):
        copies = output[0].unflatten(0, (2, -1))
        return (copies + 0.5 * copies.flip(0)).flatten(0, 1), *output[1:]

    def lean(pipe):
        return pipe.unet.register_forward_hook(mixed)

    plain, leaning = sd_pipeline(), sd_pipeline()
    lean(leaning)
    for pipe in (plain, leaning):
        with record(pipe, [0]) as recording:
            pipe(**sd_call(), generator=seeded())
        step, x = recording[0], recording[0].sample
        if pipe is plain:
            conditional, unconditional = (step.branch(name).epsilon(x) for name in ("conditional", "unconditional"))
    assert step.engine == "replay"
    expected = (conditional + 0.5 * unconditional, unconditional + 0.5 * conditional)
    for name, value in zip(("conditional", "unconditional"), expected, strict=True):
        torch.testing.assert_close(step.branch(name).epsilon(x), value, atol=1e-4, rtol=1e-4)


def test_missing_and_unknown_branches_are_refused():
    pipe = ddpm_pipeline()
    with record(pipe, [0]) as recording:
        pipe(**pixel_call(), generator=seeded())
    with pytest.raises(ValueError, match="branch='unconditional', but the step made 1 network outputs"):
        recording[0].branch("unconditional")
    with pytest.raises(ValueError, match="branch='both'. Expected 'guided'"):
        recording[0].branch("both")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("engine", ["replay", "drive"])
def test_half_precision_is_probed_in_float32_and_left_alone(dtype, engine):
    pipe = ddpm_pipeline(diffusers.DDIMScheduler(clip_sample=False)).to(dtype)
    reference = ddpm_pipeline(diffusers.DDIMScheduler(clip_sample=False))
    for target, source in zip(reference.unet.parameters(), pipe.unet.parameters(), strict=True):
        target.data = source.data.float()
    before = {name: (p, p.dtype, p.clone()) for name, p in pipe.unet.named_parameters()}
    with record(pipe, [2], engine=engine) as recording:
        pipe(**pixel_call(output_type="pt"), generator=seeded())
    step = recording[0]
    assert step.sample.dtype == dtype
    x = step.sample[0].float()
    found = step.denoiser.jacobian(x, "epsilon").dense()
    assert found.dtype == torch.float32
    with record(reference, [2]) as exact:
        reference(**pixel_call(output_type="pt"), generator=seeded())
    truth = exact[0].denoiser.jacobian(x, "epsilon").dense()
    assert (found - truth).norm() < 1e-5 * truth.norm()
    for name, parameter in pipe.unet.named_parameters():
        same, kind, bits = before[name]
        assert parameter is same
        assert parameter.dtype == kind == dtype
        assert torch.equal(parameter, bits)
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_nothing_stays_patched_after_an_exception_inside_the_pipeline():
    pipe = sd_pipeline()
    pipe(**sd_call())
    before = state_of(pipe)
    failing = pipe.unet.register_forward_hook(lambda *_: (_ for _ in ()).throw(OSError("out of paper")))
    with pytest.raises(OSError, match="out of paper"), record(pipe, 3):
        pipe(**sd_call(), generator=seeded())
    failing.remove()
    assert state_of(pipe) == before


def test_nothing_stays_patched_after_a_failing_probe():
    pipe = sd_pipeline()
    with record(pipe, [0]) as recording:
        pipe(**sd_call(), generator=seeded())
    before = state_of(pipe)
    parameters = [id(p) for p in pipe.unet.parameters()]
    failing = pipe.unet.register_forward_hook(lambda *_: (_ for _ in ()).throw(OSError("out of paper")))
    with pytest.raises(OSError, match="out of paper"):
        recording[0].denoiser  # noqa: B018
    failing.remove()
    assert state_of(pipe) == before
    assert parameters == [id(p) for p in pipe.unet.parameters()]
    assert recording[0].engine == "replay"


def test_entering_twice_and_calling_twice_are_errors():
    pipe = ddpm_pipeline()
    recording = record(pipe, 2)
    with recording:
        pipe(**pixel_call(), generator=seeded())
        with pytest.raises(RuntimeError, match="a recording holds one pipeline call, and this is the second"):
            pipe(**pixel_call())
        with pytest.raises(RuntimeError, match="is being recorded already"), record(pipe, 2):
            pass
    with pytest.raises(RuntimeError, match="was entered before"), recording:
        pass
    assert "step" not in pipe.scheduler.__dict__


def test_callbacks_run_once_and_only_in_the_real_pass():
    pipe, seen = sd_pipeline(), []

    def callback(pipe, i, t, kwargs):
        seen.append(i)
        return kwargs

    with record(pipe, 2) as recording:
        pipe(**sd_call(), generator=seeded(), callback_on_step_end=callback)
    assert recording[0].engine == "replay"
    assert seen == list(range(6))


def test_a_callback_that_moves_the_conditioning_is_noticed():
    """Dropping guidance half way changes the network's input in a way that a repeated call does not show."""
    pipe = sd_pipeline()

    def drop(pipe, i, t, kwargs):
        if i == 2:
            pipe._guidance_scale = 3.0
        return kwargs

    with record(pipe, [1, 4]) as recording:
        pipe(**sd_call(), generator=seeded(), callback_on_step_end=drop)
    assert recording[0].engine == "replay"
    with pytest.raises(RuntimeError, match="step 4 .* cannot be evaluated again"):
        recording[1].denoiser  # noqa: B018


def test_global_random_state_is_left_as_a_plain_call_leaves_it():
    pipe = ddpm_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        plain = pipe(**pixel_call()).images
        after = torch.get_rng_state()
        torch.manual_seed(5)
        with record(pipe, 2) as recording:
            recorded = pipe(**pixel_call()).images
        assert recording[1].engine == "replay"
        assert np.array_equal(plain, recorded)
        assert torch.equal(after, torch.get_rng_state())


def test_pipeline_and_scheduler_that_do_not_fit_are_noticed():
    """DDPMPipeline never scales its input, which Euler needs: the images are wrong, and so would the noise levels be."""
    pipe = ddpm_pipeline(diffusers.EulerDiscreteScheduler())
    with record(pipe, [1]) as recording:
        pipe(**pixel_call(), generator=seeded())
    with pytest.raises(RuntimeError, match=r"the network saw 1 x at step 1. Expected 0.0\d+ x"):
        recording[0].denoiser  # noqa: B018


def test_a_network_that_cuts_its_gradient_is_noticed():
    pipe = ddpm_pipeline()
    cut = pipe.unet.conv_in.register_forward_hook(lambda module, args, output: output.detach())
    with record(pipe, [1]) as recording:
        pipe(**pixel_call(), generator=seeded())
    with pytest.raises(RuntimeError):
        recording[0].denoiser  # noqa: B018
    cut.remove()


@pytest.mark.parametrize(
    ("steps", "total", "positions"),
    [
        (3, 7, [0, 3, 6]),
        (1, 7, [0]),
        (10, 3, [0, 1, 2]),
        ("all", 4, [0, 1, 2, 3]),
        ([0, -1, 2], 5, [0, 2, 4]),
        (range(2), 5, [0, 1]),
    ],
)
def test_choice_of_steps(steps, total, positions):
    assert resolve_steps(steps, total) == positions
    assert resolve_steps(steps, total, 2) == [p + 2 for p in positions]


@pytest.mark.parametrize("steps", [0, -3, [], "some", 2.5, ["0"], True, None])
def test_senseless_choice_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match="Expected a positive number of steps, a non-empty sequence"):
        record(ddpm_pipeline(), steps)


def test_positions_beyond_the_run_are_refused_before_any_work():
    pipe = ddpm_pipeline()
    with pytest.raises(ValueError, match=r"has \[6\]. Expected positions from -6 to 5"), record(pipe, [0, 6]):
        pipe(**pixel_call())


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda pipe: pipe.unet.train(), ValueError, r"pipe.unet is in train mode.*call pipe.unet.eval\(\)"),
        (lambda pipe: setattr(pipe, "scheduler", diffusers.ScoreSdeVeScheduler()), ValueError, "ScoreSdeVeScheduler is not"),
        (lambda pipe: setattr(pipe, "scheduler", None), ValueError, "DDPMPipeline has no scheduler"),
    ],
)
def test_what_cannot_be_recorded_is_refused(spoil, error, message):
    pipe = ddpm_pipeline()
    spoil(pipe)
    with pytest.raises(error, match=message):
        record(pipe)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_network_that_returns_nan_is_named(bad):
    pipe = ddpm_pipeline()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(bad)
    with pytest.raises(FloatingPointError, match="the network's output at step 0 has 64 non-finite entries"), record(pipe, 2):
        pipe(**pixel_call(), generator=seeded())


def test_late_starts_keep_their_place_in_the_schedule():
    """Image to image enters the schedule half way; noise levels must be those of the later positions."""
    parts = sd_pipeline(diffusers.DDIMScheduler(**SCALED_LINEAR, clip_sample=False)).components
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in sd_call().items() if k not in ("height", "width")}
    with record(pipe, "all") as recording:
        pipe(**call, image=randn(1, 3, 16, 16).clamp(-1, 1), strength=0.5, generator=seeded())
    assert [step.index for step in recording] == [3, 4, 5]
    assert recording[0].sigma < 0.7 * 14.6
    assert [step.engine for step in recording] == ["replay"] * 3


def test_forward_products_run_through_the_driven_loop():
    pipe = sd_pipeline()
    with record(pipe, [2], engine="drive") as recording:
        pipe(**sd_call(), generator=seeded())
    step, v = recording[0], randn(4, 8, 8, seed=2)
    jacobian = step.denoiser.jacobian(step.sample[0])
    with forward_mode():
        expected = jacobian.dense() @ v.flatten()
    assert (jacobian.jvp(v).flatten() - expected).norm() < 1e-4 * expected.norm()
