"""Watching a run: the numbers come while the pipeline generates, and are those of an analysis afterwards, bit for bit."""

import functools

import diffusers
import numpy as np
import pytest
import torch
from test_trajectory import assert_same_steps
from tiny import PIPELINES, ddpm_pipeline, pixel_call

from diffusers_geometry import record, with_geometry


def analysed(name, **options):
    build, call, _ = PIPELINES[name]
    pipe = with_geometry(build())
    generator = torch.Generator().manual_seed(0)
    method = {"spectrum": "dense"} if name == "DDPM" else {"spectrum": "golub_kahan", "num_singular_values": 2, "max_products": 68}
    own = {"record_steps": [0, 2], "progress": False, **method}
    return pipe, generator, lambda: pipe.analyze_geometry(**call(generator=generator), **own | options)


@pytest.mark.parametrize("name", ["DDPM", "SD-EulerA", "SD-Heun", "SD-rescaled", "DiT"])
def test_a_watched_run_has_the_same_numbers_images_and_random_state(name):
    _, after, run = analysed(name)
    expected, seen = run(), []
    pipe, generator, run = analysed(name, watch=seen.append)
    trace = run()
    assert [len(partial.steps) for partial in seen] == [1, 2]
    assert [partial.images is None for partial in seen] == [True] * 2
    assert_same_steps(seen[-1], expected)
    assert_same_steps(trace, expected)
    assert trace.settings == expected.settings
    assert np.array_equal(np.asarray(trace.images), np.asarray(expected.images))
    assert torch.equal(generator.get_state(), after.get_state())
    assert "step" not in pipe.scheduler.__dict__
    assert not getattr(type(pipe), "_is_recorded", False)


def test_the_run_waits_for_its_watcher(monkeypatch):
    """Every partial trace comes before the pipeline makes its next step."""
    order, step = [], diffusers.DDPMScheduler.step

    def logged(*args, **kwargs):
        order.append("made")
        return step(*args, **kwargs)

    monkeypatch.setattr(diffusers.DDPMScheduler, "step", functools.wraps(step)(logged))
    analysed("DDPM", record_steps="all", watch=lambda trace: order.append(trace.steps[-1].index))[2]()
    assert order == [0, "made", 1, "made", 2, "made", 3, "made", 4, "made", 5, "made"]


def test_calls_of_networks_that_probes_make_are_not_recorded():
    pipe = ddpm_pipeline()
    with record(pipe, [1, 2]) as recording:
        kept = []

        def evaluate(step):
            step.denoiser.denoised(step.sample)
            kept.append((len(recording._calls), torch.is_grad_enabled()))

        recording.after_kept = evaluate
        pipe(**pixel_call())
    assert kept == [(0, True), (0, True)]  # the pipeline itself runs without gradients
    assert [len(step.network_calls) for step in recording] == [1, 1]


def test_what_a_watcher_raises_ends_the_run_and_leaves_no_mark():
    def stop(trace):
        if len(trace.steps) == 2:
            raise KeyboardInterrupt

    pipe, _, run = analysed("SD-DDIM", watch=stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert "step" not in pipe.scheduler.__dict__
    assert not getattr(type(pipe), "_is_recorded", False)
    assert len(analysed("SD-DDIM")[2]().steps) == 2


@pytest.mark.parametrize("options", [{"flipd": True}, {"of": "sampled"}, {"spectrum": "perturbation"}])
def test_numbers_that_need_the_final_sample_cannot_be_watched(options):
    with pytest.raises(ValueError, match="Expected numbers that need no final sample"):
        analysed("DDPM", watch=print, **options)[2]()
