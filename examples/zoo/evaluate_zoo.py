"""Measure a shipped model of the zoo and write its card: quality.json, README.md and the figures in its folder.

python examples/zoo/evaluate_zoo.py sd-mnist          # minutes each; all of them with no name
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cards import write_card
from data import PROPERTIES, caption, caption_words, digits_split, emoji_split, half_told, mnist_limits, planted_phrases
from figures import contact_sheet, loss_figure, manifold_figure
from load import ZOO, load_basis, load_zoo, names
from manifold import manifold_figures
from quality import compare, nearest, planted_radius
from shared import load_classifier, reconstructions
from torch import Tensor

CONFIDENT = 0.9
BATCH = 100
# Steps, and the guidance scales that are measured: a mild one first, then the default of the pipeline's class.
GUIDED = {
    "sd-mnist": (50, (3.0, 7.5)),
    "sd-mnist-v": (50, (3.0, 7.5)),
    "dit-mnist": (50, (2.0, 4.0)),
    "sd3-mnist": (28, (3.0, 7.0)),
}
PIXEL = {"ddpm-mnist": (250, 250), "ddpm-emoji": (206, 100)}  # samples, and steps of the DDPM scheduler
SEEDS = 10  # per phrase
SMOKE = {"per_digit": 5, "samples": 70, "steps": 2, "seeds": 1, "phrases": 2}


def weights_sha256(folder: Path) -> str:
    """One hash over all weights of a model: what its figures were measured on."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to_signed(images: Tensor) -> Tensor:
    """A pipeline's images in [0, 1] as images in [-1, 1]."""
    return images.float() * 2 - 1


def in_batches(items: list, generate: Callable[[list, torch.Generator], Tensor]) -> Tensor:
    """Images (n, ...) of all items, a batch and a seed at a time."""
    batches = [items[i : i + BATCH] for i in range(0, len(items), BATCH)]
    return torch.cat([to_signed(generate(batch, seeded(seed))) for seed, batch in enumerate(batches)])


def guided(pipe: Any, asked: list[str] | list[int], guidance: float, steps: int) -> Tensor:
    """An image for every prompt or class label."""
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    return in_batches(asked, lambda batch, generator: pipe(batch, generator=generator, **options).images)


