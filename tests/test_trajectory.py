"""A trace: its numbers, its files, its figure."""

import json
from dataclasses import fields

import diffusers
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from tiny import ddpm_pipeline, pixel_call, quiet, randn, randomised, sd_call, sd_pipeline

from diffusers_geometry import GeometryTrace, with_geometry
from diffusers_geometry.step_geometry import BatchEstimate
from diffusers_geometry.storage import write_together


def analysed(**options):
    call = pixel_call(**({"generator": torch.Generator().manual_seed(0), "batch_size": 2} | options.pop("call", {})))
    return with_geometry(ddpm_pipeline()).analyze_geometry(**call, **{"record_steps": 3, "progress": False, **options})


@pytest.fixture(scope="module")
def trace():
    return analysed()


def same(first, second):
    if isinstance(first, BatchEstimate):
        return all(same(getattr(first, f.name), getattr(second, f.name)) for f in fields(first))
    if isinstance(first, np.ndarray):
        equal_nan = first.dtype.kind == "f"
        return first.dtype == second.dtype and np.array_equal(first, second, equal_nan=equal_nan)
    return first == second and type(first) is type(second)


def assert_same_steps(first, second):
    for a, b in zip(first.steps, second.steps, strict=True):
        for f in fields(a):
            assert same(getattr(a, f.name), getattr(b, f.name)), f.name


def test_shapes_and_kinds(trace):
    for step in trace.steps:
        assert step.singular_values.shape == step.eigenvalues.shape == step.gaps.shape == (2, 64)
        assert (np.diff(step.singular_values) <= 0).all()
        assert step.singular_values.dtype == np.float64
        for estimate in (step.local_scaling, step.local_rank, step.effective_dimension, step.gap_dim):
            assert estimate.value.shape == estimate.sem.shape == (2,)
            assert (estimate.sem == 0).all()
        assert step.local_scaling_rank.shape == step.asymmetry.shape == step.phase.shape == (2,)
        assert step.products == 128
        assert step.flipd is None
    assert trace.images.shape == (2, 8, 8, 1)
    assert trace.phases.labels.shape == (3, 2)
    assert len(trace.manifold_dim) == 2
    assert trace.settings["scheduler"] == "DDPMScheduler"
    assert trace.settings["pipeline"] == "DDPMPipeline"


def test_a_batch_of_one_reads_like_a_number():
    single = analysed(call={"batch_size": 1})
    step = single.steps[0]
    assert float(step.local_scaling) == step.local_scaling.value[0]
    assert step.phase in ("trivial", "coverage", "consolidation")
    assert single.manifold_dim is None or isinstance(single.manifold_dim, int)


def test_a_batch_is_not_one_number(trace):
    with pytest.raises(TypeError, match="2 samples are not one number"):
        float(trace.steps[0].local_scaling)


