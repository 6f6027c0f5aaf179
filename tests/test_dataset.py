"""Labels: right, reproducible, and neither lost nor doubled when the run is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import ddpm_pipeline, dit_pipeline, quiet, randn, sd_pipeline

from diffusers_geometry import record
from diffusers_geometry.budget import plan_probe
from diffusers_geometry.complexity import local_complexity
from diffusers_geometry.dataset import GeometryDataset, generate_dataset, plan_dataset
from diffusers_geometry.denoiser import Denoiser
from diffusers_geometry.descriptors import local_rank, local_scaling
from diffusers_geometry.labels import DELTA_FIELDS, FIELDS, DatasetRequest, _batch_spectra
from diffusers_geometry.probe import Probe, probe_generator
from diffusers_geometry.spectrum import dense_spectrum

CALL = {"num_inference_steps": 5, "output_type": "np"}


def request(**change):
    options = {"seeds": range(10, 16), "record_steps": (1, 3), "psi_rank": 4, "batch_size": 2, "held_out": 0.34, "call": CALL}
    return DatasetRequest(**{**options, **change})


def contents(folder):
    return {path.name: load_file(path) for path in sorted(Path(folder).glob("shard-*.safetensors"))}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert all(torch.equal(one[name][key], other[name][key]) for key in one[name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return generate_dataset(ddpm_pipeline(), folder, request(), progress=False)


def test_labels_are_those_of_the_recorded_denoiser(whole):
    assert len(whole) == 12
    assert whole[0].keys() == {*FIELDS, *DELTA_FIELDS, "sigma"}
    pipe = ddpm_pipeline()
    with record(pipe, [1, 3]) as recording:
        pipe(batch_size=1, generator=[torch.Generator().manual_seed(13)], **CALL)
    for step in recording:
        spectrum = dense_spectrum(step.denoiser.jacobian(step.sample[0]))
        t = whole.tensors
        row = [i for i in range(12) if t["seed"][i] == 13 and t["position"][i] == step.index]
        assert len(row) == 1
        label = whole[row[0]]
        torch.testing.assert_close(label["x_t"], step.sample[0], atol=1e-5, rtol=1e-5)
        assert label["psi"].item() == pytest.approx(local_scaling(spectrum, rank=4).value, abs=1e-3)
        assert label["nu"].item() == pytest.approx(local_rank(spectrum).value, rel=1e-4)
        assert label["sigma"].item() == pytest.approx(step.sigma)
        assert label["psi_sem"] == label["nu_sem"] == 0
        fn, drawn = step.denoiser.canonical_map("denoised"), probe_generator(step.index, 0, 13, 1)
        delta = local_complexity(fn, step.sample, 0.1 * step.sigma_t, num_directions=4, generator=drawn)
        assert label["delta"].item() == pytest.approx(delta.value.item(), abs=0.5)  # of 10,000 units, a run of two or of one sample
        assert label["delta_sem"].item() == pytest.approx(delta.sem.item(), abs=0.5)
        assert 0 < label["delta_sem"] < label["delta"] < delta.knots


def test_seeds_are_held_out_not_samples(whole):
    train, held = (GeometryDataset(whole.folder, split) for split in ("train", "held_out"))
    seeds = [set(part.tensors["seed"].tolist()) for part in (train, held)]
    assert seeds == [{10, 11, 13, 14}, {12, 15}]
    assert len(train) + len(held) == len(whole)
    batch = next(iter(torch.utils.data.DataLoader(train, batch_size=4)))
    assert batch["x_t"].shape == (4, 1, 8, 8)


def test_the_plan_is_what_is_spent(whole):
    plan = plan_dataset(ddpm_pipeline(), request())
    assert (plan.units, plan.labels, plan.products) == (3, 12, 12 * 64)
    assert plan.seconds > 0
    assert "12 labels in 3 units by dense, engine replay: 768 products and 384 evaluations for delta, " in plan.table()
    without = plan_dataset(ddpm_pipeline(), request(delta_radius=None))
    assert without.delta_evaluations == 0
    assert "delta" not in without.table()
    assert whole.seconds_per_label > 0
    with pytest.raises(ValueError, match=r"max_seconds=1e-09. Expected at least .* 12 labels in 3 units"):
        generate_dataset(ddpm_pipeline(), whole.folder, request(), max_seconds=1e-9, progress=False)


def test_matrix_free_labels_agree_with_dense_ones(whole, tmp_path):
    options = request(seeds=(13,), spectrum="golub_kahan", psi_rank=4, max_products=190, held_out=0.5)
    plan = plan_dataset(ddpm_pipeline(), options)
    assert plan.unit.probe.products == plan.unit.probe.spectrum_products <= 190  # none for a trace
    found = generate_dataset(ddpm_pipeline(), tmp_path, options, progress=False).tensors
    dense = whole.tensors
    rows = [int(((dense["seed"] == 13) & (dense["position"] == p)).nonzero()) for p in (1, 3)]
    gap = (found["psi"] - dense["psi"][rows]).abs()
    assert (gap <= found["psi_bias"] + 1e-3).all()
    assert (found["psi_bias"] < 0.1).all()


def test_every_kind_of_conditioning(tmp_path):
    """Prompts and class labels of one unit are mixed, in the order of the pairs."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    pipe = sd_pipeline()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 4}
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=5)
    encoder = CLIPTextModel(CLIPTextConfig(max_position_embeddings=5, bos_token_id=0, eos_token_id=1, **sizes)).eval()
    pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)
    call = {"num_inference_steps": 4, "output_type": "latent", "height": 16, "width": 16, "guidance_scale": 200.0}
    both = request(prompts=("a", "b"), seeds=(1, 2), batch_size=4, record_steps=(2,), call=call, held_out=0.5)
    together = generate_dataset(quiet(pipe), tmp_path / "ab", both, progress=False).tensors
    assert together["conditioning"].tolist() == [0, 1, 0, 1]
    assert together["seed"].tolist() == [1, 1, 2, 2]
    alone = request(prompts=("b",), seeds=(2,), batch_size=1, record_steps=(2,), call=call, held_out=0.5)
    alone = generate_dataset(quiet(pipe), tmp_path / "b", alone, progress=False).tensors
    off = [(together["x_t"][row] - alone["x_t"][0]).abs().max() for row in (2, 3)]  # the same seed with the other prompt, and this
    assert off[1] < 1e-3
    assert off[0] > 10 * off[1] + 1e-3
    torch.testing.assert_close(together["psi"][3:], alone["psi"], atol=5e-3, rtol=0)
    call = {"num_inference_steps": 4, "output_type": "np", "guidance_scale": 4.0}
    classes = request(class_labels=(3, 5), seeds=(2,), batch_size=4, record_steps=(2,), call=call, held_out=0.5)
    found = generate_dataset(dit_pipeline(), tmp_path / "dit", classes, progress=False).tensors
    assert found["x_t"].shape == (2, 4, 8, 8)
    assert found["psi"][0] != found["psi"][1]


