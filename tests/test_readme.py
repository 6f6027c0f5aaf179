"""The README is short, its code runs, and CI runs its two commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from catalogue import CASES

from diffusers_geometry.bundled import DIGITS
from diffusers_geometry.mixin import GEOMETRY_PIPELINES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_length_and_links():
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\((?!http)(.*?)\)", README):
        assert (ROOT / target).exists(), target


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    assert len(blocks("python")) == 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["geometry", "geometry.png"]
    printed = capsys.readouterr().out
    assert "consolidation" in printed or "coverage" in printed
    assert "0.5000, 0.5000" in printed


def test_the_two_commands_are_one_line_each_and_ci_runs_them():
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python3 -m venv")]
    assert [c.rsplit("/", 1)[-1] for c in commands] == ["hf-geometry analyze", "python -m pytest -q"]
    script = (ROOT / ".ci" / "run").read_text()
    for pattern in re.findall(r"readme_command '(.*?)'", script):
        assert sum(bool(re.search(pattern, c)) for c in commands) == 1


def test_the_figure_is_made_by_the_command_that_the_readme_names():
    assert "examples/analyze_digits.py --figure docs/digits.png" in README
    assert (ROOT / "docs" / "digits.png").stat().st_size > 10_000


def test_every_geometry_class_has_a_custom_pipeline():
    shims = {p.parent.name: p.read_text() for p in (ROOT / "pipelines").glob("*/pipeline.py")}
    assert len(shims) == len(GEOMETRY_PIPELINES) + 1
    pattern = r"from diffusers_geometry\.(?:mixin|vector) import (\w+)  # noqa: F401\n"
    assert {re.fullmatch(pattern, t).group(1) for t in shims.values()} == {*GEOMETRY_PIPELINES, "GeometryVectorPipeline"}


@pytest.mark.parametrize(
    ("shim", "model", "printed"),
    [
        ("ddpm", DIGITS, "GeometryDDPMPipeline (1, 64)"),
        ("vector", ROOT / "examples" / "zoo" / "linear-manifold", "GeometryVectorPipeline (1, 100)"),
    ],
    ids=["ddpm", "vector"],
)
def test_custom_pipelines_load_from_a_foreign_folder(shim, model, printed, tmp_path):
    code = (
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(model)!r}, custom_pipeline={str(ROOT / 'pipelines' / shim)!r}, "
        "trust_remote_code=True)\n"
        "trace = pipe.analyze_geometry(num_inference_steps=3, record_steps=[1], progress=False)\n"
        "print(type(pipe).__name__, trace.steps[0].singular_values.shape)\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == printed


ZOO = ROOT / "examples" / "zoo"
OTHERS = {
    "ddim": ("GeometryDDIMPipeline", DIGITS), "dit": ("GeometryDiTPipeline", ZOO / "dit-mnist"),
    "stable_diffusion": ("GeometryStableDiffusionPipeline", ZOO / "sd-mnist"),
    "stable_diffusion_3": ("GeometryStableDiffusion3Pipeline", ZOO / "sd3-mnist"),
    "stable_diffusion_xl": ("GeometryStableDiffusionXLPipeline", "StableDiffusionXLPipeline"),
    "flux": ("GeometryFluxPipeline", "FluxPipeline"), "pixart_alpha": ("GeometryPixArtAlphaPipeline", "PixArtAlphaPipeline"),
}  # fmt: skip


@pytest.mark.parametrize("shim", OTHERS)
def test_the_other_custom_pipelines_load_from_a_foreign_folder(shim, tmp_path):
    name, model = OTHERS[shim]
    if isinstance(model, str):  # a tiny one of the conformance suite
        next(case.build for case in CASES if case.name == model)().save_pretrained(tmp_path / "model")
        model = tmp_path / "model"
    # Text encoders that a class does not call optional are named when a folder has none.
    absent = "".join(f", {part}=None" for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")) * (shim == "flux")
    code = (
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(model)!r}, custom_pipeline={str(ROOT / 'pipelines' / shim)!r}, "
        f"trust_remote_code=True{absent})\n"
        "print(type(pipe).__name__, hasattr(pipe, 'analyze_geometry'))\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == f"{name} True"
