"""Geometry pipelines: what they share with the plain ones, and that nothing collides with any pipeline's arguments."""

import ast
import inspect
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from tiny import ddpm_pipeline, pixel_call

import diffusers_geometry
from diffusers_geometry import GeometryDDPMPipeline, GeometryMixin, with_geometry
from diffusers_geometry.mixin import GEOMETRY_PIPELINES


def seeded():
    return torch.Generator().manual_seed(0)


def test_with_geometry_shares_everything_and_changes_nothing():
    pipe = ddpm_pipeline().to(torch.float16)
    pipe.note = "mine"
    before = dict(pipe.__dict__)
    geometry = with_geometry(pipe)
    assert type(pipe) is diffusers.DDPMPipeline
    assert pipe.__dict__ == before
    assert isinstance(geometry, diffusers.DDPMPipeline)
    assert isinstance(geometry, GeometryMixin)
    assert type(geometry).__name__ == "DDPMPipeline"
    assert geometry.unet is pipe.unet
    assert geometry.scheduler is pipe.scheduler
    assert geometry.unet.dtype == torch.float16
    assert geometry.note == "mine"
    assert type(with_geometry(geometry)) is type(geometry)
    assert type(with_geometry(ddpm_pipeline())) is type(geometry)
    geometry.note = "yours"
    assert pipe.note == "mine"


def test_geometry_pipelines_generate_the_same_images():
    pipe = ddpm_pipeline()
    plain = pipe(**pixel_call(generator=seeded())).images
    assert np.array_equal(plain, with_geometry(pipe)(**pixel_call(generator=seeded())).images)


@pytest.mark.parametrize("make", [with_geometry, lambda pipe: GeometryDDPMPipeline(**pipe.components)])
def test_every_geometry_pipeline_saves_as_the_plain_class(make, tmp_path):
    pipe = ddpm_pipeline()
    make(pipe).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(plain) is diffusers.DDPMPipeline
    loaded = GeometryDDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded) is GeometryDDPMPipeline
    loaded.set_progress_bar_config(disable=True)
    images, expected = (p(**pixel_call(generator=seeded())).images for p in (loaded, pipe))
    np.testing.assert_allclose(images, expected, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"


@pytest.mark.parametrize("name", GEOMETRY_PIPELINES)
def test_geometry_classes(name):
    cls = getattr(diffusers_geometry, name)
    assert cls.__mro__[1] is GeometryMixin
    assert cls.__mro__[2] is getattr(diffusers, GEOMETRY_PIPELINES[name])
    assert cls.__name__ == name


def test_named_class_analyses():
    pipe = ddpm_pipeline()
    geometry = GeometryDDPMPipeline(**pipe.components)
    geometry.set_progress_bar_config(disable=True)
    trace = geometry.analyze_geometry(num_inference_steps=4, record_steps=[1], progress=False)
    assert trace.settings["pipeline"] == "DDPMPipeline"


def test_what_is_not_a_pipeline_is_refused():
    with pytest.raises(TypeError, match=r"pipe is a UNet2DModel. Expected a diffusers.DiffusionPipeline"):
        with_geometry(ddpm_pipeline().unet)
    with pytest.raises(AttributeError, match="has no attribute 'GeometryNoSuchPipeline'"):
        diffusers_geometry.mixin.GeometryNoSuchPipeline  # noqa: B018


def pipeline_call_arguments():
    """Every argument name of every ``__call__`` in the installed diffusers.pipelines, read from source."""
    found = {}
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__call__":
                for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                    found.setdefault(argument.arg, path.name)
    return found


def test_no_argument_collides_with_any_pipeline():
    taken = pipeline_call_arguments()
    assert len(taken) > 200
    assert "num_inference_steps" in taken
    names = ("analyze_geometry", "plan_geometry", "measure_transitions", "generate_with_geometry")
    methods = [name for name in names if hasattr(GeometryMixin, name)]
    assert "analyze_geometry" in methods
    for method in methods:
        parameters = inspect.signature(getattr(GeometryMixin, method)).parameters.values()
        own = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert own
        assert not own & set(taken), {name: taken[name] for name in own & set(taken)}
        assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD, p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters)


def test_arguments_reach_the_pipeline_and_unknown_ones_are_refused_by_it():
    geometry = with_geometry(ddpm_pipeline())
    with pytest.raises(TypeError, match="no_such_argument"):
        geometry.analyze_geometry(no_such_argument=1, progress=False)
    assert type(geometry).__call__ is diffusers.DDPMPipeline.__call__
    positional = geometry.analyze_geometry(3, seeded(), 4, "np", record_steps=[0], progress=False)
    assert positional.images.shape == (3, 8, 8, 1)