def test_another_request_or_model_is_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="holds labels of another request or model. Expected an empty folder"):
        generate_dataset(ddpm_pipeline(), whole.folder, request(psi_rank=5), progress=False)
    other = ddpm_pipeline()
    next(other.unet.parameters()).data[0] += 1e-3
    with pytest.raises(ValueError, match="holds labels of another request or model"):
        generate_dataset(other, whole.folder, request(), progress=False)
    with pytest.raises(FileNotFoundError, match=r"holds no dataset.json. Expected a folder that generate_dataset wrote"):
        GeometryDataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["a"], "class_labels": [1]}, "prompts and class_labels are both given"),
        ({"prompts": "a seven"}, "prompts='a seven'. Expected a non-empty sequence"),
        ({"seeds": (1, 1)}, r"seeds=\(1, 1\). Expected a non-empty sequence without repeats"),
        ({"seeds": ()}, r"seeds=\(\). Expected"),
        ({"held_out": 0.0}, "held_out=0.0"),
        ({"spectrum": "perturbation"}, "spectrum='perturbation'. Expected one of"),
        ({"delta_radius": 0.0}, "delta_radius=0.0. Expected a finite radius > 0, or None to leave delta out"),
        ({"delta_draws": 3}, "delta_directions=4, delta_draws=3. Expected at least 1, and at least 4 draws for a standard error"),
        ({"call": {"generator": None}}, r"call has \['generator'\]. Expected prompts=, class_labels=, seeds="),
    ],
)
def test_senseless_requests_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        request(**change)


