"""The tiny pipelines themselves: there are enough, each runs, repeats itself, and its network looks at the sample."""

import numpy as np
import pytest
import torch
from catalogue import CASES, class_name
from oracle import own_loop_output

BUILT = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def call(pipe, case, seed=0):
    """The first thing a call returns, as one array."""
    output = pipe(**case.arguments(pipe), generator=torch.Generator().manual_seed(seed))
    value = output[0]
    return np.stack([np.asarray(item) for item in value]) if isinstance(value, (list, tuple)) else np.asarray(value)


def test_names_are_unique_and_classes_are_many():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert len({class_name(case) for case in CASES}) >= 36
    assert {case.family for case in CASES} == {"image", "latent", "video", "audio", "task"}


@BUILT
def test_a_call_is_finite_reproducible_and_follows_its_seed(case):
    pipe = case.build()
    assert type(pipe).__name__ == class_name(case)
    first, again, other = call(pipe, case), call(case.build(), case), call(pipe, case, seed=1)
    assert np.isfinite(first).all()
    assert np.array_equal(first, again)
    assert np.abs(first - other).mean() > 1e-3 * np.abs(first).mean()


@BUILT
def test_the_network_depends_on_the_sample(case):
    """Two samples give outputs whose difference is no rounding: a zero-initialised layer would leave it at zero."""
    pipe, calls = case.build(), []
    module = getattr(pipe, denoiser_name(pipe))
    module.register_forward_hook(lambda module, args, output: calls.append(first_tensor(output)))
    for seed in (0, 1):
        call(pipe, case, seed)
    first, other = calls[0], calls[len(calls) // 2]
    assert first.shape == other.shape
    assert first.isfinite().all()
    assert (first - other).norm() > 0.01 * first.norm()
    assert 1e-2 < first.std() < 1e2


@BUILT
def test_further_schedulers_are_admitted(case):
    for make in case.schedulers:
        pipe = case.build()
        pipe.scheduler = make(pipe)
        assert np.isfinite(call(pipe, case)).all()


def test_the_oracle_gives_the_run_itself_and_refuses_a_moved_sample():
    """At the run's own sample the oracle is the run; it says so when a pipeline moves the sample between two steps."""
    by_name = {case.name: case for case in CASES}
    case, moving = by_name["StableDiffusionPipeline"], by_name["StableDiffusionInpaintPipeline four channels"]
    pipe, seen = case.build(), []
    original = pipe.scheduler.step
    pipe.scheduler.step = lambda output, t, x, **options: seen.append((output, x)) or original(output, t, x, **options)
    call(pipe, case)
    del pipe.scheduler.step
    for position in (1, 3):
        model_output, sample = seen[position]
        assert torch.equal(own_loop_output(pipe, case.arguments(pipe), position, sample.clone()), model_output)
    assert not torch.equal(own_loop_output(pipe, case.arguments(pipe), 1, seen[1][1] + 0.1), seen[1][0])
    inpainting = moving.build()
    with pytest.raises(RuntimeError, match="changed the sample between"):
        own_loop_output(inpainting, moving.arguments(inpainting), 1, torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="position=0"):
        own_loop_output(pipe, case.arguments(pipe), 0, seen[0][1])


def denoiser_name(pipe):
    return next(name for name in ("transformer", "unet", "decoder", "prior") if name in pipe.components)


def first_tensor(output):
    output = getattr(output, "sample", output)
    while isinstance(output, (list, tuple)):
        output = output[0]
    return output.detach().clone()
