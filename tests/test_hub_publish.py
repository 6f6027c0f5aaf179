"""An audit on the Hub: what stands there afterwards, read back from a fake Hub that huggingface_hub writes to over HTTP."""

import copy
import hashlib
import json
import platform
import re
import sys

import hub_server
import huggingface_hub
import numpy as np
import pytest
import yaml
from hub_server import OWNER, READER
from huggingface_hub import ModelCard, constants, parse_eval_result_entries
from markdown_it import MarkdownIt
from safetensors.numpy import save_file

from diffusers_geometry import hub_folder
from diffusers_geometry.bundled import DIGITS
from diffusers_geometry.cli import main
from diffusers_geometry.hub import HubError, weight_hashes
from diffusers_geometry.hub_card import BEGIN, END, with_section
from diffusers_geometry.hub_folder import PUBLISHED
from diffusers_geometry.hub_publish import TITLE, publish

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CARD = b"---\nlicense: mit  # a comment\ntags: [b, a]\n---\n\n# A model\n\ttext \xe2\x80\x94 with  spaces  \n\n\n## End"
RESULTS = ".eval_results/diffusers_geometry.yaml"


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    hub_server.isolate(monkeypatch, tmp_path / "home")


@pytest.fixture
def hub():
    with hub_server.running() as running:
        running.add("org/model", {WEIGHTS: (DIGITS / WEIGHTS).read_bytes(), "README.md": CARD})
        yield running


def estimate(value, sem=None, n=3):
    return {"value": value, "sem": sem, "n": n}


