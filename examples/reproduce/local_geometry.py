"""psi, nu and delta of images: what they follow, how steady delta is, what they say of data sets and of spoiled images.

python examples/reproduce/local_geometry.py     # about a quarter of an hour of one core; continues after a stop from a cache folder

The reward that ranks images is that of guidance.py, from its cache; without it a quarter of an hour goes into making one.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import delta_stability
import guidance_bench
import numpy as np
import torch
from arguments import parse
from image_measures import CORRUPTIONS, corrupted, edge_density, file_size, nearest_distance
from local_figures import draw_delta, draw_pairs, draw_separation, draw_sheet
from local_probe import DESCRIPTORS, Probe, psi_at, reliability
from local_tables import report
from resampling import interval, mean_difference, spread_ratio
from separation import Scores, separation
from torch import Tensor
from train_digits import digits_split

from diffusers_geometry.dataset import generate_dataset
from diffusers_geometry.labels import DatasetRequest

VERDICT = """\
Of the generated digits ψ and ν say something steady: two draws of the noise rank the images alike (0.93 and 0.83), and what they
rank lowest are ones, highest digits of many strokes. As visual complexity this is weak. ν goes with file size at 0.53, ψ at 0.27,
δ at 0.17; with edge density ψ hardly goes (0.12) and ν not at all, while δ falls with it a little, and of emoji it falls at -0.58.
What ψ goes with most is the error of D: of emoji at 0.91, more than with file size (0.58). ψ and δ
of digits go with one another (and the reward with both), so they are not two witnesses; the change of D', which should accompany δ
in smooth networks, does not, and two draws rank it at 0.40 only. How many values ψ sums matters: over the largest four it ranks
images at 0.72 with ψ here, over all 64 at 0.67. The reward of the guidance study, on seeds it has not seen, ranks images at 0.77
with true ψ. δ is steady: from a quarter of the radius to eight times it, and from two directions to 32, it ranks images at 0.92 or
more with the setting used, and with the radius scaled by √d the share of knots met is nearly the same function of it in 64 and in
768 dimensions. Along the axes it meets twice the knots of 32 random directions, since a step into one pixel is another thing than
one into all. A group of emoji of little variance is not narrower in ψ than all groups beyond its error (0.85 of its spread,
0.65 to 1.13): of the two that vary least one lies 0.7 standard deviations above all in ψ and 0.95 in δ, the other in neither;
file size tells both groups from all, and is narrower in both. Of spoiled digits the descriptors say less than a sceptic's
baselines. ψ, ν and δ all rise, and their direction holds on unseen images; but the error of D itself, which needs no Jacobian,
is better than the best of them over all corruptions together (0.91 against 0.72 to 0.82), file size is better at weak noise
and edge density at weak blur. Where a descriptor is as good as the best baseline both are all but perfect, and there is no
corruption here at which one is better."""

JUDGED = ("psi", "nu", "delta")  # the change of D' scatters too much between draws to be worth its cost there
FIRST_SEED, STEPS = 2_000_000, 50
APART = 60  # emoji of the set of all groups and of no other; the set may be smaller
LEVELS = {"digits": 17, "ddpm-emoji": 256}  # grey levels of the data


@dataclass(frozen=True)
class Effort:
    """How much is measured; counts are of images, ``groups`` of the groups of emoji that are compared with all."""

    generated: int = 1000
    noises: int = 2
    swept: int = 60
    emoji_swept: int = 20
    emoji: int = 40
    groups: int = 2
    held_out: int = 120
    directions: tuple[int, ...] = delta_stability.DIRECTIONS
    corruptions: tuple[str, ...] = CORRUPTIONS
    reward: guidance_bench.Effort = field(default_factory=guidance_bench.Effort)


SMOKE = Effort(4, 2, 2, 0, 0, 0, 4, (1, 8), ("noise 0.4",), replace(guidance_bench.SMOKE, label_seeds=6, held_out=0.67))


@dataclass
class Images:
    """Images under a model with every number about them, each (n,)."""

    images: Tensor
    scores: Scores
    found: dict[str, np.ndarray]


def looked_at(probe: Probe, images: Tensor) -> Images:
    """Descriptors, mean over the draws of the noise, and the baselines that need no Jacobian."""
    found = probe.measure(images)
    scores = {name: found[name].mean(1) for name in DESCRIPTORS if name in found}
    scores |= {"file size": file_size(images, LEVELS[probe.name]), "edge density": edge_density(images)}
    return Images(images, scores | {"denoising error": found["error"].mean(1)}, found)


def generated(probe: Probe, count: int) -> Tensor:
    """Final samples in [-1, 1] of seeds from ``FIRST_SEED``."""
    pipe, images = probe.pipeline(), []
    for seeds in torch.arange(FIRST_SEED, FIRST_SEED + count).split(250):
        call = {"batch_size": len(seeds), "num_inference_steps": STEPS, "output_type": "np"}
        images.append(pipe(generator=[torch.Generator().manual_seed(int(s)) for s in seeds], **call).images)
    return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous() * 2 - 1


def reward_scores(images: Tensor, effort: Effort, cache: Path | None) -> np.ndarray:
    """psi as the reward of the guidance study predicts it at its smallest noise, mean over four draws common to all images."""
    bench = guidance_bench.Bench(effort.reward, cache)
    if not (bench.folder / "reward" / "metrics.json").exists():
        call = {"num_inference_steps": guidance_bench.STEPS, "output_type": "np"}
        request = DatasetRequest(
            seeds=range(effort.reward.label_seeds), record_steps=guidance_bench.LABELLED, psi_rank=guidance_bench.RANK,
            batch_size=48, held_out=effort.reward.held_out, call=call,
        )  # fmt: skip
        generate_dataset(bench.pipe, bench.labels, request, progress=False)
    reward, metrics = bench.reward(False)
    sigma = min(level["sigma"] for level in metrics["levels"])
    alpha = (1 + sigma**2) ** -0.5
    noise = torch.randn(4, *images[0].shape, generator=torch.Generator().manual_seed(78))
    with torch.no_grad():
        return torch.stack([reward.predict(alpha * (images + sigma * e), sigma, alpha) for e in noise]).mean(0).numpy()


def emoji_sets(count: int, wanted: int) -> dict[str, Tensor]:
    """A set drawn from all emoji, then one from each of the ``wanted`` groups that vary least, none of them in the first."""
    from data import emoji_split

    images, groups, *_ = emoji_split()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3)).tolist()
    own = {name: [i for i in range(len(images)) if groups[i] == name] for name in sorted(set(groups))}
    variance = {name: float(images[rows].flatten(1).var(0).sum()) for name, rows in own.items()}
    rest = {name: [i for i in order[APART:] if groups[i] == name][:count] for name in sorted(variance, key=variance.get)[:wanted]}
    return {"all groups": images[order[:count]]} | {name: images[rows] for name, rows in rest.items()}


def compared(sets: dict[str, Images]) -> dict[str, dict[str, Any]]:
    """Per group and score: difference of means from the set of all, in its standard deviations, and the ratio of the spreads."""
    everything, *_ = sets.values()
    result = {}
    for name, own in list(sets.items())[1:]:
        pairs = {score: (own.scores[score], everything.scores[score]) for score in own.scores}
        result[name] = {
            score: (interval(mean_difference, *pair, paired=False), interval(spread_ratio, *pair, paired=False))
            for score, pair in pairs.items()
        }
    return result


def spoiled(probe: Probe, effort: Effort) -> tuple[Images, dict[str, Images]]:
    """Held-out digits, and copies of them under every corruption."""
    training, _, unseen, _ = digits_split()
    whole = unseen[: effort.held_out]

    def look(images: Tensor) -> Images:
        seen = looked_at(probe, images)
        seen.scores["nearest"] = nearest_distance(images, training)
        return seen

    copies = {kind: corrupted(whole, kind, torch.Generator().manual_seed(9)) for kind in effort.corruptions}
    return look(whole), {kind: look(images) for kind, images in copies.items()}


def measure(effort: Effort, folder: Path | None, reward_cache: Path | None) -> dict[str, Any]:
    """Everything that takes time, and what follows from it."""
    digits, emoji = Probe("digits", effort.noises, folder), Probe("ddpm-emoji", 1, folder)
    made = looked_at(digits, generated(digits, effort.generated))
    result = {"generated": made, "reward": reward_scores(made.images, effort, reward_cache)}
    result["reliability"] = {name: reliability(made.found[name]) for name in DESCRIPTORS}
    result["ranks"] = {r: psi_at(made.found["values"], r) for r in (4, 8, 16, 32, 64)}
    if effort.emoji:
        sets = emoji_sets(effort.emoji, effort.groups)
        result["emoji"] = {name: looked_at(emoji, images) for name, images in sets.items()}
        result["compared"] = compared(result["emoji"])
    whole, copies = spoiled(replace(digits, products=0), effort)
    cases = {kind: [copy.scores] for kind, copy in copies.items()} | {"any of these": [copy.scores for copy in copies.values()]}
    result["separation"] = {kind: separation(whole.scores, own, JUDGED) for kind, own in cases.items()}
    result["spoiled"] = whole, copies
    few = made.images[: effort.swept]
    result["radii"] = {"digits": delta_stability.over_radii(digits, few)}
    result["directions"] = {k: delta_stability.over_directions(digits, few, k) for k in effort.directions}
    if effort.emoji:
        result["radii"]["ddpm-emoji"] = delta_stability.over_radii(emoji, sets["all groups"][: effort.emoji_swept])
    return result


def main() -> None:
    output, smoke = parse(__doc__)
    cache = None if smoke else Path(tempfile.gettempdir())
    effort = SMOKE if smoke else Effort()
    folders = (None, None) if smoke else (cache / "diffusers_geometry_local", cache / "diffusers_geometry_guidance")
    measured = measure(effort, *folders)
    figures = {"pairs": draw_pairs, "sheet": draw_sheet, "delta": draw_delta, "separation": draw_separation}
    for name, draw in figures.items():
        draw(measured).savefig(output / f"local_geometry_{name}.png", dpi=90)
    (output / "local_geometry.md").write_text("\n".join(report(measured, VERDICT)))
    print(output / "local_geometry.md")


if __name__ == "__main__":
    main()
