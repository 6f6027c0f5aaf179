"""Vectors as a pipeline of their own: round trips, and a network whose answer is known."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

from diffusers_geometry import GeometryVectorPipeline, VectorNetwork, record, with_geometry
from diffusers_geometry.cli import main
from diffusers_geometry.exact import LinearManifoldDenoiser
from diffusers_geometry.selfcheck import exact_network


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_pipeline(dim=12, scheduler=None):
    torch.manual_seed(0)
    scheduler = scheduler or EDMEulerScheduler(sigma_min=0.02, sigma_max=10.0, sigma_schedule="exponential")
    pipe = GeometryVectorPipeline(VectorNetwork(dim, width=16).eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_network_keeps_rows_apart_and_depends_on_noise():
    network = VectorNetwork(12, width=16).eval()
    x, noise = torch.randn(5, 12, generator=seeded()), torch.linspace(-1, 1, 5)
    together = network(x, noise).sample
    apart = torch.cat([network(x[i : i + 1], noise[i]).sample for i in range(5)])
    torch.testing.assert_close(together, apart)
    assert (network(x, noise, return_dict=False)[0] == together).all()
    assert (network(x, 0.0).sample - network(x, 1.0).sample).norm() > 1e-3


def test_sampling_ends_in_the_data_of_an_exact_network():
    """Behind its own scheduler the pipeline lands on the manifold, with the variances of the data."""
    basis = torch.linalg.qr(torch.randn(12, 3, generator=seeded(1)))[0]
    exact = LinearManifoldDenoiser(basis, torch.tensor([4.0, 1.0, 0.25]))
    pipe = make_pipeline()
    pipe.network = exact_network(exact, pipe.scheduler, like=pipe.network)
    samples = torch.from_numpy(pipe(4000, seeded(2), num_inference_steps=60).samples)
    inside = samples @ basis
    assert (samples - inside @ basis.T).norm() / samples.norm() < 0.02
    # Sampling error of a variance from 4,000 draws is 2.2 %, the error of 60 Euler steps a few more.
    np.testing.assert_allclose(inside.var(0).numpy(), [4.0, 1.0, 0.25], rtol=0.15)


def test_the_recorded_jacobian_is_the_known_one():
    basis = torch.linalg.qr(torch.randn(12, 3, generator=seeded(1)))[0]
    exact = LinearManifoldDenoiser(basis, torch.tensor([4.0, 1.0, 0.25]))
    pipe = make_pipeline()
    pipe.network = exact_network(exact, pipe.scheduler, like=pipe.network)
    trace = pipe.analyze_geometry(2, seeded(), num_inference_steps=20, record_steps=5, progress=False)
    for step in trace.steps:
        expected = np.array([4.0, 1.0, 0.25]) / (np.array([4.0, 1.0, 0.25]) + step.sigma**2)
        np.testing.assert_allclose(step.singular_values[:, :3], [expected] * 2, atol=1e-4)
        assert np.abs(step.singular_values[:, 3:]).max() < 1e-4
    assert trace.images.shape == (2, 12)
    assert trace.settings["pipeline"] == "GeometryVectorPipeline"


def test_round_trip(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "GeometryVectorPipeline"
    assert index["network"] == ["diffusers_geometry.vector", "VectorNetwork"]
    loaded = GeometryVectorPipeline.from_pretrained(tmp_path, use_safetensors=True)
    loaded.set_progress_bar_config(disable=True)
    first, second = (p(3, seeded(), num_inference_steps=5, output_type="pt").samples for p in (pipe, loaded))
    torch.testing.assert_close(first, second)  # not equal: weights read from a file lie elsewhere in a cache line
    assert type(with_geometry(loaded)) is GeometryVectorPipeline
    assert torch.equal(loaded(3, seeded(), 5, "pt", return_dict=False)[0], second)


def test_recording_changes_no_number():
    pipe = make_pipeline()
    plain = pipe(3, seeded(), num_inference_steps=6, output_type="pt").samples
    with record(pipe, steps="all") as recording:
        recorded = pipe(3, seeded(), num_inference_steps=6, output_type="pt").samples
    assert torch.equal(plain, recorded)
    assert [step.engine for step in recording] == ["replay"] * 6


def test_the_command_line_finds_the_class(tmp_path, capsys):
    make_pipeline().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        main(
            ["analyze", str(tmp_path / "model"), "--steps", "5", "--record-steps", "2", "--output", str(tmp_path / "out"), "--json"]
        )
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["settings"]["pipeline"] == "GeometryVectorPipeline"


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"output_type='pil'. Expected 'np' or 'pt'"):
        make_pipeline()(output_type="pil")
    with pytest.raises(ValueError, match=r"dim=0, width=128, num_blocks=2. Expected positive numbers"):
        VectorNetwork(0)
    assert not hasattr(diffusers, "GeometryVectorPipeline")
