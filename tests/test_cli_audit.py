"""``audit``, ``compare`` and ``report`` from the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import hub_server
import pytest
import torch
from audit_tiny import text_pipeline, vector_pipeline
from peft import LoraConfig, get_peft_model_state_dict
from test_cli import run

from diffusers_geometry.cli_audit import numbers
from diffusers_geometry.loading import UsageError

COMMON = ("--steps", "6", "--record-steps", "3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    vector_pipeline().save_pretrained(folder / "model")
    other = vector_pipeline()
    with torch.no_grad():
        other.network.last.weight *= 1.2
    other.save_pretrained(folder / "other")
    text_pipeline(folder / "words").save_pretrained(folder / "text")
    return folder


@pytest.fixture(scope="module")
def audited(folders):
    assert run("audit", str(folders / "model"), *COMMON, "--seeds", "0-9", "--output", str(folders / "audit"), "--yes") == 0
    return folders / "audit"


def test_an_audit_and_its_files(audited, folders, capsys):
    """Continued, it says the same again; every file of docs/audit.md is there."""
    assert run("audit", str(folders / "model"), *COMMON, "--seeds", "0-9", "--output", str(audited)) == 0
    printed = capsys.readouterr().out
    assert "10 of 10 units done" in printed
    assert f"Report in {audited / 'index.html'}" in printed
    names = {path.name for path in audited.iterdir()}
    assert {"plan.json", "audit.json", "spectra.safetensors", "units", "index.html", "report.md", "figures"} <= names
    document = json.loads((audited / "audit.json").read_text())
    assert document["model"]["name"] == str(folders / "model")
    assert set(document["model"]["weights"]) == {
        "network/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"
    }  # fmt: skip
    assert document["request"]["seeds"] == list(range(10))
    assert document["provenance"]["repeat"] == "hf-geometry audit --repeat FOLDER --output OTHER"


def test_without_a_terminal_a_limit_is_needed(folders, capsys):
    arguments = ("audit", str(folders / "model"), *COMMON, "--output", str(folders / "refused"))
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert "4 units of 3 recorded steps, 8 dimensions, by dense: 96 products" in said
    assert "there is no terminal to confirm the plan at. Expected --max-products 96 or --max-seconds" in said
    assert run(*arguments, "--max-products", "95") == 2
    assert "max_products=95 is less than the audit needs, 96" in capsys.readouterr().err
    assert run(*arguments, "--yes", "--max-seconds", "1e-9") == 2
    assert not (folders / "refused").exists()
    assert run(*arguments, "--max-products", "96", "--json") == 0
    assert json.loads(capsys.readouterr().out)["plan"]["products"] == 96


def test_at_a_terminal_the_plan_is_confirmed(folders):
    """A real pseudo-terminal: the plan, a question, and "n" leaves nothing behind."""
    import pty

    main, side = pty.openpty()
    command = [sys.executable, "-m", "diffusers_geometry", "audit", str(folders / "model"), *COMMON, "--output", str(folders / "n")]
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side)
    os.close(side)
    said = b""
    while b"Start? [Y/n]" not in said:
        said += os.read(main, 1024)
    assert b"4 units of 3 recorded steps" in said
    os.write(main, b"n\n")
    assert process.wait(timeout=60) == 1
    os.close(main)
    assert not (folders / "n").exists()


def test_prompts_labels_and_a_poisoned_prompt_from_files(folders, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a\n\nb c\n d \n")
    (tmp_path / "labels.txt").write_text("0\n-\n1\n")
    arguments = ("audit", str(folders / "text"), "--steps", "4", "--record-steps", "1", "--seeds", "5", "--yes", "--json")
    options = ("--call", "height=16", "--call", "width=16", "--spectrum", "golub_kahan", "--num-singular-values", "2")
    files = ("--prompts", str(tmp_path / "prompts.txt"), "--labels", str(tmp_path / "labels.txt"))
    options += ("--scores", "guidance_norm,commitment")
    assert run(*arguments, *options, *files, "--output", str(tmp_path / "out")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["request"]["prompts"] == ["a", "b c", "d"]
    assert document["request"]["labels"] == [False, None, True]
    assert [unit["status"] for unit in document["units"]] == ["done", "done", "failed"]
    assert set(document["units"][0]["scores"]) == {"guidance_norm", "commitment"}
    assert document["request"]["call"] == {"height": 16, "width": 16, "num_inference_steps": 4}
    assert (tmp_path / "out" / "images" / "00001.png").is_file()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "FloatingPointError" in page


def test_two_audits_are_compared(audited, folders, capsys):
    second = str(folders / "second")
    assert run("audit", str(folders / "other"), *COMMON, "--seeds", "0-9", "--output", second, "--yes", "--scores", "none") == 0
    capsys.readouterr()
    assert run("compare", str(audited), second, "--output", str(folders / "comparison.json")) == 0
    printed = capsys.readouterr().out
    assert "10 pairs of units" in printed
    assert " *" in printed
    written = json.loads((folders / "comparison.json").read_text())
    assert any(d["is_significant"] for d in written["differences"])
    assert run("compare", str(audited), second, "--json") == 0
    assert json.loads(capsys.readouterr().out) == written
    assert run("compare", str(audited), str(folders)) == 2
    assert "holds no audit.json" in capsys.readouterr().err


def test_a_model_is_compared_with_its_lora_and_with_half_precision(folders, tmp_path, capsys):
    """The adapter is part of the weights; the same weights in bfloat16 differ less from the base than the adapter does."""
    pipe = text_pipeline(tmp_path / "words")
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.unet)
    type(pipe).save_lora_weights(tmp_path, unet_lora_layers=layers, weight_name="base.safetensors")
    options = (
        "--prompt",
        "a",
        "--prompt",
        "b",
        "--steps",
        "4",
        "--record-steps",
        "1",
        "--seeds",
        "0-2",
        "--yes",
        "--scores",
        "none",
    )
    options += ("--call", "height=16", "--call", "width=16", "--spectrum", "golub_kahan", "--num-singular-values", "2")
    kinds = {"base": (), "lora": ("--lora", str(tmp_path / "base.safetensors")), "half": ("--dtype", "bfloat16")}
    for name, more in kinds.items():
        assert run("audit", str(folders / "text"), *options, *more, "--output", str(tmp_path / name)) == 0
    documents = {name: json.loads((tmp_path / name / "audit.json").read_text()) for name in kinds}
    assert documents["base"]["model"]["lora"] is None
    assert "lora/base.safetensors" in documents["lora"]["model"]["weights"]
    assert documents["lora"]["model"]["weights_sha256"] != documents["base"]["model"]["weights_sha256"]
    moved = {name: abs(d["geometry"][0]["spectral_norm"]["value"] - documents["base"]["geometry"][0]["spectral_norm"]["value"])
             for name, d in documents.items()}  # fmt: skip
    assert 0 < moved["half"] < moved["lora"]
    capsys.readouterr()
    assert run("compare", str(tmp_path / "base"), str(tmp_path / "lora")) == 0
    assert "6 pairs of units" in capsys.readouterr().out
    assert run("audit", "--repeat", str(tmp_path / "lora"), "--output", str(tmp_path / "again"), "--yes") == 0
    assert "0 moved beyond their errors" in capsys.readouterr().out
    assert run("audit", str(folders / "text"), *options, "--lora", str(tmp_path), "--output", str(tmp_path / "no")) == 2
    assert "is no safetensors file. Expected one that save_lora_weights wrote" in capsys.readouterr().err
    assert run("audit", str(folders / "model"), *COMMON, *kinds["lora"], "--output", str(tmp_path / "no"), "--yes") == 2
    assert "GeometryVectorPipeline takes no adapters" in capsys.readouterr().err


def test_an_audit_is_repeated(audited, folders, capsys):
    """The model is found by the name that the plan has; other weights there are refused."""
    out = str(folders / "again")
    assert run("audit", "--repeat", str(audited), "--output", out, "--yes") == 0
    printed = capsys.readouterr().out
    assert "0 moved beyond their errors" in printed
    assert (folders / "again" / "index.html").is_file()
    assert run("audit", str(folders / "other"), "--repeat", str(audited), "--output", str(folders / "no"), "--yes") == 2
    said = capsys.readouterr().err
    assert "is not the model of" in said
    assert "network/diffusion_pytorch_model.safetensors" in said
    assert run("audit", "--repeat", str(audited), "--output", str(audited), "--yes") == 2
    assert "is the audit that is to be repeated" in capsys.readouterr().err
    assert run("audit", "--repeat", str(audited), "--output", out, "--prompt", "a") == 2
    assert "--repeat takes everything from the plan; --prompt is given too" in capsys.readouterr().err
    assert run("audit", "--repeat", str(audited), "--output", out, "--dtype", "bfloat16") == 2
    assert "--repeat takes everything from the plan; --dtype is given too" in capsys.readouterr().err


def test_a_report_is_made_again(audited, capsys):
    before = (audited / "audit.json").read_text()
    for name in ("audit.json", "index.html", "spectra.safetensors"):
        (audited / name).unlink()
    assert run("report", str(audited)) == 0
    assert (audited / "audit.json").read_text() == before
    assert (audited / "index.html").is_file()
    (audited / "units" / "00004.safetensors").rename(audited / "kept")
    assert run("report", str(audited)) == 2
    assert "holds 9 of 10 units. Expected all: run the audit again to continue it" in capsys.readouterr().err
    (audited / "kept").rename(audited / "units" / "00004.safetensors")


def test_a_report_is_made_again_of_an_audit_that_was_kept_without_its_units(audited, tmp_path):
    """As published and committed audits are: plan.json is there, so that they can be repeated, and the units are not."""
    for name in ("plan.json", "audit.json", "spectra.safetensors"):
        shutil.copy(audited / name, tmp_path)
    assert run("report", str(tmp_path)) == 0
    assert (tmp_path / "index.html").is_file()
    assert (tmp_path / "audit.json").read_bytes() == (audited / "audit.json").read_bytes()


def test_ctrl_c_is_one_line_and_what_is_done_is_kept(folders, capsys):
    """SIGINT to the command itself."""
    out = folders / "interrupted"
    arguments = ("audit", str(folders / "model"), "--steps", "6", "--seeds", "0-199", "--output", str(out), "--yes")
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusers_geometry", *arguments], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell would ignore it
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while len(list(out.glob("units/*.safetensors"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.splitlines()[-1] == f"hf-geometry: stopped; what is finished is kept in {out}. Run the same again to continue."
    assert "Traceback" not in said
    assert 2 <= len(list(out.glob("units/*.safetensors"))) < 200


def test_a_model_of_nan_has_a_report_that_says_so(folders, tmp_path, capsys):
    pipe = vector_pipeline()
    with torch.no_grad():
        pipe.network.last.weight[:] = torch.nan
    pipe.save_pretrained(tmp_path / "nan")
    assert run("audit", str(tmp_path / "nan"), *COMMON, "--seeds", "0-2", "--output", str(tmp_path / "out"), "--yes") == 1
    printed = capsys.readouterr()
    assert "0 of 3 units done" in printed.out
    assert "no unit could be timed: FloatingPointError" in printed.err
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("FloatingPointError") >= 1
    assert "All 3 runs failed" in page


def test_a_private_model_of_the_hub_is_pinned_repeated_and_its_audit_published(folders, tmp_path, monkeypatch, capfd):
    """A real server: the commit is stored, a later push changes nothing, and no file shows the token."""
    hub_server.isolate(monkeypatch, tmp_path / "home")
    monkeypatch.setenv("HF_TOKEN", hub_server.OWNER)
    files, changed = (
        {str(p.relative_to(folders / name)): p.read_bytes() for p in (folders / name).rglob("*") if p.is_file()}
        for name in ("model", "other")
    )
    with hub_server.running() as hub:
        hub_server.point(monkeypatch, hub.endpoint)
        sha = hub.add("owner/vectors", files, private=True)
        arguments = ("audit", "owner/vectors", *COMMON, "--seeds", "0,1", "--output", str(tmp_path / "out"), "--yes")
        assert run(*arguments, "--publish", "owner/audit") == 0
        assert f"{hub.endpoint}/datasets/owner/audit" in capfd.readouterr().out
        assert {"audit.json", "index.html", "plan.json"} <= set(hub.repos["dataset", "owner/audit"].files())
        document = json.loads((tmp_path / "out" / "audit.json").read_text())
        assert (document["model"]["name"], document["model"]["revision"]) == ("owner/vectors", sha)
        repository = hub.repos["model", "owner/vectors"]
        assert repository.commit("main", changed, sha) != sha
        assert run("audit", "--repeat", str(tmp_path / "out"), "--output", str(tmp_path / "again"), "--yes") == 0
        assert "0 moved beyond their errors" in capfd.readouterr().out
        assert run(*arguments) == 2
        assert "holds another audit: model revision was" in capfd.readouterr().err
    texts = [p.read_bytes() for folder in ("out", "again") for p in (tmp_path / folder).rglob("*") if p.is_file()]
    assert len(texts) > 15
    assert not any(hub_server.OWNER.encode() in text for text in texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "3-1"), "--seeds '3-1' is no list of numbers. Expected 0-3, or 0,5,7-9"),
        (("--seeds", "a"), "--seeds 'a' is no list of numbers"),
        (("--steps", "0"), "--steps 0 is not possible"),
        (("--record-steps", "soon"), "--record-steps 'soon' is not a choice of steps"),
        (("--prompt", "a"), "takes no argument 'prompt'"),
        (("--prompts", "{folder}/none.txt"), "cannot read --prompts .*none.txt"),
        (("--prompts", "{folder}/empty.txt"), "--prompts .*empty.txt is empty"),
        (("--prompts", "{folder}/list.json"), "is no list of the right kind"),
        (("--labels", "{folder}/maybe.txt"), "holds 'maybe'. Expected 1, 0 or -"),
        (("--labels", "{folder}/two.txt"), "Expected True, False or None for each of 1 prompts"),
        (("--scores", "fortune"), r"scores has \['fortune'\]"),
        (("--publish-as", "book"), "--publish-as 'book' is not known"),
        (("--reference", "{folder}"), "holds no audit.json"),
        (("--psi-rank", "9"), "psi_rank=9. Expected at most 8"),
        (("--dtype", "int8"), "dtype 'int8' is not known"),
    ],
)
def test_errors_are_one_line(arguments, message, folders, capsys):
    import re

    for name, text in {"empty": "\n", "maybe": "maybe\n", "two": "1\n0\n"}.items():
        (folders / f"{name}.txt").write_text(text)
    (folders / "list.json").write_text("[1, 2]")
    arguments = [a.format(folder=folders) for a in arguments]
    assert run("audit", str(folders / "model"), "--yes", *arguments, "--output", str(folders / "wrong")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-geometry: ")
    assert re.search(message, error), error
    assert not (folders / "wrong" / "plan.json").exists()


def test_numbers():
    assert numbers("--seeds", "0-3") == [0, 1, 2, 3]
    assert numbers("--seeds", "5, 0,7 - 9") == [5, 0, 7, 8, 9]
    with pytest.raises(UsageError, match="'1,'"):
        numbers("--seeds", "1,")
