"""Models of the Hub: pinned to a commit, safetensors only, refused in one line.

Read from a real self-hosted Hub (olah, offline, plain git repositories), and from a fake for what olah 0.5.4 does not answer as
the Hub does: the newest commit where no revision is named (401), an unknown revision (401 instead of 404), sizes in the model's
information, gates, private models, limits.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from pathlib import Path

import hub_server
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from diffusers_geometry.bundled import DIGITS
from diffusers_geometry.cli import main
from diffusers_geometry.hub import HubError, snapshot, weight_hashes
from diffusers_geometry.hub_errors import redacted
from diffusers_geometry.loading import load_pipeline

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LOADED = ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS)
INDEX = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
SECRET = "hf_" + "SecretSecretSecretSecretSecret9876"


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    hub_server.isolate(monkeypatch, tmp_path / "home")


@pytest.fixture
def hub():
    with hub_server.running() as running:
        yield running


def digits(**more):
    """The bundled model's files as a repository has them."""
    files = {name: (DIGITS / name).read_bytes() for name in (*LOADED, "README.md", "quality.json")}
    return files | {name: data if isinstance(data, bytes) else json.dumps(data).encode() for name, data in more.items()}


def git(folder, *arguments):
    who = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t"}
    done = subprocess.run(["git", "-C", folder, *arguments], env=os.environ | who, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def olah(tmp_path_factory):
    """A Hub server of others, offline, that serves plain git repositories: (endpoint, folder of model repositories)."""
    place = tmp_path_factory.mktemp("olah")
    models = place / "mirrors" / "models" / "tiny"
    for name in ("digits", "large"):
        shutil.copytree(DIGITS, models / name)
        git(models / name, "init", "-q", "-b", "main")
    pointed = models / "large" / WEIGHTS  # as git-lfs stores it: a pointer in git, the content beside
    digest = hashlib.sha256(pointed.read_bytes()).hexdigest()
    stored = models / "large" / ".git" / "lfs" / "objects" / digest[:2] / digest[2:4] / digest
    stored.parent.mkdir(parents=True)
    size = pointed.stat().st_size
    pointed.rename(stored)
    pointed.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n")
    for name in ("digits", "large"):
        git(models / name, "add", "-A")
        git(models / name, "commit", "-q", "-m", "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = place / "olah.toml"
    config.write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{place / "repos"}"\nmirrors-path = ["{place / "mirrors"}"]\n'
        "[accessibility]\noffline = true\n"
    )
    endpoint = f"http://127.0.0.1:{port}"
    with (place / "log").open("w") as log:
        command = [sys.executable, "-m", "olah.server", "-c", str(config), "--log-path", str(place / "logs")]
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=place)
    try:
        for _ in range(200):
            assert server.poll() is None, (place / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{endpoint}/api/models/tiny/digits/revision/main", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError("olah does not answer")
        yield endpoint, models
    finally:
        server.terminate()
        server.wait(10)


def test_a_name_is_pinned_to_its_commit_and_only_what_is_loaded_comes(olah, tmp_path):
    endpoint, models = olah
    first = git(models / "digits", "rev-parse", "HEAD")
    found = snapshot("tiny/digits", cache_dir=tmp_path, endpoint=endpoint)
    assert (found.sha, found.repo_id, found.files) == (first, "tiny/digits", LOADED)
    assert sorted(p.relative_to(found.path).as_posix() for p in found.path.rglob("*") if p.is_file()) == sorted(LOADED)
    assert found.num_bytes == sum((DIGITS / name).stat().st_size for name in LOADED)

    changed = models / "digits" / "scheduler" / "scheduler_config.json"
    changed.write_text(changed.read_text() + "\n")
    git(models / "digits", "commit", "-qam", "two")
    second = snapshot("tiny/digits", cache_dir=tmp_path, endpoint=endpoint)
    assert second.sha == git(models / "digits", "rev-parse", "HEAD") != first
    again = snapshot(found.name, cache_dir=tmp_path, endpoint=endpoint)
    assert (again, found.name) == (found, f"tiny/digits@{first}")
    scheduler = "scheduler/scheduler_config.json"
    hashes, others = weight_hashes(again.path), weight_hashes(second.path)
    assert hashes == {name: hashlib.sha256((DIGITS / name).read_bytes()).hexdigest() for name in (scheduler, WEIGHTS)}
    assert hashes[WEIGHTS] == others[WEIGHTS]
    assert hashes[scheduler] != others[scheduler]


def test_large_files_count_and_come_as_they_are_not_as_pointers(olah, tmp_path):
    endpoint, _ = olah
    size = sum((DIGITS / name).stat().st_size for name in LOADED)
    left = size - (DIGITS / "model_index.json").stat().st_size  # which is read first
    with pytest.raises(HubError, match=rf"would download 1.353 MiB, and max_bytes={left - 1} allows"):
        snapshot("tiny/large", cache_dir=tmp_path, endpoint=endpoint, max_bytes=left - 1)
    assert not list(tmp_path.rglob("*.safetensors"))
    found = snapshot("tiny/large", cache_dir=tmp_path, endpoint=endpoint, max_bytes=left)
    assert found.num_bytes == size
    assert (found.path / WEIGHTS).read_bytes() == (DIGITS / WEIGHTS).read_bytes()
    assert snapshot("tiny/large", cache_dir=tmp_path, endpoint=endpoint, max_bytes=0) == found  # what is cached does not count


def test_every_command_pins_what_it_loads_and_works_offline_afterwards(olah, monkeypatch):
    endpoint, models = olah
    hub_server.point(monkeypatch, endpoint)
    name = f"tiny/large@{git(models / 'large', 'rev-parse', 'HEAD')}"
    online = load_pipeline("tiny/large")
    hub_server.point(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = load_pipeline("tiny/large")
    assert online.name_or_path == offline.name_or_path == name
    bundled = load_pipeline(None)
    for pipe in (online, offline):
        images = pipe(num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        assert (images == bundled(num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images).all()


def test_without_a_network_only_the_cache_is_used_and_only_if_asked(hub, tmp_path):
    sha = hub.add("org/model", digits())
    online = snapshot("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    hub.requests.clear()
    for name in ("org/model", f"org/model@{sha}", "org/model@main"):
        assert snapshot(name, cache_dir=tmp_path, endpoint=hub.endpoint, local_files_only=True) == online
    assert snapshot("org/model", revision=sha, cache_dir=tmp_path, endpoint=hub.endpoint) == online  # a commit cannot change
    assert hub.requests == []
    nobody = "http://127.0.0.1:9"
    with pytest.raises(HubError, match="was not reached.*Expected .*a cached copy with HF_HUB_OFFLINE=1"):
        snapshot("org/model", cache_dir=tmp_path, endpoint=nobody)
    (online.path / WEIGHTS).unlink()
    with pytest.raises(HubError, match=f"cached copy of org/model at {sha} is not complete: no {WEIGHTS}. Expected to go online"):
        snapshot("org/model", cache_dir=tmp_path, endpoint=hub.endpoint, local_files_only=True)
    with pytest.raises(HubError, match="no model 'org/other'"):
        snapshot("org/other", cache_dir=tmp_path, local_files_only=True)


def test_offline_by_the_environment(hub, tmp_path, monkeypatch):
    hub.add("org/model", digits())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="no model 'org/model': it is not a folder, it is not cached, and HF_HUB_OFFLINE is set"):
        snapshot("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    assert hub.requests == []


PICKLED = b"\x80\x04."
NO_WEIGHTS = {name: data for name, data in digits().items() if name != WEIGHTS}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (NO_WEIGHTS | {"unet/diffusion_pytorch_model.bin": PICKLED}, r"only pickled weights for its unet \(unet/.*bin\).*any code"),
        ({"model.ckpt": PICKLED, "README.md": b""}, r"no model_index.json, and its weights are pickled \(model.ckpt\)"),
        ({"README.md": b"# nothing"}, "holds no pipeline: it has no model_index.json. Expected a diffusers pipeline"),
        (
            NO_WEIGHTS | {"unet/diffusion_pytorch_model.fp16.safetensors": b""},
            r"its unet only as a variant \(unet/diffusion_pytorch_model.fp16.safetensors\)",
        ),
        (
            digits(**{"model_index.json": INDEX | {"_class_name": ["my_pipeline", "Mine"]}, "my_pipeline.py": b"raise SystemExit"}),
            r"wants code of its own to be run \(my_pipeline.py\), which is never downloaded",
        ),
        (
            digits(**{"model_index.json": INDEX | {"unet": ["my_unet", "Mine"]}, "unet/my_unet.py": b"raise SystemExit"}),
            r"wants code of its own to be run \(unet/my_unet.py\)",
        ),
        (digits(**{"model_index.json": b"{"}), "model_index.json of org/model is not JSON"),
        (digits(**{"model_index.json": [1]}), "model_index.json holds a list. Expected a table"),
    ],
    ids=["pickled", "checkpoint", "no pipeline", "variant", "pipeline code", "component code", "no JSON", "no table"],
)  # fmt: skip
def test_what_could_run_code_or_is_no_pipeline_is_refused_before_it_is_downloaded(hub, tmp_path, files, message):
    hub.add("org/model", files)
    with pytest.raises(HubError, match=message):
        snapshot("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    taken = {address.rpartition("/")[2] for method, address in hub.requests if "/resolve/" in address}
    assert taken <= {"model_index.json"}
    everything = tmp_path / "all"  # nor is a copy taken that somebody else put into the cache
    huggingface_hub.snapshot_download("org/model", cache_dir=everything, endpoint=hub.endpoint)
    with pytest.raises(HubError, match=message if "model_index.json" in files else "holds no pipeline|no model 'org/model'"):
        snapshot("org/model", cache_dir=everything, endpoint=hub.endpoint, local_files_only=True)


@pytest.mark.parametrize("name", ["../../evil", "..", "/tmp/evil", "unet/../../evil", "C:\\evil", ""])
def test_a_component_cannot_lead_out_of_the_cache(name, hub, tmp_path):
    hub.add("org/model", digits(**{"model_index.json": INDEX | {name: ["diffusers", "UNet2DModel"]}, f"{name}/config.json": {}}))
    with pytest.raises(HubError, match="model_index.json names the component .*. Expected the name of a folder"):
        snapshot("org/model", cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    assert not [address for _, address in hub.requests if address.endswith("/config.json")]


def test_code_and_pickled_copies_beside_safetensors_stay_where_they_are(hub, tmp_path):
    weights = "unet/diffusion_pytorch_model"
    unsafe = {
        "pipeline.py": b"raise SystemExit",
        f"{weights}.bin": PICKLED,
        f"{weights}.bin.index.json": b"{}",
        "old.ckpt": PICKLED,
    }
    beside = unsafe | {f"{weights}.fp16.safetensors": b"", "vae/config.json": b"{}", f"{weights}.msgpack": b""}
    hub.add("org/model", digits(**beside))
    assert snapshot("org/model", cache_dir=tmp_path, endpoint=hub.endpoint).files == LOADED


def test_size_is_checked_before_the_first_byte(hub, tmp_path):
    hub.add("org/model", digits(), claimed={WEIGHTS: 10**16})
    with pytest.raises(HubError, match=r"would download 9095 TiB, and max_bytes=.* allows 64 GiB. Expected a larger limit"):
        snapshot("org/model", cache_dir=tmp_path, endpoint=hub.endpoint)
    with pytest.raises(HubError, match=r"would download 9095 TiB, and .* has .* GiB free. Expected more space there"):
        snapshot("org/model", cache_dir=tmp_path, endpoint=hub.endpoint, max_bytes=None)
    assert not [address for _, address in hub.requests if address.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("org/gated", hub_server.READER, "org/gated is gated: accept its conditions on .*/org/gated, then log in"),
        ("org/gated", False, "org/gated is gated"),
        ("org/private", False, "no model 'org/private': it is not a folder, and the Hub has no such repository, or a private one"),
        ("org/none", hub_server.OWNER, "no model 'org/none': it is not a folder"),
        ("org/model@v9", False, "org/model has no revision 'v9'. Expected a branch, a tag or a commit sha of it"),
        (f"org/model@{'0' * 40}", False, f"org/model has no revision '{'0' * 40}'"),
        ("org/model", SECRET, "the Hub refused the token for org/model. Expected one of"),
        ("org/limited", False, r"limits how often org/limited may be asked for \(status 429\). Expected to try again in 77 s"),
        ("not a name", False, "no model 'not a name': there is no such folder"),
    ],
)
def test_refusals_are_one_line_that_says_what_to_do(hub, tmp_path, name, token, message):
    hub.add("org/model", digits())
    hub.add("org/gated", digits(), gated=True)
    hub.add("org/private", digits(), private=True)
    hub.limited = "org/limited"
    with pytest.raises(HubError, match=message) as caught:
        snapshot(name, token=token, cache_dir=tmp_path, endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_who_may_gets_what_is_private_or_gated(hub, tmp_path):
    hub.add("org/private", digits(), private=True, gated=True)
    assert snapshot("org/private", token=hub_server.OWNER, cache_dir=tmp_path, endpoint=hub.endpoint).files == LOADED


def test_a_folder_is_taken_as_it_is(tmp_path):
    found = snapshot(DIGITS)
    assert (found.path, found.repo_id, found.sha, found.files, found.name) == (DIGITS, None, None, LOADED, str(DIGITS))
    with pytest.raises(HubError, match="is a folder and has no revision 'main'"):
        snapshot(DIGITS, revision="main")
    with pytest.raises(HubError, match="names the revision 'a', and revision='b' is another"):
        snapshot("org/model@a", revision="b")
    variant = tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copytree(DIGITS, tmp_path, dirs_exist_ok=True)
    variant.write_bytes(b"not loaded")
    assert weight_hashes(tmp_path) == weight_hashes(DIGITS)
    (tmp_path / WEIGHTS).write_bytes(b"other")
    assert weight_hashes(tmp_path)[WEIGHTS] == hashlib.sha256(b"other").hexdigest()


@pytest.mark.parametrize("secret", [SECRET, "correct-horse-battery-staple"])
@pytest.mark.parametrize("given", ["argument", "environment", "file"])
@pytest.mark.parametrize("echo", [False, True])
def test_a_token_never_shows(given, secret, echo, hub, tmp_path, monkeypatch, capfd, caplog):
    hub.add("org/model", digits())
    hub.echo = echo  # the server repeats the header that it was sent, which httpcore's own debugging would show
    Path(constants.HF_TOKEN_PATH).parent.mkdir()
    if given == "environment":
        monkeypatch.setenv("HF_TOKEN", secret)
    elif given == "file":
        Path(constants.HF_TOKEN_PATH).write_text(secret + "\n")
    passed = secret if given == "argument" else None
    with caplog.at_level(logging.INFO if echo else logging.DEBUG), pytest.raises(HubError) as caught:
        snapshot("org/model", token=passed, cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    told = [str(caught.value), "".join(traceback.format_exception(caught.value)), *capfd.readouterr(), caplog.text]
    told += [path.read_text(errors="replace") for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [text for text in told if secret in text]
    assert ("you sent Bearer [token]" in told[0]) == echo
    assert redacted(f"sent {secret}", passed) == "sent [token]"


def test_a_token_never_shows_on_the_command_line(hub, tmp_path, monkeypatch, capfd):
    hub.add("org/model", digits())
    hub.echo = True
    hub_server.point(monkeypatch, hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "org/model"])
    out, error = capfd.readouterr()
    assert "hf-geometry: the Hub refused the token for org/model" in error
    assert SECRET not in out + error
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_tokens_are_found_wherever_they_are_kept_or_whatever_form_they_have(tmp_path):
    Path(constants.HF_TOKEN_PATH).parent.mkdir()
    Path(constants.HF_STORED_TOKENS_PATH).write_text("[mine]\nhf_token = stored-away-4711\nscope = read\n")
    assert redacted("stored-away-4711 may read") == "[token] may read"
    assert redacted("https://user:word@host/?token=abc&x=1") == "https://[token]@host/?token=[token]&x=1"
    assert redacted("hf_oauth_eyJh.bGci-Oi_J and api_org_abcdefgh1") == "[token] and [token]"
    assert redacted("authorization: Basic dXNlcjpwYXNz") == "authorization: Basic [token]"


def test_words_that_are_no_tokens_stay():
    text = "hf_hub_download of basic models: the authorization of a bearer is not in https://host/path?revision=main"
    assert redacted(text) == redacted(redacted(text)) == text