AUDIT = {
    "schema": "diffusers_geometry.audit/1",
    "model": {
        "name": "org/model", "revision": "0123456789abcdef" * 2 + "01234567", "scheduler": {"class": "DDPMScheduler", "config": {}},
        "dtype": "float32", "weights": weight_hashes(DIGITS), "weights_sha256": "ab" * 32,
    },
    "request": {"kind": "prompt", "prompts": ["<script>alert(1)</script> | `a`", "a dog"], "seeds": [0, 1]},
    "steps": [{"sigma": 80.0}, {"sigma": 0.25}],
    "geometry": [{"psi": estimate(1.0), "nu": estimate(2.0)}, {"psi": estimate(-12.25, 0.5), "nu": estimate(None)}],
    "manifold_dim": estimate(11.5, 0.25) | {"share": 0.75},
    "prompts": [{"flagged": True}, {"flagged": False}],
    "memorization": {"combined": {"fitted_on": "labels", "auroc": {"value": 0.9375, "low": 0.875, "high": 1.0}}},
    "health": {"checks": [{"name": "finite", "ok": True}, {"name": "asymmetry", "ok": False}]},
    "units": [{"status": "done"}] * 3 + [{"status": "failed"}],
    "provenance": {"repeat": "hf-geometry audit --repeat report"},
    "run": {"finished": "2026-11-25T20:00:00+00:00"},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """An audit's folder as docs/audit.md has it, with what is not published beside it."""
    place = tmp_path / "audit"
    for name in ("images", "figures", "units"):
        (place / name).mkdir(parents=True)
    (place / "audit.json").write_text(json.dumps(AUDIT))
    (place / "index.html").write_text("<p>report</p>")
    (place / "report.md").write_text("# Report\n")
    (place / "plan.json").write_text("{}")
    save_file({"sigma": np.ones((4, 2))}, place / "spectra.safetensors")
    for name in ("images/00000.png", "images/00001.png", "figures/spectra.png"):
        (place / name).write_bytes(b"\x89PNG" + name.encode())
    (place / "units" / "00000.safetensors").write_bytes(b"working copy")
    (place / "secret.txt").write_text("not of the audit")
    return place


def changed(folder, change):
    audit = copy.deepcopy(AUDIT)
    change(audit)
    (folder / "audit.json").write_text(json.dumps(audit))


def commits(hub, kind="dataset", name="owner/audit"):
    return len(hub.repos[kind, name].commits)


PUBLIC = (
    "audit.json", "figures/spectra.png", "images/00000.png", "images/00001.png", "index.html", "plan.json", "report.md",
    "spectra.safetensors",
)  # fmt: skip


def test_a_dataset_holds_the_audit_and_nothing_else(hub, folder):
    url = publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    assert url == f"{hub.endpoint}/datasets/owner/audit"
    files = hub.repos["dataset", "owner/audit"].files()
    assert sorted(files) == sorted((".gitattributes", "README.md", *PUBLIC))
    assert all(files[name] == (folder / name).read_bytes() for name in PUBLIC)
    assert commits(hub) == 2  # the Hub's first one, and one for everything
    card = ModelCard(files["README.md"].decode())
    assert card.data.pretty_name == "Geometry audit of org/model"
    assert "| manifold dimension | 11.5 ± 0.25 (n = 3) | directions; read in 75% of the units |" in card.text
    text = " ".join(card.text.split())
    assert "2 prompts, 2 seeds each; 3 of 4 units finished" in text
    assert "`hf download owner/audit --repo-type dataset --local-dir FOLDER` and `hf-geometry audit --repeat report`" in text


def test_the_same_again_makes_no_commit_and_only_what_differs_is_sent(hub, folder):
    publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    hub.requests.clear()
    publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    assert commits(hub) == 2
    assert not [address for _, address in hub.requests if "/commit/" in address or "/preupload/" in address]

    repository = hub.repos["dataset", "owner/audit"]
    edited = b"A line of the owner.\n" + repository.files()["README.md"] + b"Another.\n"
    repository.commit("main", repository.files() | {"README.md": edited, "notes.txt": b"mine"}, repository.sha("main"))
    changed(folder, lambda audit: audit.update(manifold_dim=estimate(10.5, 0.25) | {"share": 1.0}))
    (folder / "images" / "00001.png").unlink()
    publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    files = repository.files()
    assert "images/00001.png" not in files
    assert files["notes.txt"] == b"mine"
    assert files["README.md"] == edited.replace(b"11.5 \xc2\xb1", b"10.5 \xc2\xb1").replace(b"75%", b"100%")
    assert commits(hub) == 4


def test_a_private_audit_is_not_put_where_all_can_read_it(hub, folder):
    publish(folder, "owner/audit", token=OWNER, private=True, endpoint=hub.endpoint)
    assert hub.repos["dataset", "owner/audit"].private
    hub.add("owner/public", {}, "dataset")
    with pytest.raises(HubError, match="owner/public is public, and a private dataset was asked for"):
        publish(folder, "owner/public", token=OWNER, private=True, endpoint=hub.endpoint)
    hub.add("owner/data", {"train.csv": b"1"}, "dataset")
    with pytest.raises(HubError, match="owner/data holds something else than an audit"):
        publish(folder, "owner/data", token=OWNER, endpoint=hub.endpoint)
    assert commits(hub, name="owner/public") == commits(hub, name="owner/data") == 1


def test_a_pull_request_is_one_commit_with_the_card_and_results(hub, folder):
    publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    model, head = hub.repos["model", "org/model"], hub.repos["model", "org/model"].sha("main")
    url = publish(folder, "org/model", kind="pull_request", token=READER, endpoint=hub.endpoint)
    assert url == f"{hub.endpoint}/org/model/discussions/1"
    assert model.requests == [{"title": TITLE, "author": "reader"}]
    assert model.sha("main") == head
    assert model.commits[model.sha("refs/pr/1")][0] == head
    files, before = model.files("refs/pr/1"), model.files("main")
    assert set(files) - set(before) == {RESULTS}
    card = files["README.md"]
    assert card.startswith(CARD + b"\n\n" + BEGIN + b"\n")
    assert card.endswith(END + b"\n")
    assert f"{hub.endpoint}/datasets/owner/audit/blob/main/report.md" in card.decode()

    entries = {entry.task_id: entry for entry in parse_eval_result_entries(yaml.safe_load(files[RESULTS]))}
    assert {task: entry.value for task, entry in entries.items()} == {
        "manifold_dim": 11.5, "psi": -12.25, "flagged_prompts": 0.5, "memorization_auroc": 0.9375, "failed_health_checks": 1,
    }  # fmt: skip
    dataset = hub.repos["dataset", "owner/audit"]
    assert {(e.dataset_id, e.dataset_revision) for e in entries.values()} == {("owner/audit", dataset.sha("main"))}
    assert entries["psi"].notes == "local scaling psi ± 0.5 (n = 3), nats, at sigma 0.25"
    assert entries["psi"].date == "2026-11-25T20:00:00+00:00"
    assert entries["psi"].source_url == f"{hub.endpoint}/datasets/owner/audit"
    assert entries["failed_health_checks"].notes == "health checks failed, of 2: asymmetry"


def test_a_pull_request_is_opened_once_and_brought_up_to_date(hub, folder):
    model = hub.repos["model", "org/model"]
    hub.add("owner/audit", {}, "dataset")
    options = {"kind": "pull_request", "dataset": "owner/audit", "endpoint": hub.endpoint}
    first = publish(folder, "org/model", token=READER, **options)
    assert publish(folder, "org/model", token=READER, **options) == first
    assert publish(folder, "org/model", token=OWNER, **options) == first  # the same words of anybody
    assert len(model.commits) == 2
    changed(folder, lambda audit: audit.update(manifold_dim=estimate(None) | {"share": 0.0}))
    assert publish(folder, "org/model", token=READER, **options) == first
    assert len(model.commits) == 3
    assert b"manifold dimension" not in model.files("refs/pr/1")["README.md"]
    changed(folder, lambda audit: None)
    second = publish(folder, "org/model", token=OWNER, **options)
    assert second == f"{hub.endpoint}/org/model/discussions/2"  # nobody writes into a stranger's request
    model.refs["main"] = model.sha("refs/pr/2")
    assert publish(folder, "org/model", token=OWNER, **options) == f"{hub.endpoint}/org/model"  # merged
    assert len(model.commits) == 4


def test_a_card_points_to_nothing_that_its_readers_cannot_open(hub, folder):
    options = {"kind": "pull_request", "token": OWNER, "endpoint": hub.endpoint}
    publish(folder, "owner/audit", token=OWNER, private=True, endpoint=hub.endpoint)
    with pytest.raises(
        HubError, match="owner/audit is private, and readers of org/model could not open what the card would point to"
    ):
        publish(folder, "org/model", **options)
    with pytest.raises(HubError, match="the Hub has no dataset 'owner/none', where the audit should be. Expected to publish it"):
        publish(folder, "org/model", dataset="owner/none", **options)
    with pytest.raises(HubError, match="private=True is of a dataset; who sees a pull request is said by its model"):
        publish(folder, "org/model", private=True, **options)
    hub.repos["model", "org/model"].private = True
    publish(folder, "org/model", **options)
    assert len(hub.repos["model", "org/model"].requests) == 1


def test_more_images_than_a_folder_of_the_hub_takes(hub, folder, monkeypatch):
    monkeypatch.setattr(hub_folder, "MOST_FILES", 1)
    with pytest.raises(
        HubError, match="images has 2 images, and a folder of the Hub should not have more than 1 files. Expected fewer"
    ):
        publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    assert hub.requests == []


def test_without_a_dataset_the_files_come_along_and_no_results(hub, folder):
    publish(folder, "org/model", kind="pull_request", token=READER, endpoint=hub.endpoint)
    model = hub.repos["model", "org/model"]
    files = model.files("refs/pr/1")
    assert set(files) - set(model.files("main")) == {f"geometry_audit/{name}" for name in PUBLIC}
    assert files["geometry_audit/spectra.safetensors"] == (folder / "spectra.safetensors").read_bytes()
    assert b"[Report](geometry_audit/report.md)" in files["README.md"]


def test_what_an_audit_does_not_know_is_not_in_its_card(hub, folder):
    def unknown(audit):
        audit["model"] |= {"name": "/home/somebody/private/model", "revision": None}
        audit["steps"][-1]["sigma"] = None
        audit["geometry"][-1]["psi"] = estimate(0.5, None, 1)
        audit["memorization"]["combined"] |= {"fitted_on": None, "auroc": None}
        audit["health"]["checks"] += [{"name": "certificate", "ok": None}]

    changed(folder, unknown)
    publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    card = hub.repos["dataset", "owner/audit"].files()["README.md"].decode()
    assert "of `model`, DDPMScheduler" in card
    assert "somebody" not in card
    assert "| local scaling psi | 0.5 (n = 1) | nats, at sigma inf |" in card
    assert "| health checks failed | 1 | of 2: asymmetry |" in card
    assert "flagged" not in card
    assert "None" not in card


def test_what_comes_from_outside_stays_in_its_place(hub, folder):
    evil = f"`<img src=x>` | b\n\n# <script>alert(1)</script> ![i](http://x/i) [l](http://x) @you {END.decode()} "

    def foreign(audit):
        audit["model"] |= {name: evil + name for name in ("name", "revision", "dtype", "weights_sha256")}
        audit["model"]["scheduler"]["class"] = audit["memorization"]["combined"]["fitted_on"] = evil
        audit["health"]["checks"][1]["name"] = audit["provenance"]["repeat"] = evil

    changed(folder, foreign)
    publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    card = hub.repos["dataset", "owner/audit"].files()["README.md"].decode()
    text = card[card.index(BEGIN.decode()) + len(BEGIN) : card.index(END.decode())]
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    assert not [token for token in (*tokens, *inline) if token.type in ("html_block", "html_inline", "image")]
    assert [token.attrs["href"] for token in inline if token.type == "link_open"] == ["report.md"]
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h2"]
    assert sum(token.type == "tr_open" for token in tokens) == 6
    publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    assert commits(hub) == 2


def test_nothing_that_is_published_names_this_machine(hub, folder):
    def told(audit):
        audit["model"] |= {"name": "/home/somebody/private/a-model", "revision": None}
        audit["provenance"]["command"] = "hf-geometry audit /home/somebody/private/a-model --prompts ~/secret/list.txt"
        audit["run"]["host"] = "a-machine"
        audit["request"]["reference"] = "ab" * 32

    changed(folder, told)
    (folder / "plan.json").write_text(
        json.dumps({"run": {"host": "a-machine"}, "model": {"name": "/home/somebody/private/a-model"}})
    )
    (folder / "reference.json").write_text(json.dumps({"name": "/home/somebody/base", "values": [[[0.5, None]]]}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    publish(folder, "org/model", kind="pull_request", token=READER, endpoint=hub.endpoint)
    files = hub.repos["dataset", "owner/audit"].files()
    everything = {**files, **hub.repos["model", "org/model"].files("refs/pr/1")}
    assert not [name for name, data in everything.items() if re.search(rb"somebody|a-machine|secret|private", data)]
    document = json.loads(files["audit.json"])
    assert document["provenance"]["command"] == "hf-geometry audit a-model --prompts list.txt"
    assert document["request"]["prompts"] == AUDIT["request"]["prompts"]
    assert json.loads(files["plan.json"]) == {"run": {"host": None}, "model": {"name": "a-model"}}
    assert json.loads(files["reference.json"]) == {"name": "base", "values": [[[0.5, None]]]}
    assert {path: path.read_bytes() for path in before} == before
    publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    assert commits(hub) == 2


def test_an_audit_without_a_finished_unit_can_be_published(hub, folder):
    def failed(audit):
        audit |= {"steps": [], "geometry": [], "manifold_dim": None, "memorization": None, "units": [{"status": "failed"}]}

    changed(folder, failed)
    publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    card = hub.repos["dataset", "owner/audit"].files()["README.md"].decode()
    assert "0 of 1 unit finished" in " ".join(card.split())
    assert "local scaling" not in card


def test_prompts_that_were_not_compared_are_no_share(hub, folder):
    changed(folder, lambda audit: audit["prompts"].append({"flagged": None}))
    publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    card = hub.repos["dataset", "owner/audit"].files()["README.md"].decode()
    said = "| prompts flagged as memorised | 0.5 | share of 2; by the combined score, weights fitted on the audit's labels |"
    assert said in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--publish", "owner/audit", "--publish-as", "gist"],
            "--publish-as 'gist' is not known. Expected dataset or pull-request",
        ),
        (["--private"], "--private is of a dataset that is published to. Expected --publish ORG/NAME"),
        (["--private", "--publish", "org/model", "--publish-as", "pull-request"], "--private is of a dataset"),
        (
            ["--publish", "https://hub/owner/audit"],
            "'https://hub/owner/audit' is no name of a repository of the Hub. Expected org/name",
        ),
        (["--publish", "audit"], "'audit' is no name of a repository of the Hub. Expected org/name. (It says no owner.)"),
    ],
)
def test_what_cannot_be_published_is_said_before_anything_is_computed(options, message, tmp_path, capfd):
    with pytest.raises(SystemExit, match="2"):
        main(["audit", "--yes", "--output", str(tmp_path / "out"), *options])
    assert f"hf-geometry: {message}" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_publishing_without_the_hub_says_what_to_do(folder, monkeypatch):
    nobody = "http://127.0.0.1:9"
    for kind in ("dataset", "pull_request"):
        with pytest.raises(HubError, match=f"the Hub at {nobody} was not reached .* to publish to owner/audit. Expected a network"):
            publish(folder, "owner/audit", kind=kind, token=OWNER, endpoint=nobody)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="nothing can be published to owner/audit: HF_HUB_OFFLINE is set. Expected to unset it"):
        publish(folder, "owner/audit", token=OWNER, endpoint=nobody)


