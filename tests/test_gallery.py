"""The committed audits are of the shipped weights, complete, self-contained, and what their README says."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from diffusers_geometry.audit import Audit
from diffusers_geometry.bundled import DIGITS
from diffusers_geometry.hub import weight_hashes

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "examples" / "audits"
ZOO = ROOT / "examples" / "zoo"
NAMES = ["digits", *sorted(path.parent.name for path in ZOO.glob("*/model_index.json"))]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_audits", GALLERY / "make_audits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_an_audit_is_of_the_shipped_weights_and_complete(name, script):
    document = Audit.from_folder(GALLERY / name).document  # refuses another schema
    assert document["model"]["weights"] == weight_hashes(DIGITS if name == "digits" else ZOO / name)
    request = script.requests()[name]
    assert document["request"]["seeds"] == list(request["seeds"])
    assert document["request"]["prompts"] == list(request.get("prompts") or request.get("class_labels") or [None])
    assert [unit["status"] for unit in document["units"]] == ["done"] * document["plan"]["units"]
    assert all(unit["non_finite"] == 0 for unit in document["units"])
    arrays = load_file(GALLERY / name / "spectra.safetensors")
    assert arrays["sigma"].shape == (len(document["units"]), len(document["steps"]))
    for unit, values in zip(document["units"], arrays["singular_values"], strict=True):
        assert [step["spectral_norm"] for step in unit["steps"]] == pytest.approx([float(v[0]) for v in values], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_self_contained(name):
    page = (GALLERY / name / "index.html").read_text()
    assert page.count("</html>") == 1
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)[1]
    assert "default-src &#39;none&#39;" in policy or "default-src 'none'" in policy
    loaded = re.findall(r'<(?:img|script|link|iframe|source|video|object|embed)\b[^>]*?\b(?:src|href|data)="(.*?)"', page)
    assert all(target.startswith("data:") for target in loaded), loaded
    assert not re.search(r"@import|url\((?!['\"]?(?:data:|#))", page)


def test_memorisation_of_the_planted_captions_is_judged():
    document = json.loads((GALLERY / "sd-mnist" / "audit.json").read_text())
    combined = document["memorization"]["combined"]
    assert combined["fitted_on"] == "labels"
    assert combined["auroc"]["low"] <= combined["auroc"]["value"] <= combined["auroc"]["high"]
    assert combined["roc"]["fpr"][0] == 0
    assert combined["roc"]["tpr"][-1] == 1


def test_the_readme_is_what_the_script_makes_of_the_audits(script):
    assert (GALLERY / "README.md").read_text() == script.readme()


def test_the_gallery_is_small():
    files = [path for path in GALLERY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    kinds = {".py", ".md", ".html", ".json", ".safetensors", ".png"}
    assert {path.suffix for path in files} == kinds
