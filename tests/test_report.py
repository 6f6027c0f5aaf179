"""Reports without a browser: numbers against exact spectra, foreign text that stays text, cuts that are said, refusals."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from audit_folders import HOSTILE, SIGMAS, audit_document, spectrum, write_audit
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.numpy import save_file

from diffusers_geometry.report import text as words
from diffusers_geometry.report import write_report
from diffusers_geometry.report.document import read_source
from diffusers_geometry.report.images import thumbnails
from diffusers_geometry.report.spectra import places, quantiles

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """What a browser would find: tags with attributes, texts, and the raw text of scripts and style."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.raw, self.inside = [], [], [], None
        self.html = path.read_text()
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        (self.raw if self.inside else self.texts).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self):
        return json.loads(self.raw[[t for t, _ in self.tags if t in ("script", "style")].index("script")])


def minimal():
    """One unit of two steps, written by hand."""
    steps = [
        {"sigma": None, "phase": "trivial", "psi": -9.25, "psi_sem": 0.5, "psi_rank": 2, "nu": 1.9, "delta": None,
         "effective_dimension": 0.01, "effective_dimension_sem": 0.002, "gap_dim": 1, "flipd": None, "flipd_sem": None,
         "spectral_norm": 0.01, "asymmetry": 0.3, "certificate_error": 1e-7, "engine": "replay", "refusal": None, "products": 4,
         "scores": {}},
        {"sigma": 0.1, "phase": "consolidation", "psi": -0.125, "psi_sem": 0.0123, "psi_rank": 1, "nu": 1.0, "delta": None,
         "effective_dimension": 0.98, "effective_dimension_sem": None, "gap_dim": 1, "flipd": None, "flipd_sem": None,
         "spectral_norm": 0.97, "asymmetry": 0.01, "certificate_error": 2e-7, "engine": "replay", "refusal": None, "products": 4,
         "scores": {}},
    ]  # fmt: skip
    one = {"sem": None, "n": 1}
    names = ("psi", "nu", "effective_dimension", "gap_dim", "spectral_norm", "asymmetry")
    geometry = [
        {n: {"value": s[n], **one} for n in names} | {"delta": None, "flipd": None, "phases": {s["phase"]: 1.0}} for s in steps
    ]
    geometry[1]["effective_dimension"] = {"value": 0.98, "sem": 0.0456, "n": 1}
    document = {
        "schema": "diffusers_geometry.audit/1", "model": {"name": "/somewhere/a-model", "pipeline": "DDPMPipeline"},
        "request": {"kind": "unconditional", "prompts": [None], "seeds": [3], "options": {"psi_rank": 16}, "labels": [None]},
        "plan": {"units": 1, "products": 8, "dimension": 2}, "geometry": geometry,
        "steps": [{"position": 0, "timestep": 999, "sigma": None, "alpha_t": 0.0, "sigma_t": 1.0},
                  {"position": 1, "timestep": 0, "sigma": 0.1, "alpha_t": 0.995, "sigma_t": 0.0995}],
        "manifold_dim": {"value": 1, "sem": None, "n": 1, "share": 1.0}, "memorization": None, "health": None,
        "out_of_distribution": None, "provenance": {"versions": {}, "repeat": "hf-geometry audit --repeat here"}, "run": None,
        "prompts": [{"index": 0, "prompt": None, "label": None, "units": [0], "scores": {}, "combined": None, "rank": None}],
        "units": [{"index": 0, "prompt": 0, "seed": 3, "status": "done", "error": None, "image": None, "steps": steps, "scores": {},
                   "manifold_dim": 1, "phases": {}, "non_finite": 0, "products": 8, "forwards": 12}],
    }  # fmt: skip
    return document, np.array([[[0.01, 0.0], [0.97, 0.01]]], np.float32)


def written(folder, *arguments, **options):
    document, spectra = audit_document(*arguments, **options)
    return Page(write_report(write_audit(folder, document, spectra))), document, spectra