@pytest.mark.parametrize("method", ["dense", "perturbation", "central_difference"])
def test_files_round_trip_exactly(method, tmp_path):
    first = analysed(spectrum=method, max_products=None if method == "dense" else 40, of="score")
    first.save_pretrained(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["trace.json", "trace.safetensors"]
    second = GeometryTrace.from_pretrained(tmp_path / "run")
    assert_same_steps(first, second)
    assert first.settings == second.settings
    assert np.array_equal(first.images, second.images)
    assert first.table() == second.table()


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_images_round_trip(output_type, tmp_path):
    first = analysed(call={"output_type": output_type})
    first.save_pretrained(tmp_path)
    second = GeometryTrace.from_pretrained(tmp_path)
    assert type(first.images) is type(second.images)
    for a, b in zip(first.images, second.images, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
        assert not isinstance(a, Image.Image) or a.mode == b.mode


def test_infinite_noise_is_kept_and_written_as_valid_json(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = with_geometry(ddpm_pipeline(FlowMatchEulerDiscreteScheduler()))
    first = pipe.analyze_geometry(**pixel_call(), record_steps=[0, 5], progress=False)
    assert first.steps[0].sigma == float("inf")
    assert first.rows()[0]["sigma"] is None
    assert first.steps[0].effective_dimension.value == 0
    first.save_pretrained(tmp_path)
    json.loads((tmp_path / "trace.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert GeometryTrace.from_pretrained(tmp_path).steps[0].sigma == float("inf")


def test_nothing_partial_is_left_behind(trace, tmp_path, monkeypatch):
    import pathlib

    def full_disk(self, data, right=pathlib.Path.write_bytes):
        right(self, data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space left"):
        trace.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_what_was_there(tmp_path):
    write_together(tmp_path, {"a": b"old"})
    with pytest.raises(TypeError):
        write_together(tmp_path, {"a": b"new", "b": "not bytes"})
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("name", "error"), [("missing", FileNotFoundError), ("old", ValueError)])
def test_what_is_not_a_trace_is_refused(name, error, trace, tmp_path):
    if name == "old":
        trace.save_pretrained(tmp_path / name)
        document = json.loads((tmp_path / name / "trace.json").read_text())
        (tmp_path / name / "trace.json").write_text(json.dumps(document | {"format": 0}))
    with pytest.raises(error, match="holds no trace" if name == "missing" else "has format 0. Expected 2"):
        GeometryTrace.from_pretrained(tmp_path / name)


def test_table_and_pandas_agree(trace):
    frame = trace.to_pandas()
    assert len(frame) == 6
    assert frame["psi"].tolist() == [v for step in trace.steps for v in step.local_scaling.value]
    lines = trace.table().splitlines()
    assert len(lines) == 7
    assert len({len(line) for line in lines}) == 1, "columns must line up"


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_figure_is_drawn_from_the_trace_alone(trace, suffix, tmp_path):
    trace.save_pretrained(tmp_path / "run")
    loaded = GeometryTrace.from_pretrained(tmp_path / "run")
    figure = loaded.plot(tmp_path / f"figure.{suffix}", sample=1)
    assert (tmp_path / f"figure.{suffix}").stat().st_size > 5000
    labels = {label for axes in figure.findobj(Axes) for label in (axes.get_xlabel(), axes.get_ylabel())}
    assert {"index of singular value", "directions", "ψ (nats)", "singular value of D'"} <= labels
    heat = figure.axes[0].images[0].get_array()
    assert np.array_equal(heat, np.stack([s.denoised_singular_values[1] for s in trace.steps], axis=1))
    with pytest.raises(ValueError, match="sample=2. Expected 0 <= sample < 2"):
        loaded.plot(sample=2)


def test_only_the_largest_values_are_kept_but_all_are_used(trace):
    few = analysed(num_singular_values=5)
    for step, full in zip(few.steps, trace.steps, strict=True):
        assert np.array_equal(step.singular_values, full.singular_values[:, :5])
        assert np.array_equal(step.local_scaling.value, full.local_scaling.value)


def test_a_fixed_rank_makes_samples_comparable():
    fixed = analysed(psi_rank=7)
    for step in fixed.steps:
        assert (step.local_scaling_rank == 7).all()
        np.testing.assert_allclose(step.local_scaling.value, np.log(step.singular_values[:, :7]).sum(axis=1), rtol=1e-12)
    assert fixed.settings["psi_rank"] == 7


def test_a_rerun_is_the_same_run(trace):
    again = analysed()
    assert_same_steps(trace, again)
    first, second = (analysed(spectrum="perturbation", max_products=50, probe_seed=3) for _ in range(2))
    assert_same_steps(first, second)
    other = analysed(spectrum="perturbation", max_products=50, probe_seed=4)
    assert not np.array_equal(first.steps[0].singular_values, other.steps[0].singular_values)


def test_latent_pipeline_with_guidance():
    pipe = with_geometry(sd_pipeline())
    found = pipe.analyze_geometry(**sd_call(2), record_steps=2, progress=False, generator=torch.Generator().manual_seed(0))
    assert found.steps[0].singular_values.shape == (2, 256)
    conditional = pipe.analyze_geometry(
        **sd_call(2), record_steps=2, branch="conditional", progress=False, generator=torch.Generator().manual_seed(0)
    )
    assert not np.array_equal(found.steps[1].singular_values, conditional.steps[1].singular_values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spectrum": "exact"}, "spectrum='exact'. Expected one of"),
        ({"of": "psi"}, "of='psi'. Expected one of"),
        ({"max_products": 0}, "max_products=0. Expected a positive integer"),
        ({"max_products": 1, "spectrum": "perturbation"}, "Expected at least 4 samples"),
        ({"max_products": 63}, "max_products=63 cannot be met .* dense needs 64 products .*; golub_kahan needs 92 products"),
        ({"max_products": 63, "spectrum": "dense"}, "dense needs 64 products"),
        ({"probe_chunk_size": 0}, "probe_chunk_size=0. Expected a positive integer"),
        ({"probe_seed": -1}, "probe_seed=-1. Expected an integer from 0"),
        ({"record_steps": 2.5}, "record_steps=2.5. Expected an integer"),
        ({"record_steps": None}, "record_steps=None. Expected an integer"),
        ({"num_singular_values": 65}, "num_singular_values=65. Expected at most 64"),
        ({"log_volume_epsilon": 0}, "log_volume_epsilon=0.0. Expected a positive finite number"),
        ({"log_volume_epsilon": np.inf}, "log_volume_epsilon=inf"),
        ({"max_probe_seconds": np.inf}, "max_probe_seconds=inf"),
        ({"spectrum": "golub_kahan", "psi_rank": 17}, "psi_rank=17. Expected at most 16"),
        ({"log_volume_probes": 3}, "log_volume_probes=3, log_volume_steps=30. Expected at least 4 of both"),
        ({"derivative": "guess"}, "derivative='guess'. Expected one of"),
        ({"derivative": "difference", "spectrum": "golub_kahan"}, "needs reverse products, which a black box"),
        ({"max_probe_memory": 100}, "max_probe_memory=100 cannot be met"),
        ({"num_singular_values": -1}, "num_singular_values=-1"),
        ({"relative_threshold": 1.5}, "relative_threshold=1.5"),
        ({"phase_resolution": 0.7}, "phase_resolution=0.7"),
        ({"branch": "unconditional"}, "branch='unconditional'"),
        ({"probe_engine": "magic"}, "engine='magic'. Expected one of"),
        ({"psi_rank": 65}, "psi_rank=65. Expected at most 64"),
    ],
)
def test_senseless_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        analysed(**options)


def test_a_large_dimension_takes_golub_kahan_by_itself():
    """d = 4096 without attention: auto does not build the matrix, and says what it did."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    network = diffusers.UNet2DModel(64, 1, 1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks)
    pipe = with_geometry(quiet(diffusers.DDPMPipeline(randomised(network), diffusers.DDPMScheduler())))
    call = {"num_inference_steps": 2, "record_steps": [1], "progress": False}
    found = pipe.analyze_geometry(**call, max_products=100, num_singular_values=4)
    step, plan = found.steps[0], found.settings["plan"]
    assert (step.method, plan["method"], plan["block_size"], plan["products"]) == ("golub_kahan", "golub_kahan", 4, 100)
    assert step.singular_values.shape == step.singular_value_bounds.shape == step.singular_values_converged.shape == (1, 4)
    assert step.products <= 100
    assert step.effective_dimension.sem[0] > 0
    assert step.details["stopped"] in ("converged", "budget")
    assert np.isnan(step.local_rank.bias[0])
    restricted = pipe.analyze_geometry(**call, spectrum="central_difference", max_products=6).steps[0]
    assert restricted.singular_values.shape == (1, 6)
    assert np.isnan(restricted.local_scaling.sem).all()
    assert restricted.effective_dimension is None
    assert not restricted.gap_dim.converged.any()
    assert restricted.phase[0] == "unresolved"


def test_settings_may_be_numpys():
    found = analysed(record_steps=np.arange(2), max_products=np.int64(64), phase_resolution=np.float32(0.1), probe_seed=np.int64(3))
    assert len(found.steps) == 2
    assert found.settings["max_products"] == 64
    assert type(found.settings["max_products"]) is int


def test_a_batch_size_that_changes_is_refused():
    """A pipeline that drops a sample on its way has no stacked trace."""

    class Shrinking(diffusers.DDPMPipeline):
        @torch.no_grad()
        def __call__(self, generator=None, num_inference_steps=4):
            image = randn(2, 1, 8, 8)
            self.scheduler.set_timesteps(num_inference_steps)
            for i, t in enumerate(self.scheduler.timesteps):
                image = image[:1] if i == 2 else image
                image = self.scheduler.step(self.unet(image, t).sample, t, image, generator=generator).prev_sample
            return (image.numpy(),)

    base = ddpm_pipeline()
    pipe = with_geometry(Shrinking(base.unet, base.scheduler))
    with pytest.raises(ValueError, match=r"the recorded steps carry \[1, 2\] samples. Expected one batch size"):
        pipe.analyze_geometry(record_steps="all", progress=False)