def unguided(pipe: Any, count: int, steps: int) -> Tensor:
    def generate(batch: list, generator: torch.Generator) -> Tensor:
        images = pipe(len(batch), generator, num_inference_steps=steps, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    return in_batches(list(range(count)), generate)


def held_out_by_digit(per_digit: int, offset: int = 0) -> Tensor:
    """Positions in the held-out split, ``per_digit`` of each digit in turn."""
    labels = digits_split()[1].labels
    return torch.cat([(labels == digit).nonzero().flatten()[offset : offset + per_digit] for digit in range(10)])


@torch.no_grad()
def features(images: Tensor) -> np.ndarray:
    return load_classifier().features(images).numpy()


def words_that_hold(images: Tensor, labels: Tensor, told: Tensor) -> dict[str, float]:
    """For every property, the share of images that measure as they were told; properties that nobody was told are left out."""
    holds = caption_words(images, labels, mnist_limits()) == told
    shares = {name: holds[told[:, i] >= 0, i].float() for i, name in enumerate(PROPERTIES)}
    return {name: share.mean().item() for name, share in shares.items() if len(share)}


def guided_quality(
    name: str, pipe: Any, per_digit: int, steps: int | None = None, scales: int | None = None
) -> tuple[dict, Tensor]:
    """Asked digits, distances and diversity at each guidance scale (or the first few); and the first scale's images."""
    held_out, steps = digits_split()[1], steps or GUIDED[name][0]
    asked, other = held_out[held_out_by_digit(per_digit)], held_out[held_out_by_digit(per_digit, per_digit)]
    told = half_told(asked.words, seeded(0))
    prompts = [caption(tuple(words), digit) for words, digit in zip(told.tolist(), asked.labels.tolist(), strict=True)]
    real = [features(digits.images) for digits in (asked, other)]
    figures, shown = {}, None
    for scale in GUIDED[name][1][:scales]:
        images = guided(pipe, asked.labels.tolist() if name == "dit-mnist" else prompts, scale, steps)
        shown = images if shown is None else shown
        seen = load_classifier().probabilities(images).argmax(1)
        figures[str(scale)] = {"steps": steps, "asked_digit_share": (seen == asked.labels).float().mean().item()}
        figures[str(scale)] |= compare(features(images), *real)
        if name != "dit-mnist":
            figures[str(scale)]["told_words_hold_share"] = words_that_hold(images, asked.labels, told)
    return {"per_digit": per_digit, "guidance": figures}, shown


def memorisation(
    pipe: Any, seeds: int, phrases: int | None = None, steps: int | None = None, scales: int | None = None
) -> tuple[dict, Tensor]:
    """How often planted phrases recite their image, and controls any image; and planted images above what was generated."""
    steps = steps or GUIDED["sd-mnist"][0]
    train, held_out = (reconstructions(split.images) for split in digits_split())
    planted, controls = (planted_phrases()[kind][:phrases] for kind in ("planted", "controls"))
    radius, figures, shown = planted_radius(train), {}, None
    for scale in GUIDED["sd-mnist"][1][:scales]:
        images = guided(pipe, [p["caption"] for p in planted + controls for _ in range(seeds)], scale, steps)
        recited, free = images.unflatten(0, (-1, seeds)).split([len(planted), len(controls)])
        own = train[[p["image"] for p in planted]]
        distance = (recited - own[:, None]).flatten(2).norm(dim=2)  # (phrases, seeds)
        hit = distance <= radius
        control_distance = nearest(free.flatten(0, 1), train)
        shown = torch.cat([own[:12], recited[:12, 0]]) if shown is None else shown
        figures[str(scale)] = {
            "planted_captions_recited_share": (hit.float().mean(1) >= 0.8).float().mean().item(),
            "planted_seed_share": hit.float().mean().item(),
            "control_seed_share": (control_distance <= radius).float().mean().item(),
            "median_planted_distance": distance.median().item(),
            "median_control_distance": control_distance.median().item(),
        }
    unseen, ones = nearest(held_out, train) <= radius, digits_split()[1].labels == 1
    rates = {"held_out_share": unseen.float().mean().item(), "held_out_share_without_ones": unseen[~ones].float().mean().item()}
    return {"radius": radius, **rates, "seeds_per_caption": seeds, "captions": len(planted), "guidance": figures}, shown


def digit_model(name: str, folder: Path, smoke: bool) -> dict:
    pipe = load_zoo(name)
    pipe.set_progress_bar_config(disable=True)
    if name == "ddpm-mnist":
        return ddpm_digits(pipe, folder, smoke)
    per_digit, seeds, phrases, steps = (
        (SMOKE[k] for k in ("per_digit", "seeds", "phrases", "steps")) if smoke else (30, SEEDS, None, None)
    )
    quality, shown = guided_quality(name, pipe, per_digit, steps)
    contact_sheet(shown.unflatten(0, (10, -1))[:, :12].flatten(0, 1), folder / "samples.png", columns=min(12, len(shown) // 10))
    if name == "sd-mnist":
        quality["memorisation"], shown = memorisation(pipe, seeds, phrases, steps)
        contact_sheet(shown, folder / "planted.png", columns=len(shown) // 2)
    return quality


def ddpm_digits(pipe: Any, folder: Path, smoke: bool) -> dict:
    count, steps = (SMOKE["samples"], SMOKE["steps"]) if smoke else PIXEL["ddpm-mnist"]
    images = unguided(pipe, count, steps)
    confidence = load_classifier().probabilities(images)
    shares = torch.bincount(confidence.argmax(1), minlength=10) / count
    halves = features(digits_split()[1].images).reshape(2, -1, load_classifier().config.num_features)
    contact_sheet(images[:60], folder / "samples.png", columns=12)
    return {
        "samples": count, "steps": steps, "confident_share": (confidence.amax(1) >= CONFIDENT).float().mean().item(),
        "class_shares": shares.tolist(), **compare(features(images), *halves),
        "median_distance_to_training": nearest(images, digits_split()[0].images).median().item(),
        "median_distance_of_held_out": nearest(digits_split()[1].images, digits_split()[0].images).median().item(),
    }  # fmt: skip


def emoji_model(folder: Path, smoke: bool) -> dict:
    """Features are the 64 principal components of the training pixels: the digits' classifier has never seen an emoji."""
    pipe = load_zoo("ddpm-emoji")
    pipe.set_progress_bar_config(disable=True)
    train, _, held_out, _ = emoji_split()
    count, steps = (SMOKE["samples"], SMOKE["steps"]) if smoke else PIXEL["ddpm-emoji"]
    images = unguided(pipe, count, steps)
    mean = train.flatten(1).mean(0)
    basis = torch.linalg.svd(train.flatten(1) - mean, full_matrices=False)[2][:64].T
    generated, real = (((x.flatten(1) - mean) @ basis).numpy() for x in (images, held_out))
    radius, distance, unseen = planted_radius(train), nearest(images, train), nearest(held_out, train)
    contact_sheet(images[:60], folder / "samples.png", columns=12)
    return {
        "samples": count, "steps": steps, **compare(generated, *np.array_split(real, 2)),
        "median_distance_to_training": distance.median().item(), "median_distance_of_held_out": unseen.median().item(),
        "radius": radius, "within_radius_share": (distance <= radius).float().mean().item(),
        "held_out_within_radius_share": (unseen <= radius).float().mean().item(),
    }  # fmt: skip


def linear_model(name: str, folder: Path, smoke: bool) -> dict:
    quality, curves = manifold_figures(load_zoo(name), load_basis(name), num_sigmas=30 if smoke else 100)
    manifold_figure(curves, folder / "spectra.png")
    return quality


def evaluate(name: str, output: Path, smoke: bool) -> None:
    """Writes quality.json, the figures and the card of one model; raises ValueError for an unknown one."""
    if name not in names():
        raise ValueError(f"name={name!r}. Expected one of {names()}.")
    output.mkdir(parents=True, exist_ok=True)
    if name.startswith("linear-manifold"):
        quality = linear_model(name, output, smoke)
    elif name == "ddpm-emoji":
        quality = emoji_model(output, smoke)
    else:
        quality = digit_model(name, output, smoke)
        quality["classifier_accuracy"] = json.loads((ZOO / "shared" / "classifier" / "training.json").read_text())[
            "held_out_accuracy"
        ]
    quality["weights_sha256"] = weights_sha256(ZOO / name)
    training = json.loads((ZOO / name / "training.json").read_text())
    loss_figure(training["loss_curve"], output / "loss.png", name)
    (output / "quality.json").write_text(json.dumps(quality, indent=1, allow_nan=False) + "\n")
    write_card(name, training, quality, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models, all by default")
    parser.add_argument("--output", type=Path, default=ZOO, help="where the folder with the card goes")
    parser.add_argument("--smoke", action="store_true", help="a handful of samples in a temporary folder, to see that it runs")
    args = parser.parse_args()
    output = Path(tempfile.mkdtemp()) if args.smoke and args.output == ZOO else args.output
    for name in args.names or names():
        evaluate(name, output / name, args.smoke)
        print(f"{name}: {output / name / 'README.md'}")


if __name__ == "__main__":
    main()
