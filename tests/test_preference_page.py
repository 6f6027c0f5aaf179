"""The page of blinded pairs: the same from the same seed, silent about which is which, and its answers scored with an interval."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom

REPRODUCE = Path(__file__).parent.parent / "examples" / "reproduce"
sys.path.append(str(REPRODUCE))

from preference_page import Pair, score, write_page  # noqa: E402


def images(count, seed):
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def pairs():
    up, down, plain = images(24, 1), images(24, 2), images(24, 3)
    kinds = [Pair(up[i], plain[i], "psi+", "unguided", 90_000 + i) for i in range(12)]
    return kinds + [Pair(up[i], down[i], "psi+", "psi-", 90_000 + i) for i in range(12, 24)]


@pytest.fixture(scope="module")
def written(pairs, tmp_path_factory):
    page, key = write_page(pairs, tmp_path_factory.mktemp("page"), "study", 7)
    return page.read_text(), json.loads(key.read_text())


def shown(html):
    return json.loads(re.search(r"const pairs = (\[.*?\]);", html, flags=re.DOTALL).group(1))


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.removeprefix("data:image/png;base64,")))))


def test_the_same_seed_gives_the_same_bytes_and_another_another_order(pairs, written, tmp_path):
    for seed, equal in ((7, True), (8, False)):
        page, key = write_page(pairs, tmp_path, "again", seed)
        assert (page.read_text() == written[0]) == equal
        assert (json.loads(key.read_text()) == written[1]) == equal


def test_the_key_says_what_the_page_shows(pairs, written):
    html, key = written
    by_seed = {pair.seed: pair for pair in pairs}
    assert [row["id"] for row in shown(html)] == [row["id"] for row in key["pairs"]]
    assert sorted(row["seed"] for row in key["pairs"]) == sorted(by_seed)
    for row, said in zip(shown(html), key["pairs"], strict=True):
        pair = by_seed[said["seed"]]
        held = {pair.first_is: pair.first, pair.second_is: pair.second}
        for side in ("left", "right"):
            expected = ((held[said[side]] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(pixels(row[side]), expected)
    sides = [row["left"] == "psi+" for row in key["pairs"]]
    assert 0 < sum(sides) < len(sides)
    assert [row["seed"] for row in key["pairs"]] != sorted(by_seed)


def test_the_page_tells_nothing_and_needs_no_network(written):
    html, key = written
    told = re.sub(r"data:image/png;base64,[\w+/=]+", "", html)
    for name in ("psi", "guided", "seed", *(str(row["seed"]) for row in key["pairs"])):
        assert name not in told.lower()
    assert "http://" not in html
    assert "https://" not in html
    assert "default-src 'none'" in html
    assert len({len(row) for row in shown(html)}) == 1
    assert all(set(row) == {"id", "left", "right"} for row in shown(html))


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_of_the_page_takes_keys_and_gives_answers(written, tmp_path):
    """The page's own script on a document of a few lines: two choices, one of them taken back."""
    script = re.search(r"<script>(.*)</script>", written[0], flags=re.DOTALL).group(1)
    stage = """
const parts = {}, listeners = {};
const part = (id) => parts[id] ??= {classList: {toggle() {}}, addEventListener(name, f) { this[name] = f; }, value: 0};
let written = null;
globalThis.Blob = class { constructor(texts) { written = texts.join(""); } };
URL.createObjectURL = () => "blob:"; URL.revokeObjectURL = () => {};
globalThis.document = {getElementById: part, createElement: () => ({click() {}}),
  addEventListener(name, f) { listeners[name] = f; }};
"""
    use = """
const press = (key) => listeners.keydown({key: key, preventDefault() {}});
press("ArrowLeft"); press("ArrowRight"); press("Backspace"); press("ArrowDown"); press("q");
parts["right"].click(); parts["download"].click();
console.log(written); process.exit(0);
"""
    (tmp_path / "page.js").write_text(stage + script + use)
    done = subprocess.run(["node", str(tmp_path / "page.js")], capture_output=True, text=True, check=True)
    sheet = json.loads(done.stdout)
    assert sheet == {"page": written[1]["page"], "answers": {"pair-000": "left", "pair-001": "neither", "pair-002": "right"}}