def test_a_model_without_a_card_gets_one(hub, folder):
    hub.add("org/bare", {WEIGHTS: (DIGITS / WEIGHTS).read_bytes()})
    publish(folder, "org/bare", kind="pull_request", token=OWNER, endpoint=hub.endpoint)
    card = ModelCard(hub.repos["model", "org/bare"].files("refs/pr/1")["README.md"].decode())
    assert card.data.to_dict() == {"library_name": "diffusers"}
    assert card.text.strip().startswith(BEGIN.decode())


@pytest.mark.parametrize("kind", ["dataset", "pull_request"])
def test_what_was_changed_meanwhile_is_not_overwritten(kind, hub, folder):
    name = "owner/audit" if kind == "dataset" else "org/model"

    def somebody(repository):
        hub.before_commit = None
        repository.commit("main", repository.files() | {"README.md": b"theirs"}, repository.sha("main"))

    hub.before_commit = somebody
    with pytest.raises(
        HubError, match=f"{name} was changed by somebody else meanwhile. Expected to look at that and publish again"
    ):
        publish(folder, name, kind=kind, token=OWNER, endpoint=hub.endpoint)
    repository = hub.repos["dataset" if kind == "dataset" else "model", name]
    assert repository.files()["README.md"] == b"theirs"
    assert not repository.requests
    publish(folder, name, kind=kind, token=OWNER, parent_commit=repository.sha("main"), endpoint=hub.endpoint)
    assert repository.files("main" if kind == "dataset" else "refs/pr/1")["README.md"].startswith(b"theirs\n")