def test_a_rank_beyond_the_sample_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected 1 <= |Expected at most 64"):
        generate_dataset(ddpm_pipeline(), tmp_path, request(psi_rank=65), progress=False)


RUN = """
import sys, torch
sys.path[:0] = [{tests!r}]
torch.set_num_threads(1)
from test_dataset import ddpm_pipeline, generate_dataset, request
generate_dataset(ddpm_pipeline(), {folder!r}, request(seeds=range(24)), progress=False)
"""


def test_killed_at_any_moment_nothing_is_lost_or_doubled(tmp_path):
    """Killed twice in the middle, once with a partial file in its place; then the run is that of an undisturbed one."""
    torch.set_num_threads(1)

    def command(name):
        return [sys.executable, "-c", RUN.format(tests=str(Path(__file__).parent), folder=str(tmp_path / name))]

    def shards(name):
        return list((tmp_path / name).glob("shard-*.safetensors"))

    for least, delay in ((1, 0.0), (5, 0.03)):
        running = subprocess.Popen(command("killed"), env=os.environ)
        deadline = time.monotonic() + 90
        while len(shards("killed")) < least and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        before = {path.name: path.stat().st_mtime_ns for path in shards("killed")}
        assert least <= len(before) < 12
    with pytest.raises(FileNotFoundError, match=r"holds \d+ of 12 shards. Expected all: run the generation again"):
        GeometryDataset(tmp_path / "killed")
    assert len(GeometryDataset(tmp_path / "killed", allow_incomplete=True)) == 4 * len(before)
    (tmp_path / "killed" / ".shard-00011.safetensors.partial").write_bytes(b"cut short")
    subprocess.run(command("killed"), check=True, env=os.environ)
    generate_dataset(ddpm_pipeline(), tmp_path / "whole", request(seeds=range(24)), progress=False)
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert all(path.stat().st_mtime_ns == before[path.name] for path in shards("killed") if path.name in before)
    assert_same(contents(tmp_path / "killed"), contents(tmp_path / "whole"))


def test_processes_share_a_folder(tmp_path, whole):
    """torchrun, which accelerate launch is on accelerators: two processes, disjoint units, the same labels."""
    script = tmp_path / "run.py"
    text = "from test_dataset import ddpm_pipeline, generate_dataset, request\n"
    script.write_text(text + f"generate_dataset(ddpm_pipeline(), {str(tmp_path / 'shared')!r}, request(), progress=False)\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(launch, check=True, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True)
    shared = GeometryDataset(tmp_path / "shared")
    made_by = []
    for path in shared.shards:
        with safe_open(path, "pt") as shard:
            made_by.append(shard.metadata()["process"])
    assert made_by == ["0", "1", "0"]
    assert shared.tensors["seed"].tolist() == whole.tensors["seed"].tolist()
    torch.testing.assert_close(shared.tensors["psi"], whole.tensors["psi"], atol=1e-3, rtol=0)


def test_samples_are_taken_together_only_where_they_are_independent():
    x, weight = randn(3, 5, seed=1), randn(5, 5, seed=2)
    levels = {"alpha_t": 0.8, "sigma_t": 0.6}

    def alone(points):
        return (points @ weight).tanh()

    probe = Probe(plan_probe(5, method="dense"))
    for coupling, together in ((0.0, True), (0.3, False)):

        def batch(points, coupling=coupling):
            return alone(points) + coupling * points.mean(dim=0)

        denoiser = Denoiser(batch, select_fn=lambda i: alone, **levels)
        spectra = _batch_spectra(denoiser, SimpleNamespace(sample=x, engine="replay"), request(), probe)
        assert (spectra is not None) == together
        if together:
            expected = [torch.linalg.svdvals(0.8 * torch.func.jacrev(alone)(point)) for point in x]
            found = torch.stack([s.singular_values for s in spectra]).float()
            torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