def sheet(key, choose):
    return {"page": key["page"], "answers": {row["id"]: choose(row) for row in key["pairs"]}}


def side_of(row, name):
    return "left" if row["left"] == name else "right"


def test_answers_are_scored_by_what_was_chosen_not_by_its_side(written):
    key = written[1]

    def always_psi(row):
        return side_of(row, "psi+")

    def nine_of_twelve(row):
        within = sum(r["second"] == row["second"] for r in key["pairs"][: key["pairs"].index(row)])
        return side_of(row, "psi+") if within < 9 else side_of(row, row["second"]) if within < 11 else "neither"

    for found in score(key, [sheet(key, always_psi)]):
        assert (found.share, found.decided, found.undecided) == (1.0, 12, 0)
        assert found.p_value == pytest.approx(2 * 0.5**12)
        assert found.low == pytest.approx(1 / (1 + 1.959964**2 / 12), abs=1e-5)  # Wilson's, for twelve of twelve
        assert found.high == 1
    both = {found.kind: found for found in score(key, [sheet(key, nine_of_twelve), sheet(key, nine_of_twelve)])}
    assert set(both) == {"psi+ against unguided", "psi+ against psi-"}
    for found in both.values():
        assert found.share == pytest.approx(18 / 22)
        assert (found.decided, found.undecided) == (22, 2)
        assert found.p_value == pytest.approx(2 * binom.sf(17, 22, 0.5))
        assert found.low < 18 / 22 < found.high
    left = {found.kind: found.share for found in score(key, [sheet(key, lambda row: "left")])}
    for kind, share in left.items():
        own = [row for row in key["pairs"] if f"{row['first']} against {row['second']}" == kind]
        assert share == pytest.approx(sum(row["left"] == "psi+" for row in own) / 12)
    silent = score(key, [sheet(key, lambda row: "neither"), {"page": key["page"], "answers": {}}])
    assert [(found.share, found.low, found.high, found.undecided) for found in silent] == [(None, 0, 1, 12)] * 2


def test_sheets_of_another_page_and_wrong_answers_are_refused(written, pairs, tmp_path):
    key = written[1]
    with pytest.raises(ValueError, match=r"answers to page 0000. Expected \w{12}, the page of this key"):
        score(key, [{"page": "0000", "answers": {}}])
    for answers in ({"pair-000": "up"}, {"pair-999": "left"}):
        with pytest.raises(ValueError, match=r"Expected one of \('left', 'right', 'neither'\) to a pair of the page"):
            score(key, [{"page": key["page"], "answers": answers}])
    with pytest.raises(ValueError, match="0 pairs. Expected at least one"):
        write_page([], tmp_path, "none", 0)


def test_the_committed_page_and_key_belong_together(tmp_path):
    html, key = ((REPRODUCE / "results" / name).read_text() for name in ("descriptor_pairs.html", "descriptor_pairs_key.json"))
    key = json.loads(key)
    assert f'const page = "{key["page"]}"' in html
    assert len(shown(html)) == len(key["pairs"]) >= 40
    (tmp_path / "answers.json").write_text(json.dumps(sheet(key, lambda row: "left")))
    command = [sys.executable, str(REPRODUCE / "preference_page.py"), str(REPRODUCE / "results" / "descriptor_pairs_key.json")]
    done = subprocess.run([*command, str(tmp_path / "answers.json")], capture_output=True, text=True, check=True)
    assert re.search(r"psi\+ against unguided: \d+\.\d% preferred the first \[.*\], p = .*, 24 decided answers", done.stdout)