def test_an_audit_of_other_weights_is_no_pull_request(hub, folder):
    hub.add("org/other", {WEIGHTS: b"others", "README.md": CARD})
    digest = hashlib.sha256(b"others").hexdigest()[:12]
    with pytest.raises(
        HubError, match=rf"other weights than org/other at .* has: {WEIGHTS} has the sha256 {digest}, audited was 6bf79"
    ):
        publish(folder, "org/other", kind="pull_request", token=OWNER, endpoint=hub.endpoint)
    hub.add("org/empty", {"README.md": CARD})
    with pytest.raises(HubError, match=f"{WEIGHTS} is not there"):
        publish(folder, "org/empty", kind="pull_request", token=OWNER, endpoint=hub.endpoint)
    changed(folder, lambda audit: audit["model"].update(weights={}))
    with pytest.raises(HubError, match="names no weights"):
        publish(folder, "org/model", kind="pull_request", token=OWNER, endpoint=hub.endpoint)
    assert not any(repository.requests for repository in hub.repos.values())


@pytest.mark.parametrize("file", ["index.html", "audit.json", "spectra.safetensors", "images/00000.png"])
@pytest.mark.parametrize("secret", [OWNER, "hf_" + "Others" * 6])
def test_a_token_in_the_audit_never_leaves_the_machine(secret, file, hub, folder):
    path = folder / file
    data = path.read_bytes()
    path.write_bytes(data.replace(b"report", secret.encode()) if b"report" in data else data + b"\x00" + secret.encode())
    with pytest.raises(HubError, match=rf"{re.escape(str(path))} holds an access token.*revoke it") as caught:
        publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    assert secret not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "kind", "name", "message"),
    [
        (False, "dataset", "owner/audit", "refused the token|may be written to"),
        (READER, "dataset", "owner/audit", "the token may not do this with owner/audit. Expected one with the right to it"),
        (OWNER, "pull_request", "org/none", "the Hub has no repository 'org/none' that may be written to"),
        (False, "pull_request", "org/model", "the Hub has no repository 'org/model' that may be written to"),
        ("hf_" + "Wrong" * 6, "pull_request", "org/model", "the Hub refused the token for org/model"),
        (OWNER, "pull_request", "limited/model", "limits how often limited/model may be asked for .* in 77 s"),
        (OWNER, "gist", "org/model", "kind='gist'. Expected 'dataset' or 'pull_request'"),
    ],
)
def test_refusals_to_write_are_one_line_without_the_token(token, kind, name, message, hub, folder):
    hub.echo, hub.limited = True, "limited"
    with pytest.raises(HubError, match=message) as caught:
        publish(folder, name, kind=kind, token=token, endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)
    assert str(token) not in str(caught.value)
    assert not (folder / PUBLISHED).exists()


