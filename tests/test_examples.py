"""The example scripts run, stay short, and the shipped model is what its card says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from diffusers_geometry.bundled import DIGITS

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(script, *arguments):
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.name)
def test_scripts_are_short_and_have_a_main(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 60
    assert 'if __name__ == "__main__":\n    main()' in text


def test_analyze_digits(tmp_path):
    printed = run("analyze_digits.py", "--figure", tmp_path / "digits.png", "--record-steps", 3)
    assert len(printed.splitlines()) == 4
    assert (tmp_path / "digits.png").stat().st_size > 10_000


@pytest.mark.slow
def test_training_resumes_where_it_stopped(tmp_path):
    """A run that is stopped after two steps and taken up again ends in the same weights, bit for bit."""

    def train(output):
        run("train_digits.py", "--steps", 4, "--save-every", 2, "--checkpoint", tmp_path / "state", "--output", tmp_path / output)
        return load_file(tmp_path / output / "unet" / "diffusion_pytorch_model.safetensors")

    whole = train("whole")
    shutil.rmtree(tmp_path / "state" / "step4")
    (tmp_path / "state" / "done").write_text("2")
    resumed = train("resumed")
    assert whole.keys() == resumed.keys()
    assert all((whole[name] == resumed[name]).all() for name in whole)
    assert (tmp_path / "state" / "done").read_text() == "4"


@pytest.mark.slow
def test_the_card_is_written_from_measurements(tmp_path):
    """A short evaluation of the shipped weights comes near the long one, and fills the card."""
    run("evaluate_digits.py", "--samples", 200, "--steps", 200, "--output", tmp_path)
    figures = json.loads((tmp_path / "quality.json").read_text())
    assert figures["classifier_accuracy"] >= 0.97
    assert figures["confident_share"] >= 0.85
    assert f"| {figures['confident_share']:.1%} |" in (tmp_path / "README.md").read_text()


def test_the_shipped_model_is_small_safe_and_good():
    files = [p for p in DIGITS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 2 * 2**20
    assert {p.suffix for p in files} == {".json", ".md", ".safetensors"}
    weights = load_file(DIGITS / "unet" / "diffusion_pytorch_model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {"float16"}
    figures = json.loads((DIGITS / "quality.json").read_text())
    assert sum(w.size for w in weights.values()) == figures["parameters"] <= 0.8e6
    assert figures["samples"] == 500
    assert figures["classifier_accuracy"] >= 0.97
    assert figures["confident_share"] >= 0.85
    assert figures["smallest_class_share"] >= 0.04
    assert figures["frechet_generated_to_held_out"] <= 10 * figures["frechet_between_real_halves"]
    card = (DIGITS / "README.md").read_text()
    assert card == (ROOT / "examples" / "digits_card.md").read_text().format(**figures)
