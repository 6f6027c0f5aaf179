"""A modular pipeline is recorded, driven and analysed as the class of the same model is."""

import diffusers
import numpy as np
import pytest
import torch
from load import load_zoo
from oracle import own_loop_output

from diffusers_geometry import record, with_geometry
from diffusers_geometry.selfcheck import selfcheck

CALL = {"prompt": "a thick slanted seven", "negative_prompt": "", "num_inference_steps": 6}


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def pipes():
    """(modular, classic) around the same modules."""
    classic = load_zoo("sd3-mnist")
    modular = diffusers.StableDiffusion3AutoBlocks().init_pipeline()
    modular.update_components(**{k: v for k, v in classic.components.items() if k in modular._component_specs and v is not None})
    return modular, classic


def test_recording_and_both_engines(pipes):
    modular, _ = pipes
    plain = modular(**CALL, generator=seeded(), output="images", output_type="np")
    guider = dict(modular.guider.__dict__)
    with record(modular, [0, -1]) as recording:
        images = modular(**CALL, generator=seeded(), output="images", output_type="np")
    assert np.array_equal(images, plain)
    assert type(modular).__name__ == "StableDiffusion3ModularPipeline"
    assert "step" not in modular.scheduler.__dict__
    for step in recording:
        assert step.engine == "replay"
        assert step.certificate_error < 2e-5
        with torch.no_grad():
            assert torch.equal(step.drive([step.sample])[0], step.model_output)
    assert {k: v for k, v in modular.guider.__dict__.items() if k in guider}.keys() == guider.keys()
    with record(modular, [-1], engine="drive") as driven:
        modular(**CALL, generator=seeded(), output="images")
    v = torch.randn(2, *driven[0].sample.shape[1:], generator=torch.Generator().manual_seed(1))
    products = [s.denoiser.select(0).jacobian(s.sample[0]).vjp(v) for s in (recording[1], driven[0])]
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-4)


def test_the_same_geometry_as_the_class(pipes):
    """At equal guidance they are one function. (Without a negative prompt the modular one guides away from the prompt itself.)"""
    modular, classic = pipes
    modular.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0))
    with record(classic, [2]) as first:
        classic(**CALL, guidance_scale=4.0, generator=seeded())
    with record(modular, [2]) as second:
        modular(**CALL, generator=seeded(), output="images")
    point = first[0].sample
    torch.testing.assert_close(second[0].denoiser.denoised(point), first[0].denoiser.denoised(point), rtol=1e-3, atol=1e-3)


def test_analysis_maps_and_selfcheck(pipes):
    modular = with_geometry(pipes[0])
    options = {"record_steps": [2], "spectrum": "golub_kahan", "num_singular_values": 2, "max_products": 120, "progress": False}
    trace = modular.analyze_geometry(**CALL, generator=seeded(), output="images", **options)
    assert trace.settings["pipeline"] == "StableDiffusion3ModularPipeline"
    assert np.isfinite(trace.steps[0].singular_values).all()
    decoded = modular.analyze_geometry(**CALL, generator=seeded(), output="images", of="decoded", **options | {"max_products": 200})
    assert decoded.steps[0].details["output_shape"] == [1, 32, 32]
    result = selfcheck(pipes[0], **CALL, generator=seeded(), output="images")
    assert result, result.table()


def test_own_loop(pipes):
    """The untouched loop agrees off the trajectory."""
    modular, _ = pipes
    with record(modular, [3]) as recording:
        modular(**CALL, generator=seeded(), output="images")
    step = recording[0]
    point = step.sample + 0.3 * step.sigma_t * torch.randn(step.sample.shape, generator=torch.Generator().manual_seed(2))
    truth = own_loop_output(modular, CALL | {"output": "images"}, 3, point)
    with torch.no_grad():
        torch.testing.assert_close(step.drive([point])[0], truth, rtol=1e-4, atol=1e-5)