def test_a_minimal_audit_says_its_numbers_with_their_errors(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "roc.png").write_bytes(b"of an earlier report")
    page = Page(write_report(write_audit(tmp_path, *minimal())))
    for said in ("a-model", "1 of 1 run finished", "1 of 2 directions", "keeps about 0.980 ± 0.046 of 2 directions",
                 "the 16 largest singular", "hf-geometry audit --repeat here", "8 (planned: 8)", "Not measured"):  # fmt: skip
        assert said in page.text, said
    assert page.data["sigmas"] == ["∞", "0.1"]
    assert page.data["units"][0]["numbers"][1][:3] == ["−0.125 ± 0.012", "1", "0.98"]
    text = (tmp_path / "report.md").read_text()
    tables = MarkdownIt("commonmark").enable("table").render(text)
    assert tables.count("<table>") == 2
    assert "Memorisation" not in text  # no score was taken
    assert "<td>0.980 ± 0.046</td>" in tables
    assert tables.count("<tr>") == 1 + 2 + 1 + text.count("\n| ", text.index("| what | value |")) - 1  # heads, two steps, facts
    assert "figures/roc.png" not in text
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["descriptors.png", "spectra.png"]


def test_spectra_in_the_page_are_those_of_the_manifold(tmp_path):
    page, document, _ = written(tmp_path, ["a", "b", "c"], (0, 1, 2, 3), size=40)
    data, generator = page.data, np.random.default_rng(0)
    assert data["index"] == list(range(1, 41))
    variances = []
    for unit in document["units"]:  # the order in which audit_folders draws them
        variances.append(generator.uniform(0.7, 1.3))
        generator.normal()
        dims = 8 + unit["prompt"] % 3
        for k, sigma in enumerate(SIGMAS):
            exact = spectrum(sigma, variances[-1], dims, 40)
            assert np.allclose(data["units"][unit["index"]]["values"][k], exact, rtol=1e-3, atol=1e-9)
    first = [v / (v + 1.0) for v in variances]  # sigma = 1, the largest singular value
    assert data["all"]["middle"][3][0] == pytest.approx(np.median(first), rel=1e-3)
    assert [data["all"][e][3][0] for e in ("low", "high")] == pytest.approx(np.quantile(first, (0.1, 0.9)), rel=1e-3)


def test_quantiles_leave_out_failed_units_and_places_are_dense_at_the_top():
    values = np.array([[[1.0, 2.0]], [[np.nan, np.nan]], [[3.0, np.nan]]])
    assert np.allclose(quantiles(values)[:, 0], [[2.0, 2.0], [1.2, 2.0], [2.8, 2.0]])
    assert np.isnan(quantiles(np.full((2, 1, 1), np.nan))).all()
    assert places(64).tolist() == list(range(64))
    index = places(4096)
    assert len(index) <= 64
    assert index[:24].tolist() == list(range(24))
    assert index[-1] == 4095
    assert (np.diff(index) > 0).all()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    document, spectra = audit_document(HOSTILE, (0, 1), failed=(3,), memorised=(1,))
    document["model"]["name"] = "</title><script>alert(2)</script>"
    document["provenance"]["repeat"] = "hf-geometry audit --repeat '<svg onload=alert(3)>'"
    document["health"]["checks"][0]["meaning"] = "<iframe src=//evil.example>"
    document["memorization"]["combined"]["certainty"] = "<b onclick=alert(4)>sure</b>"
    return write_report(write_audit(folder, document, spectra))


