"""``train-reward`` and ``generate`` from the command line."""

import json
import shutil

import pytest
from PIL import Image
from test_cli import run
from tiny import ddpm_pipeline

from diffusers_geometry.reward import GeometryReward


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    ddpm_pipeline().save_pretrained(folder / "model")
    return folder


TRAIN = ("--seeds", "120", "--steps", "5", "--record-steps", "2,3", "--psi-rank", "4", "--batch-size", "30", "--train-steps", "4")


def test_labels_a_reward_and_a_guided_image(folders, capsys):
    model, out = str(folders / "model"), folders / "out"
    assert run("train-reward", model, *TRAIN, "--output", str(out), "--plan") == 0
    assert "240 labels in 4 units by dense, engine replay: 15360 products" in capsys.readouterr().out
    assert not out.exists()
    assert run("train-reward", model, *TRAIN, "--output", str(out)) == 0
    printed = capsys.readouterr().out
    assert "240 labels in 4 units" in printed
    assert "; 12 test labels" in printed
    assert {p.name for p in out.iterdir()} == {
        "README.md", "calibration.png", "config.json", "diffusion_pytorch_model.safetensors", "labels", "metrics.json"
    }  # fmt: skip
    card = (out / "README.md").read_text()
    assert "trunk: a copy of the model's encoder" in card
    assert "psi over the 4 largest singular values" in card
    assert GeometryReward.from_pretrained(out).config.psi_rank == 4
    shards = {path.name: path.stat().st_mtime_ns for path in (out / "labels").iterdir()}
    for descriptor in ("nu", "delta"):  # on the labels that are there
        other = folders / descriptor
        shutil.copytree(out / "labels", other / "labels", copy_function=shutil.copy2)
        assert run("train-reward", model, *TRAIN, "--output", str(other), "--descriptor", descriptor) == 0
        assert {path.name: path.stat().st_mtime_ns for path in (other / "labels").iterdir()} == shards
        assert GeometryReward.from_pretrained(other).config.descriptor == descriptor
        assert f"# Reward: {descriptor} of the denoiser's Jacobian" in (other / "README.md").read_text()
    assert "knots within 0.1 of the noise per coordinate, 4 directions, mean of 4 draws" in (other / "README.md").read_text()
    capsys.readouterr()

    common = (model, "--steps", "5", "--seed", "3", "--json")
    plain, guided = folders / "plain", folders / "guided"
    assert run("generate", *common, "--output", str(plain)) == 0
    assert json.loads(capsys.readouterr().out) == {"files": ["image-000.png"], "steps": []}
    options = ("--reward", str(out), "--scale", "3", "--start", "0", "--stop", "1")
    assert run("generate", *common, "--output", str(guided), *options) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["position"] for row in document["steps"]] == [2, 3]
    assert all(0 < row["share_of_estimate"][0] < 10 for row in document["steps"])
    images = [Image.open(folder / "image-000.png") for folder in (plain, guided)]
    assert images[0].size == (8, 8)
    assert images[0].tobytes() != images[1].tobytes()
    assert run("generate", model, "--steps", "5", "--output", str(guided), *options) == 0
    assert "psi (change of x_0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("generate", "{model}", "--reward", "{folder}/nothing"),
            "no reward in .*nothing.*Expected a folder that train-reward wrote",
        ),
        (("generate", "{model}", "--reward", "{model}/unet"), "holds a UNet2DModel. Expected a GeometryReward"),
        (("generate", "{model}", "--target", "3"), "--target and --target-bin need a reward. Expected --reward FOLDER"),
        (("train-reward", "{model}", "--prompts", "{folder}/none.txt"), "cannot read --prompts .*none.txt"),
        (("train-reward", "{model}", "--prompts", "{folder}/empty.txt"), "holds no prompt. Expected one a line"),
        (("train-reward", "{model}", "--record-steps", "soon"), "--record-steps 'soon' is not a choice of steps"),
        (("train-reward", "{model}", "--descriptor", "phi"), r"--descriptor 'phi'. Expected one of \('psi', 'nu', 'delta'\)"),
        (("train-reward", "{model}", "--descriptor", "delta", "--no-delta"), "--descriptor 'delta' --no-delta. Expected one of"),
        (("train-reward", "{model}", "--trunk", "oak"), "--trunk 'oak' is not known. Expected auto, network or small"),
        (
            ("train-reward", "{model}", "--max-seconds", "1e-9", "--steps", "4", "--seeds", "2"),
            "max_seconds=1e-09. Expected at least",
        ),
        (("train-reward", "{model}", "--psi-rank", "65", "--steps", "4"), "=65. Expected"),
    ],
)
def test_errors_are_one_line(arguments, message, folders, capsys):
    import re

    (folders / "empty.txt").write_text("\n")
    arguments = [a.format(model=folders / "model", folder=folders) for a in arguments]
    assert run(*arguments, "--output", str(folders / "refused")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-geometry: ")
    assert re.search(message, error), error


def test_a_prompt_pipeline_is_named_when_it_takes_none(folders, capsys):
    (folders / "words.txt").write_text("a seven\n")
    assert (
        run("train-reward", str(folders / "model"), "--prompts", str(folders / "words.txt"), "--output", str(folders / "no")) == 2
    )
    assert "DDPMPipeline takes no argument 'prompt'" in capsys.readouterr().err
