"""The command: its table, files and one-line errors."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_cli import run
from tiny import ddpm_pipeline, dit_pipeline, randn

from diffusers_geometry import TransitionReport


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    ddpm_pipeline().save_pretrained(folder / "ddpm")
    dit_pipeline().save_pretrained(folder / "dit")
    return folder


SMALL = ("--steps", "6", "--parents", "6", "--clones", "2", "--positions", "2", "--batch", "6")


def test_the_bundled_digits(tmp_path, capsys):
    np.save(tmp_path / "data.npy", randn(40, 1, 8, 8).numpy())
    arguments = ("--steps", "12", "--parents", "8", "--batch", "8", "--positions", "3", "--data", str(tmp_path / "data.npy"))
    assert run("transitions", *arguments, "--output", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    report = TransitionReport.load(tmp_path / "out" / "transitions.json")
    assert report.agreements.shape == (8, 3)
    assert report.gesture == "clones"
    assert len(report.recall) == 3
    assert report.table() in printed
    assert (tmp_path / "out" / "transitions.png").stat().st_size > 10_000


def test_json_and_seeds(model, tmp_path, capsys):
    found = []
    save_file({"images": randn(9, 1, 8, 8), "labels": torch.zeros(9)}, tmp_path / "data.safetensors")
    for seed in ("3", "3", "4"):
        options = ("--seed", seed, "--data", str(tmp_path / "data.safetensors"), "--output", str(tmp_path), "--json")
        assert run("transitions", str(model / "ddpm"), *SMALL, *options) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] != found[2]
    assert [row["position"] for row in found[0]["steps"]] == [1, 5]
    assert found[0]["settings"]["num_examples"] == 9


def test_class_labels_are_repeated(model, tmp_path, capsys):
    options = ("--class-label", "7", "--call", "guidance_scale=1.0", "--output", str(tmp_path), "--json")
    assert run("transitions", str(model / "dit"), *SMALL, *options) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["num_parents"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--positions", "some"), "--positions 'some' is no choice of positions. Expected a number, 'all', or 10,40,90"),
        (("--positions", "0,3"), r"branch_positions=\[0, 3\] has \[0\]. Expected from 1 to 5"),
        (("--clones", "1"), "num_clones=1. Expected an integer >= 2"),
        (("--agreement", "1.5"), "agreement_level=1.5. Expected 0.5 < agreement_level < 1"),
        (("--batch", "0"), "--batch 0 is not possible. Expected at least 1"),
        (("--data", "no.npy"), "cannot read no.npy: .*No such file"),
        (("--data", "data.txt"), "data.txt is not a file of examples. Expected .npy or .safetensors"),
        (("--data", "{folder}/two.safetensors"), r"has the tensors \['a', 'b'\]. Expected one, or one named 'images'"),
        (("--held-out", "{folder}/data.npy"), "held_out without data"),
        (("--data", "{folder}/data.npy"), r"data has shape \(3, 2\). Expected samples \(n, 1, 8, 8\)"),
    ],
)
def test_errors_are_one_line(options, message, model, tmp_path, capsys):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "two.safetensors")
    np.save(tmp_path / "data.npy", np.zeros((3, 2)))
    options = [o.format(folder=tmp_path) for o in options]
    output = tmp_path / "out"
    assert run("transitions", str(model / "ddpm"), *SMALL, *options, "--output", str(output)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert error.startswith("hf-geometry: ")
    assert not output.exists()