def test_only_a_finished_audit_is_published(hub, folder):
    changed(folder, lambda audit: audit.update(schema="diffusers_geometry.audit/2"))
    with pytest.raises(HubError, match=r"has the schema 'diffusers_geometry.audit/2'. Expected 'diffusers_geometry.audit/1'"):
        publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    changed(folder, lambda audit: audit.update(schema="diffusers_geometry.audit/1.3"))
    assert hub_folder.read_audit(folder)["schema"].endswith("1.3")  # which only adds
    (folder / "audit.json").write_text("[]")
    with pytest.raises(HubError, match="is no audit"):
        publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    (folder / "index.html").unlink()
    with pytest.raises(HubError, match=r"has no index.html. Expected the folder of a finished audit"):
        publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    assert hub.requests == []


def test_from_a_model_of_the_hub_to_a_dataset_and_a_pull_request_by_the_command_line(hub, tmp_path, monkeypatch, capfd):
    sha = hub.add("org/digits", {p.relative_to(DIGITS).as_posix(): p.read_bytes() for p in DIGITS.rglob("*") if p.is_file()})
    hub_server.point(monkeypatch, hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    audit = [
        "audit",
        "org/digits",
        "--seeds",
        "0-1",
        "--steps",
        "3",
        "--record-steps",
        "1",
        "--yes",
        "--output",
        str(tmp_path / "out"),
    ]
    audit += ["--scores", "none"]
    for more in (["owner/audit"], ["org/digits", "--publish-as", "pull-request"], ["owner/audit"]):
        with pytest.raises(SystemExit, match="0"):
            main([*audit, "--publish", *more])
    model, dataset = hub.repos["model", "org/digits"], hub.repos["dataset", "owner/audit"]
    assert (len(model.commits), len(dataset.commits)) == (2, 2)  # an audit that is done, once more, is the same
    document = json.loads(dataset.files()["audit.json"])
    assert (document["model"]["name"], document["model"]["revision"]) == ("org/digits", sha)
    entries = {entry.task_id: entry for entry in parse_eval_result_entries(yaml.safe_load(model.files("refs/pr/1")[RESULTS]))}
    assert entries["psi"].value == document["geometry"][-1]["psi"]["value"]
    assert entries["psi"].dataset_revision == dataset.sha("main")
    told = "".join(capfd.readouterr())
    assert f"{hub.endpoint}/org/digits/discussions/1" in told
    assert OWNER not in told
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and OWNER.encode() in path.read_bytes()]


