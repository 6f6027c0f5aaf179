"""A page of blinded pairs for a study of what people prefer, and the score of their answers.

python examples/reproduce/preference_page.py results/descriptor_pairs_key.json answers.json ...

The page is one HTML file without any network: images side by side, the sides and the order of the pairs drawn from a seed, buttons
and keys to choose, answers to download as JSON. Which image is which stands in the key alone, a file beside it. Answers are matched
to the key by the page's hash.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

TEMPLATE = Path(__file__).with_suffix(".html")
ANSWERS = ("left", "right", "neither")


@dataclass(frozen=True)
class Pair:
    """Two images (c, h, w) in [-1, 1], what each is, and the seed that both have."""

    first: Tensor
    second: Tensor
    first_is: str
    second_is: str
    seed: int


@dataclass(frozen=True)
class Preference:
    """How often the first of a kind of pair was preferred.

    Attributes:
        kind: "first against second".
        share: Of the decided answers that preferred the first; None without any.
        low: Of the 95 % Wilson interval, as ``high``.
        p_value: Of a fair coin, two-sided.
        decided: Answers that preferred one; ``undecided`` those that did not.
    """

    kind: str
    share: float | None
    low: float
    high: float
    p_value: float
    decided: int
    undecided: int

    def __str__(self) -> str:
        share = "-" if self.share is None else f"{self.share:.1%}"
        answers = f"{self.decided} decided answers, {self.undecided} undecided"
        return f"{self.kind}: {share} preferred the first [{self.low:.1%}, {self.high:.1%}], p = {self.p_value:.2g}, {answers}"


def write_page(
    pairs: Sequence[Pair], folder: Path, name: str, seed: int, question: str = "Look at both images."
) -> tuple[Path, Path]:
    """Writes ``name.html`` and ``name_key.json``; the same bytes for the same pairs and seed.

    Raises:
        ValueError: no pairs, or two images of another shape.
    """
    if not pairs or any(p.first.shape != p.second.shape for p in pairs):
        raise ValueError(f"{len(pairs)} pairs. Expected at least one, of two images of one shape.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    swapped = (torch.rand(len(pairs), generator=generator) < 0.5).tolist()
    shown, key = [], []
    for place, (i, swap) in enumerate(zip(order, swapped, strict=True)):
        pair, identity = pairs[i], f"pair-{place:03d}"
        images, names = [_data(pair.first), _data(pair.second)], [pair.first_is, pair.second_is]
        left, right = (1, 0) if swap else (0, 1)
        shown.append({"id": identity, "left": images[left], "right": images[right]})
        kind = {"first": pair.first_is, "second": pair.second_is, "seed": pair.seed}
        key.append({"id": identity, "left": names[left], "right": names[right], **kind})
    text = json.dumps(shown, indent=0)
    page = hashlib.sha256((question + text).encode()).hexdigest()
    html = TEMPLATE.read_text().replace("__QUESTION__", question).replace("__PAGE__", json.dumps(page)).replace("__PAIRS__", text)
    paths = folder / f"{name}.html", folder / f"{name}_key.json"
    paths[0].write_text(html)
    paths[1].write_text(json.dumps({"page": page, "seed": seed, "pairs": key}, indent=1))
    return paths


def score(key: dict[str, Any], answers: Sequence[dict[str, Any]]) -> list[Preference]:
    """Per kind of pair, how often its first was preferred, over all answer sheets.

    Args:
        key: As :func:`write_page` wrote it.
        answers: Sheets as the page gives them; pairs may be left out.

    Raises:
        ValueError: a sheet of another page, a pair that is not on it, or an answer that is none.
    """
    pairs = {pair["id"]: pair for pair in key["pairs"]}
    kinds: dict[str, list[str]] = {f"{p['first']} against {p['second']}": [] for p in key["pairs"]}
    for sheet in answers:
        if sheet.get("page") != key["page"]:
            raise ValueError(f"answers to page {str(sheet.get('page'))[:12]}. Expected {key['page'][:12]}, the page of this key.")
        for identity, answer in sheet["answers"].items():
            if identity not in pairs or answer not in ANSWERS:
                raise ValueError(f"answer {answer!r} to {identity!r}. Expected one of {ANSWERS} to a pair of the page.")
            pair = pairs[identity]
            kinds[f"{pair['first']} against {pair['second']}"].append(pair.get(answer, "neither"))
    return [_preference(kind, given) for kind, given in kinds.items()]


def _preference(kind: str, given: list[str]) -> Preference:
    decided = [answer for answer in given if answer != "neither"]
    if not decided:
        return Preference(kind, None, 0.0, 1.0, 1.0, 0, len(given))
    test = binomtest(sum(answer == kind.split(" against ")[0] for answer in decided), len(decided))
    interval = test.proportion_ci(0.95, "wilson")
    counts = len(decided), len(given) - len(decided)
    return Preference(kind, float(test.statistic), float(interval.low), float(interval.high), float(test.pvalue), *counts)


def _data(image: Tensor) -> str:
    """A PNG as an address that needs no network."""
    from PIL import Image

    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Scores answer sheets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("key", type=Path)
    parser.add_argument("answers", type=Path, nargs="+")
    args = parser.parse_args()
    sheets = [json.loads(path.read_text()) for path in args.answers]
    print("\n".join(map(str, score(json.loads(args.key.read_text()), sheets))))


if __name__ == "__main__":
    main()
