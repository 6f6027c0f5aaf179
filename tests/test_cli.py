"""The command line: the main job, its files, and one-line errors with exit status 2."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ddpm_pipeline, dit_pipeline

from diffusers_geometry import GeometryTrace
from diffusers_geometry.cli import main


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    ddpm_pipeline().save_pretrained(folder / "ddpm")
    dit_pipeline().save_pretrained(folder / "dit")
    for name, text in {"strange": '{"_class_name": "NoSuchPipeline"}', "list": "[1]", "noise": "{"}.items():
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text(text)
    return folder


def test_the_main_job(tmp_path, capsys):
    """No argument: the bundled digits, a table, a trace and a figure."""
    assert run("analyze", "--output", str(tmp_path / "out"), "--steps", "20", "--record-steps", "4") == 0
    printed = capsys.readouterr().out
    assert "DDPMPipeline, DDPMScheduler, map denoised" in printed
    assert "anifold dimension" in printed
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["geometry.png", "trace.json", "trace.safetensors"]
    trace = GeometryTrace.from_pretrained(tmp_path / "out")
    assert [step.index for step in trace.steps] == [0, 6, 13, 19]
    assert all(f"{step.effective_dimension.value[0]:.2f}" in printed for step in trace.steps)
    assert trace.steps[0].phase == "trivial"
    assert trace.steps[-1].effective_dimension.value[0] > 20


def test_json_is_for_machines(models, tmp_path, capsys):
    arguments = ("--steps", "4", "--record-steps", "0,-1", "--call", "batch_size=2", "--output", str(tmp_path), "--json")
    assert run("analyze", str(models / "ddpm"), *arguments, "--spectrum", "central_difference", "--of", "score") == 0
    document = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["sample"]) for row in document["steps"]] == [(0, 0), (0, 1), (3, 0), (3, 1)]
    assert document["settings"]["of"] == "score"
    assert len(document["manifold_dim"]) == 2


def test_class_labels_and_seed(models, tmp_path):
    traces = []
    for seed in ("1", "1", "2"):
        out = tmp_path / f"{seed}-{len(traces)}"
        arguments = ("--class-label", "3", "--class-label", "5", "--steps", "3", "--record-steps", "1", "--seed", seed)
        assert run("analyze", str(models / "dit"), *arguments, "--output", str(out)) == 0
        traces.append(GeometryTrace.from_pretrained(out).steps[0].singular_values)
    assert traces[0].shape == (2, 256)
    assert np.array_equal(traces[0], traces[1])
    assert not np.array_equal(traces[0], traces[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{models}/none",), "no model '.*none'.*Expected an existing folder or a Hub id such as org/name"),
        (("org/none",), "no model 'org/none'.*Expected an existing folder or a Hub id such as org/name"),
        (("{models}",), "holds no pipeline. Expected a folder with a model_index.json"),
        (("{models}/ddpm", "--steps", "0"), "--steps 0 is not possible. Expected at least 1"),
        (("{models}/ddpm", "--steps", "4", "--record-steps", "9,"), "is not a choice of steps"),
        (("{models}/ddpm", "--steps", "4", "--record-steps", "0,9"), r"has \[9\]. Expected positions from -4 to 3"),
        (("{models}/ddpm", "--record-steps", "0"), "Expected a positive number of steps"),
        (("{models}/ddpm", "--prompt", "a seven"), "DDPMPipeline takes no argument 'prompt'. Expected one of: batch_size"),
        (("{models}/dit",), "DiTPipeline needs class_labels. Expected --prompt, --class-label or --call"),
        (("{models}/ddpm", "--call", "batch_size"), "has no value. Expected key=value"),
        (("{models}/ddpm", "--spectrum", "magic"), "spectrum='magic'. Expected one of"),
        (("{models}/ddpm", "--steps", "2", "--max-products", "3"), "max_products=3 cannot be met"),
        (("{models}/ddpm", "--dtype", "int8"), "dtype 'int8' is not known. Expected one of float32, bfloat16, float16"),
        (("{models}/ddpm", "--device", "abacus"), "--device abacus cannot be used here"),
        (("{models}/ddpm", "--device", "cuda:99"), "--device cuda:99 cannot be used here"),
        (("{models}/ddpm", "--steps", "abc"), "Invalid value for '--steps'.*Try --help"),
        (("{models}/ddpm", "--call", "generator=5"), "--call generator is set by --seed"),
        (("{models}/ddpm", "--call", "num_inference_steps=0"), "--call num_inference_steps is set by --steps"),
        (("{models}/ddpm", "--max-memory", "0"), "max_probe_memory=0. Expected a positive integer"),
        (("{models}/ddpm", "--steps", "2", "--max-seconds", "1e-9"), "max_probe_seconds=1e-09. Expected at least"),
        (("{models}/dit", "--class-label", "5000"), "--class-label 5000 is not a class of this model. Expected 0 to 999"),
        (("{models}/strange",), "names the pipeline class 'NoSuchPipeline'. Expected one of diffusers"),
        (("{models}/list",), "names the pipeline class None"),
        (("{models}/noise",), "is not JSON"),
        (("{models}/ddpm", "--output", "{models}/ddpm/model_index.json/out"), "cannot write to --output"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, message, models, tmp_path, capsys, monkeypatch):
    import re

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [a.format(models=models) for a in arguments]
    output = tmp_path / "out"
    extra = () if "--output" in arguments else ("--output", str(output))
    assert run("analyze", *arguments, *extra) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert error.startswith("hf-geometry: ")
    assert "Traceback" not in error
    assert not output.exists()


def test_plan_says_what_analyze_would_take(models, tmp_path, capsys):
    arguments = (str(models / "ddpm"), "--steps", "4", "--record-steps", "2", "--call", "batch_size=3", "--flipd", "--json")
    assert run("plan", *arguments) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["method"], planned["dimension"], planned["steps"], planned["samples"]) == ("dense", 64, 2, 3)
    assert planned["products"] == 2 * 3 * (64 + 64)
    assert planned["seconds"] > 0
    assert planned["memory_bytes"] > 36 * 64**2
    assert run("analyze", *arguments, "--output", str(tmp_path)) == 0
    spent = json.loads(capsys.readouterr().out)
    assert sum(row["products"] for row in spent["steps"]) == planned["products"]
    assert all(row["flipd"] is not None and row["flipd_sem"] == 0 for row in spent["steps"])


def test_plan_has_a_table(models, capsys):
    assert run("plan", str(models / "ddpm"), "--steps", "4", "--spectrum", "golub_kahan", "--num-singular-values", "3") == 0
    printed = capsys.readouterr().out
    assert "golub_kahan" in printed
    assert "seconds_per_forward_product" in printed


def test_bfloat16_pipelines(models, tmp_path, capsys):
    arguments = (str(models / "ddpm"), "--dtype", "bfloat16", "--steps", "2", "--record-steps", "1", "--output", str(tmp_path))
    assert run("analyze", *arguments) == 0
    assert GeometryTrace.from_pretrained(tmp_path).images.dtype == torch.bfloat16


def test_an_unknown_scheduler_is_refused_by_name(models, tmp_path, capsys):
    import diffusers

    pipe = ddpm_pipeline()
    pipe.scheduler = diffusers.ScoreSdeVeScheduler()
    pipe.save_pretrained(tmp_path / "model")
    assert run("analyze", str(tmp_path / "model"), "--output", str(tmp_path / "out")) == 2
    assert "ScoreSdeVeScheduler is not a scheduler whose noise levels are known" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused(models, tmp_path, capsys):
    blocked = "/proc/geometry" if os.path.isdir("/proc") else str(tmp_path / "file")
    assert run("analyze", str(models / "ddpm"), "--output", blocked) == 2
    assert "cannot write to --output" in capsys.readouterr().err


def test_help_is_quick_and_loads_neither_torch_nor_diffusers():
    code = "import sys; from diffusers_geometry.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'diffusers', 'numpy', 'matplotlib', 'transformers'}))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 2
    assert done.stdout.splitlines()[-1] == "[]"
    assert "analyze" in done.stdout


def test_module_and_console_script_are_the_same():
    for command in ([sys.executable, "-m", "diffusers_geometry"], [Path(sys.executable).parent / "hf-geometry"]):
        done = subprocess.run([*command, "analyze", "--help"], capture_output=True, text=True, check=True)
        assert "--record-steps" in done.stdout