def test_a_stranger_reads_and_repeats_what_was_published(hub, tmp_path, monkeypatch, capfd):
    hub.add("org/digits", {p.relative_to(DIGITS).as_posix(): p.read_bytes() for p in DIGITS.rglob("*") if p.is_file()})
    hub_server.point(monkeypatch, hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", OWNER)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-geometry", *map(str, arguments)])  # the command that an audit stores
        with pytest.raises(SystemExit, match="0"):
            main(sys.argv[1:])

    audit = ("audit", "org/digits", "--steps", 3, "--record-steps", 1, "--yes", "--scores", "none", "--seeds")
    run(*audit, "0-1", "--output", tmp_path / "base")
    mine = tmp_path / "mine"
    run(*audit, "2-3", "--output", mine, "--reference", tmp_path / "base", "--publish", "owner/audit", "--private")
    assert hub.repos["dataset", "owner/audit"].private
    theirs = huggingface_hub.snapshot_download("owner/audit", repo_type="dataset", local_dir=tmp_path / "theirs", token=READER)
    run("audit", "--repeat", theirs, "--output", tmp_path / "again", "--yes")
    assert "unlike the reference" in capfd.readouterr().out
    numbers = [json.loads((folder / "audit.json").read_text()) for folder in (mine, tmp_path / "again")]
    for name in ("units", "geometry", "out_of_distribution"):
        assert numbers[0][name] == numbers[1][name], name
    page = (tmp_path / "theirs" / "index.html").read_bytes()
    run("report", theirs)
    assert (tmp_path / "theirs" / "index.html").read_bytes() == page
    for folder, host in ((mine, platform.node()), (tmp_path / "theirs", None)):
        assert [json.loads((folder / name).read_text())["run"]["host"] for name in ("audit.json", "plan.json")] == [host] * 2
    place = str(tmp_path).encode()
    assert place in (mine / "audit.json").read_bytes()
    assert not [path for path in (tmp_path / "theirs").rglob("*") if path.is_file() and place in path.read_bytes()]