def test_foreign_text_stays_text_in_the_page(hostile):
    page = Page(hostile)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"id": "data", "type": "application/json"}, {}]
    assert {tag for tag, _ in page.tags} & {"iframe", "object", "embed", "form", "base", "link", "b"} <= {"b"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        if tag == "img" and "src" in attributes:
            assert attributes["src"].startswith("data:image/")
        if "href" in attributes:
            assert attributes["href"].startswith(("#", "https://")), attributes
        if "style" in attributes:
            raise AssertionError("an inline style, which the policy forbids")
    for said in (*HOSTILE[:4], "<iframe src=//evil.example>", "<b onclick=alert(4)>sure</b>", "'<svg onload=alert(3)>'"):
        assert " ".join(said.split()) in page.text, said
    assert HOSTILE[4] in page.text
    assert "turned [U+202E]around[U+202C], NUL [U+0000] and half a pair [U+D800]" in page.text
    names = [unit["name"] for unit in page.data["units"]]
    assert f"{HOSTILE[2]}, seed 0" in names
    assert "</script" not in page.raw[1]


def test_foreign_text_stays_text_in_markdown(hostile):
    source = (hostile.parent / "report.md").read_text()
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(source)
    inline = [child for token in tokens for child in token.children or ()]
    assert not [t for t in (*tokens, *inline) if t.type in ("html_block", "html_inline")]
    assert not [t for t in inline if t.type == "link_open"]
    images = [t.attrs["src"] for t in inline if t.type == "image"]
    assert images == ["figures/spectra.png", "figures/descriptors.png", "figures/memorisation.png"]
    said = [t.content for t in inline if t.type in ("code_inline", "text")]
    for prompt in (*HOSTILE[:4], HOSTILE[4]):
        assert prompt in said, prompt
    assert "@" not in source.replace(HOSTILE[3], "").replace("\\|", "|").replace(HOSTILE[3], "")


def replaced(value, text, key=""):
    """The document with a text in place of every text in it, of names of phases and versions too; the key is put behind."""
    if isinstance(value, dict):
        open_ended = key in ("versions", "call", "weights", "phases")
        return {name + text if open_ended else name: replaced(entry, text, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [replaced(entry, text, key) for entry in value]
    told = key in ("schema", "kind", "status", "image")
    return value if told or not isinstance(value, str) else f"{text}{key}"


def test_no_text_of_the_document_comes_alive(tmp_path):
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>` | [a](javascript:alert(1)) ![i](http://evil/x) "
    evil += r"</script> <!-- $\frac$ "
    document, spectra = audit_document(["a", "b", "c"], (0, 1), failed=(3,), labels=[True, False, None], reference=True)
    document = replaced(document, evil)
    path = write_report(write_audit(tmp_path, document, spectra))
    page = Page(path)
    assert page.text.count("<script>alert(1)</script>") > 40
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{"id": "data", "type": "application/json"}, {}]
    for tag, attributes in page.tags:
        assert tag != "img" or attributes.get("src", "data:image/").startswith("data:image/"), attributes
        assert not [name for name in attributes if name.startswith("on")], attributes
        assert attributes.get("href", "#").startswith(("#", "https://arxiv.org/abs/2")), attributes
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse((tmp_path / "report.md").read_text())
    inline = [child for token in tokens for child in token.children or ()]
    assert not [t for t in (*tokens, *inline) if t.type in ("html_block", "html_inline", "link_open")]
    assert {t.attrs["src"].partition("/")[0] for t in inline if t.type == "image"} == {"figures"}


def test_a_page_names_no_machine_and_no_place_on_it(tmp_path):
    document, spectra = audit_document(["a", "/home/somebody/in/a/prompt", "c"], (0,), failed=(2,), reference=True)
    document["model"] |= {"name": "/home/somebody/private/a-model", "revision": None}
    document["provenance"]["command"] = "hf-geometry audit /home/somebody/private/a-model --prompts ../secret/list.txt"
    document["units"][2]["error"]["message"] = "[Errno 2] No such file or directory: '/home/somebody/my files/x.json'"
    document["out_of_distribution"]["reference"]["name"] = "~/secret/base"
    document["request"]["call"]["image"] = "C:\\Users\\somebody\\start.png"
    page = Page(write_report(write_audit(tmp_path, document, spectra)))
    for text in (page.html, (tmp_path / "report.md").read_text()):
        assert "a-machine" not in text
        assert set(re.findall(r"\S*somebody\S*", text)) <= set(re.findall(r"\S*/home/somebody/in/a/prompt\S*", text))
        assert "secret" not in text
    for said in ("hf-geometry audit a-model --prompts list.txt", "directory: 'x.json'", "an audit of base.", "image start.png",
                 "/home/somebody/in/a/prompt", "done with 2 processes"):  # fmt: skip
        assert said in page.text, said
    assert "a-machine" in (tmp_path / "audit.json").read_text()


@pytest.mark.parametrize("text", ["a|b", "``two``", "`", "<b>", "a\nb", "[x](y)", "@someone", "\\|", "&lt;", "", "x" * 400])
def test_code_spans_hold_anything(text):
    cell = words.markdown_code(text)
    tokens = MarkdownIt("commonmark").enable("table").parse(f"| a | b |\n| --- | --- |\n| {cell} | c |\n")
    cells = [t for t in tokens if t.type == "inline"]
    assert len(cells) == 4
    assert cells[3].content == "c"
    if text:
        assert [t.type for t in cells[2].children] == ["code_inline"]
        assert cells[2].children[0].content == words.shortened(text, 120)


def test_markdown_escapes_prose():
    rendered = MarkdownIt("commonmark", {"html": True}).render(words.markdown("<i>a</i> *b* [c](d) `e` # f - g | h ~i~ &lt; @j"))
    assert rendered == "<p>&lt;i&gt;a&lt;/i&gt; *b* [c](d) `e` # f - g | h ~i~ &amp;lt; @j</p>\n"


def test_the_policy_allows_this_script_and_style_alone(hostile):
    page = Page(hostile)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    style, _, script = page.raw
    for name, raw in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode()
        assert rules.pop(name) == f"'sha256-{digest}'"
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}


@pytest.mark.parametrize(
    ("arguments", "options", "said", "not_said"),
    [
        ((["a"], (0,)), {"scores": False}, "the only one", "median and the band"),
        ((["a", "b", "c"], (0,)), {"failed": (0, 1, 2)}, "Nothing could be measured", "Spectra over the run"),
        (([None], (0, 1)), {"kind": "unconditional", "scores": False}, "without a prompt, with 2 seeds", "seeds each"),
        (([4, 7, 9], (0, 1)), {"kind": "class_labels"}, "class 7, seed 1", "AUROC of"),
        ((["a", "b", "c"], (0, 1)), {"labels": [True, False, None], "memorised": (0,)}, "memorised and 1 known not to be", "–."),
        ((["a", "b", "c"], (0, 1)), {"reference": True}, "The reference is an audit of someone/base", "rank 4"),
        ((["", " "], (0,)), {}, "(empty prompt), seed 0", "flagged ·"),
    ],
    ids=["one", "failed", "unconditional", "classes", "labels", "reference", "empty"],
)  # fmt: skip
def test_empty_and_special_cases(tmp_path, arguments, options, said, not_said):
    page, _, _ = written(tmp_path, *arguments, **options)
    assert said in page.text or said in json.dumps(page.data)
    assert not_said not in page.text
    for wrong in ("None", "nan", "NaN", "inf ", "undefined"):
        assert not re.search(rf"\b{wrong}\b", page.text), wrong
    MarkdownIt("commonmark").enable("table").parse((tmp_path / "report.md").read_text())


def test_the_summary_claims_no_more_than_is_known(tmp_path):
    document, spectra = audit_document(["a", "b", "c", "d"], (0,), memorised=(1,), labels=[True, True, None, True], failed=(3,))
    document["memorization"]["combined"] |= {"fitted_on": "robust z", "auroc": None, "tpr_at_1_fpr": None, "roc": None}
    for score in document["memorization"]["scores"]:
        score |= {"auroc": None, "tpr_at_1_fpr": None, "roc": None}
    page = Page(write_report(write_audit(tmp_path, document, spectra)))
    assert "! 1 prompt of 3 stands out Most suspicious: “b”." in page.text
    assert "Of those flagged, 1 is known to be memorised and 0 are known not to be memorised." in page.text
    assert "There are labels (2 prompts known to be memorised and 0 known not to be), but too few" in page.text  # d has no rank
    document["memorization"]["combined"]["auroc"] = {"value": 0.75, "low": 0.5, "high": 1.0}  # judged by labels, not fitted on them
    page = Page(write_report(write_audit(tmp_path, document, spectra)))
    assert "with a probability (AUROC) of 0.750 (95 %: 0.500 to 1.000). Prompts unlike the bulk are flagged" in page.text
    for prompt in document["prompts"]:
        prompt["flagged"] = prompt["flagged"] and None
    document["health"]["checks"] = [check | {"ok": None} for check in document["health"]["checks"]]
    document["units"][3] |= {"status": "done"}
    page = Page(write_report(write_audit(tmp_path, document, spectra)))
    assert "Is something wrong? Not checked No health check could be made." in page.text
    assert "Does it recite training images? No prompt stands out" in page.text
    assert "✓" not in page.text[: page.text.index("Health checks")]


def test_failed_health_checks_are_counted_among_those_that_were_made(tmp_path):
    document, spectra = audit_document(["a", "b", "c"], (0, 1), failed=(2,))
    document["health"]["checks"][1] |= {"ok": False, "units": [0]}
    page = Page(write_report(write_audit(tmp_path, document, spectra)))
    assert "1 of 2 health checks did not pass: asymmetry. 1 run of 6 failed with an error" in page.text


def test_the_table_of_a_huge_audit_keeps_what_matters(tmp_path, monkeypatch):
    from diffusers_geometry.report import tables, view

    for module in (tables, view):
        monkeypatch.setattr(module, "ROWS", 4)
    document, spectra = audit_document([f"prompt {i}" for i in range(6)], (0, 1), memorised=(4,), failed=(3,))
    page = Page(write_report(write_audit(tmp_path, document, spectra)))
    rows = re.findall(r'<tr><td class="number" data-value="(\d+)\.0">', page.html)
    ranks = {prompt["index"]: prompt["rank"] for prompt in document["prompts"]}
    second = next(p for p, rank in ranks.items() if rank == 2)
    assert ranks[4] == 1
    assert rows == [str(i) for i in sorted([3, 8, 9, 2 * second])]
    assert "4 of 12 runs stand here: those that failed, those of the most suspicious prompts, then the first" in page.text


def test_the_page_of_a_large_audit_is_small_and_says_what_it_leaves_out(tmp_path):
    prompts = [f"prompt {i}" for i in range(25)]
    document, spectra = audit_document(prompts, (0, 1, 2, 3), size=1024, memorised=(7,))
    write_audit(tmp_path, document, spectra)
    generator = np.random.default_rng(1)
    for unit in document["units"]:  # noise is the worst that a picture can be
        noise = generator.integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / unit["image"])
    path = write_report(tmp_path)
    page = Page(path)
    assert path.stat().st_size < 1_500_000
    shown = sum(t == "img" and "data-unit" in a for t, a in page.tags)
    rows = int(re.search(r"(\d+) of 25 prompts are shown", page.text)[1])
    assert 0 < shown == 4 * rows < 100
    assert "… prompts between these are not shown …" in page.text
    assert "rank 1 (95 %: 1 to 2) · flagged prompt 7" in page.text
    assert "rank 25 (95 %: 24 to 25) prompt" in page.text
    assert f"{len(page.data['index'])} of 1,024 singular values are drawn" in page.text
    assert len(page.data["units"]) == 100
    assert len(re.findall(r"<tr><td class=\"number\" data-value=\"\d+\.0\">", page.html)) == 100


def test_a_long_run_is_thinned_with_both_ends(tmp_path):
    document, spectra = audit_document(["a", "b", "c"], (0,))
    copies = np.repeat(np.arange(len(SIGMAS)), 40)
    document |= {name: [document[name][i] for i in copies] for name in ("steps", "geometry")}
    for unit in document["units"]:
        unit["steps"] = [unit["steps"][i] for i in copies]
    path = write_report(write_audit(tmp_path, document, spectra[:, copies]))
    page = Page(path)
    assert path.stat().st_size < 500_000
    assert len(page.data["sigmas"]) == 60
    assert (page.data["sigmas"][0], page.data["sigmas"][-1]) == ("80", "0.05")
    assert np.allclose(page.data["units"][0]["values"][-1], spectra[0, -1], rtol=1e-3)
    assert "60 of 240 recorded moments are drawn" in page.text


def test_thumbnails_keep_small_images_and_say_what_is_wrong():
    images = {0: Image.new("L", (8, 8), 77), 1: Image.new("RGB", (640, 320), (200, 10, 10)), 2: None}

    def picture(unit):
        if unit == 3:
            raise ValueError("images/3.png cannot be read: UnidentifiedImageError")
        return images[unit]

    found = thumbnails(picture, [[0, 1], [2, 3]])
    assert (found[0].pixelated, found[1].pixelated) == (True, False)
    assert found[2].uri is None
    assert found[2].problem is None
    assert "cannot be read" in found[3].problem
    decoded = {unit: Image.open(io.BytesIO(base64.b64decode(found[unit].uri.partition(",")[2]))) for unit in (0, 1)}
    assert np.asarray(decoded[0]).tolist() == np.full((8, 8), 77).tolist()
    assert decoded[1].size == (128, 64)
    assert np.abs(np.asarray(decoded[1]).astype(int) - (200, 10, 10)).max() < 6
    assert list(thumbnails(picture, [[0], [1]], budget=1)) == [0]


def test_a_document_cannot_show_files_outside_its_folder(tmp_path):
    document, spectra = audit_document(["a"], (0,))
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "audit").mkdir()
    document["units"][0]["image"] = "../secret.png"
    save_file({"singular_values": spectra}, str(tmp_path / "audit" / "spectra.safetensors"))
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(document))
    page = Page(write_report(tmp_path / "audit"))
    assert "no image, ../secret.png leads out of the folder" in page.text
    assert not [a for t, a in page.tags if t == "img" and "data-unit" in a]
    (tmp_path / "audit" / "images").mkdir()
    (tmp_path / "audit" / "images" / "0.png").write_bytes(b"no image")
    document["units"][0]["image"] = "images/0.png"
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(document))
    assert "images/0.png cannot be read: UnidentifiedImageError" in Page(write_report(tmp_path / "audit")).text


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds neither audit.json nor trace.json. Expected the folder of an audit or a trace"
    ):
        write_report(tmp_path)
    document, spectra = audit_document(["a"], (0,))
    write_audit(tmp_path, document, spectra)
    (tmp_path / "spectra.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has audit.json but not spectra.safetensors. Expected both"):
        write_report(tmp_path)
    (tmp_path / "spectra.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"spectra.safetensors is damaged: .*. Expected singular_values"):
        write_report(tmp_path)
    save_file({"singular_values": np.ascontiguousarray(spectra[:, :2])}, str(tmp_path / "spectra.safetensors"))
    with pytest.raises(ValueError, match=r"shape \(1, 2, 64\). Expected \(1, 6, 'k'\)"):
        write_report(tmp_path)
    for schema in ("diffusers_geometry.audit/2", None, "other/1"):
        (tmp_path / "audit.json").write_text(json.dumps(document | {"schema": schema}))
        with pytest.raises(
            ValueError, match=r"has schema .*. Expected 'diffusers_geometry.audit/1': use the version that wrote it"
        ):
            write_report(tmp_path)
    (tmp_path / "audit.json").write_text(json.dumps({k: v for k, v in document.items() if k != "units"}))
    with pytest.raises(ValueError, match="is damaged: it has no units"):
        write_report(tmp_path)
    (tmp_path / "audit.json").write_text(json.dumps(document | {"units": None}))
    with pytest.raises(ValueError, match="is damaged: its units is a NoneType. Expected a list"):
        write_report(tmp_path)
    (tmp_path / "audit.json").write_text("{")
    with pytest.raises(ValueError, match=r"audit.json is damaged: .*. Expected JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_what_is_null_is_left_out(tmp_path):
    document, spectra = audit_document(["a", "b", "c"], (0, 1), labels=[True, False, None], reference=True)
    write_audit(tmp_path, document, spectra)

    def emptied(value):
        return None if not isinstance(value, dict) else {name: emptied(entry) for name, entry in value.items()}

    for name in ("model", "plan", "manifold_dim", "health", "out_of_distribution", "provenance", "run"):
        less = emptied(document[name]) if name in ("model", "provenance") else None
        (tmp_path / "audit.json").write_text(json.dumps(document | {name: less}))
        assert "None" not in Page(write_report(tmp_path)).text, name
    for name in ("combined", "scores"):
        changed = document["memorization"] | {name: None}
        (tmp_path / "audit.json").write_text(json.dumps(document | {"memorization": changed}))
        assert "None" not in Page(write_report(tmp_path)).text, name


def test_nan_of_somebody_elses_hand_is_not_known(tmp_path):
    document, spectra = audit_document(["a", "b", "c"], (0, 1))
    document["geometry"][0]["psi"]["value"] = float("nan")
    document["units"][0]["steps"][-1]["nu"] = float("inf")
    page = Page(write_report(write_audit(tmp_path, document, spectra)))
    assert page.data["all"]["numbers"][0][0] == "–"
    assert page.data["units"][0]["numbers"][-1][1] == "–"


def test_a_trace_is_a_smaller_page(digits_trace):
    source = read_source(digits_trace)
    page = Page(write_report(digits_trace))
    rows = [
        row
        for row in json.loads((digits_trace / "rows.json").read_text())
        if row["step"] == source.document["steps"][-1]["position"]
    ]
    for unit, row in zip(page.data["units"], rows, strict=True):
        assert unit["numbers"][-1][0] == words.with_error(row["psi"], row["psi_sem"])
        assert unit["phases"][-1] == row["phase"]
    assert "Geometry of a generation" in page.text
    assert "Memorisation" not in page.text
    assert sum(t == "img" and "data-unit" in a for t, a in page.tags) == 2
    psi = [row["psi"] for row in rows]
    middle = source.document["geometry"][-1]["psi"]
    assert (middle["value"], middle["n"]) == (pytest.approx(np.mean(psi)), 2)
    assert middle["sem"] == pytest.approx(abs(psi[0] - psi[1]) / 2)
    assert "Geometry of digits" in (digits_trace / "report.md").read_text()


@pytest.fixture(scope="module")
def digits_trace(tmp_path_factory):
    import torch

    from diffusers_geometry.loading import load_pipeline

    folder = tmp_path_factory.mktemp("trace")
    pipe = load_pipeline(None, "float32", "cpu")
    generator = torch.Generator().manual_seed(0)
    trace = pipe.analyze_geometry(num_inference_steps=6, record_steps=3, batch_size=2, generator=generator, progress=False)
    trace.save_pretrained(folder)
    (folder / "rows.json").write_text(json.dumps(trace.rows()))
    return folder


def test_a_real_audit_says_what_its_documents_say(tmp_path):
    from diffusers_geometry.audit import audit_model
    from diffusers_geometry.bundled import DIGITS

    audit = audit_model(DIGITS, seeds=(0, 1), output_dir=tmp_path, call={"num_inference_steps": 4}, record_steps=2, progress=False)
    page = Page(write_report(tmp_path))
    document = audit.document
    for i, unit in enumerate(document["units"]):
        assert page.data["units"][i]["phases"] == [step["phase"] for step in unit["steps"]]
        told = [words.with_error(step["psi"], step["psi_sem"]) for step in unit["steps"]]
        assert [numbers[0] for numbers in page.data["units"][i]["numbers"]] == told
    assert "2 of 2 runs finished" in page.text
    assert document["model"]["weights_sha256"] in page.text
    assert sum(t == "img" and "data-unit" in a for t, a in page.tags) == 2
    assert words.estimate(document["geometry"][-1]["nu"]) in page.text
    text = (tmp_path / "report.md").read_text()
    assert words.estimate(document["geometry"][-1]["nu"]) in text
    assert "## Memorisation\n\nPrompts are compared with one another, and this model was run without.\n" in text
    assert f"huggingface_hub {document['provenance']['versions']['huggingface_hub']}" in text


@pytest.mark.parametrize(
    ("value", "sem", "said"),
    [
        (12.345, 0.678, "12.35 ± 0.68"), (-3.14159, 0.0021, "−3.1416 ± 0.0021"), (1234.5, 67.8, "1,234 ± 68"), (5.0, 0.0, "5"),
        (0.1234567, None, "0.1235"), (None, 0.1, "–"), (float("nan"), 0.1, "–"), (1.0, float("nan"), "1"),
        (1e-9, 2e-10, "1e−09 ± 2e−10"),
        (-0.5, 1e-20, "−0.5"), (123456.0, None, "123,456"), (0.25, 0.1, "0.25 ± 0.10"), (1.5, 0.0996, "1.500 ± 0.100"),
    ],
)  # fmt: skip
def test_numbers_with_errors(value, sem, said):
    assert words.with_error(value, sem) == said


def test_other_words():
    assert words.estimate({"value": 1.5, "sem": None, "n": 1}, "nats") == "1.5 nats (one value)"
    assert words.estimate({"value": 1.5, "sem": None, "n": 4}) == "1.5 (error not known)"
    assert words.interval({"value": 0.5, "low": 0.25, "high": 0.75}) == "0.500 (95 %: 0.250 to 0.750)"
    assert words.interval({"value": 0.5, "low": None, "high": None}) == "0.500 (interval not known)"
    assert words.interval({"value": 1.0, "low": 1.0, "high": 1.0}) == "1.000 (resampling these prompts gives no interval)"
    assert [words.percent(s) for s in (0.0, 1.0, 0.5, 0.004, 0.999, None)] == ["0 %", "100 %", "50 %", "0.4 %", "99.9 %", "–"]
    assert [words.seconds(s) for s in (0.5, 90, 600, 7200, 200000, None)] == [
        "0.5 s",
        "90.0 s",
        "10.0 min",
        "2.0 h",
        "2.3 days",
        "–",
    ]
    assert [words.noise(s) for s in (None, float("inf"), 0.0123456)] == ["∞", "∞", "0.0123"]
    assert [words.link(u) for u in ("https://a.b/c", "javascript:alert(1)", "file:///etc/passwd", "http://[", None)] == [
        "https://a.b/c", None, None, None, None
    ]  # fmt: skip
    assert words.script_json({"a": "</script><!--\u2028&"}) == '{"a":"\\u003c/script\\u003e\\u003c!--\\u2028\\u0026"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        words.script_json([float("nan")])


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_both_themes():
    style = (ROOT / "diffusers_geometry" / "report" / "templates" / "report.css").read_text()
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\);", style)
    assert len(found) == style.count("light-dark(") >= 14
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for theme in (1, 2):
        colours = {line[0]: line[theme] for line in found}
        for ground in ("page", "surface"):
            for ink in ("text", "muted", "accent", "good", "bad"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (theme, ink, ground)
            for ink in ("edge", "coverage", "consolidation", "series-0", "series-1", "series-2", "series-3"):
                assert contrast(colours[ink], colours[ground]) >= 2.8, (theme, ink, ground)


def test_the_wheel_holds_the_templates(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for name in ("report.html.j2", "report.md.j2", "report.css", "report.js"):
        assert f"diffusers_geometry/report/templates/{name}" in names