def test_a_link_out_of_the_audit_is_not_followed(hub, folder):
    outside = folder.parent / "diary.png"
    outside.write_bytes(b"mine")
    (folder / "images" / "00002.png").symlink_to(outside)
    with pytest.raises(HubError, match=r"00002.png is a link to .*diary.png, outside of the audit. Expected the file itself"):
        publish(folder, "owner/audit", token=OWNER, endpoint=hub.endpoint)
    assert hub.requests == []


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("card", [b"", b"# A", b"# A\n", b"\xef\xbb\xbf---\na: 1\n---\n\n# A\n\n", b"\xff not text \x00\n"])
def test_every_other_byte_of_a_card_stays(card, ending):
    card = card.replace(b"\n", ending)
    one = with_section(card, "## One\n\n1")
    assert one.startswith(card)
    assert one == with_section(one, "## One\n\n1")
    rest = one.replace(ending if ending in card else b"\n", b"")  # the section has the card's line endings
    assert b"\n" not in rest
    assert b"\r" not in rest
    later = one + b"later" + ending
    two = with_section(later, "## Two")
    start, stop, after = later.index(BEGIN), later.index(END), b"\r\n" if b"\r\n" in later else b"\n"
    assert two == later[:start] + BEGIN + after + b"## Two" + after + later[stop:]


@pytest.mark.parametrize("card", [BEGIN, END, END + BEGIN, BEGIN + END + BEGIN, BEGIN + BEGIN + END])
def test_a_card_with_half_a_section_is_not_guessed_at(card):
    with pytest.raises(HubError, match="Expected one pair or none"):
        with_section(card, "text")
