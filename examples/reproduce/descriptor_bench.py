"""The bench of the three rewards: a model of pixels, labels of psi, nu and delta, a reward on each, and runs at equal image change.

A scale means another push for every reward, so rewards are compared where they change the finished image by as much: the root mean
square over pixels of what guidance changed, mean over seeds. The scale that does so is searched on tuning seeds. True descriptors
are those of the model at alpha_ref x + sigma_ref eps of a finished sample x, at a noise below every labelled one, over the same
noises (and for delta the same directions) for every sample.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from guidance_bench import LABELLED, RANK, WINDOW
from guidance_study import kept
from runs import load_zoo
from torch import Tensor

from diffusers_geometry import Denoiser, GeometryDataset, GeometryGuidance, GeometryReward, Jacobian, Spectrum, guided
from diffusers_geometry.batch_complexity import batch_complexity
from diffusers_geometry.dataset import generate_dataset
from diffusers_geometry.descriptors import local_rank, local_scaling
from diffusers_geometry.labels import DatasetRequest
from diffusers_geometry.loading import load_pipeline
from diffusers_geometry.reward_training import TrainingOptions, train_reward
from diffusers_geometry.spectrum import matrix_spectrum, randomized_spectrum

DESCRIPTORS = ("psi", "nu", "delta")
REFERENCE_T = 40  # training timestep at which truth is taken, sigma 0.144
TUNING_SEED, FIRST_SEED = 900_000, 3_000_000  # labels have seeds 0, 1, ...; the guidance study's tests have those from 1,000,000
SCALES = (0.25, 64.0)  # where the scale is searched


@dataclass(frozen=True)
class Setting:
    """A model and how much is measured of it.

    Attributes:
        name: "digits", the bundled model, or one of the zoo.
        steps: Of a run.
        labelled: Loop positions of the labels.
        rank: Singular values that psi sums.
        is_dense: Whether spectra are whole; else the ``rank`` largest by a randomised range finder.
        change: Root mean square change of the image that guidance is tuned to, of pixels in [-1, 1].
        label_seeds: Runs that are labelled.
        training: Of the rewards.
        num_bins: Of the rewards.
        samples: Of a run of the test, in ``blocks`` of equal size for what has no value per image.
        measured: How many of them get their true descriptors.
        noises: At each of them.
        tuned: Samples on which a scale is tuned.
        halvings: Of the logarithm of the scale.
        batch: Samples that are labelled, or measured, together.
    """

    name: str
    steps: int
    labelled: tuple[int, ...]
    rank: int
    is_dense: bool
    change: float
    label_seeds: int
    training: TrainingOptions
    num_bins: int
    samples: int
    blocks: int
    measured: int
    noises: int
    tuned: int
    held_out: float = 0.1
    halvings: int = 6
    batch: int = 48


# A copy of a trained encoder overfits soon: few steps, small ones.
DIGITS = Setting(
    "digits", 50, LABELLED, RANK, True, 0.25, 1920, TrainingOptions(800, 128, 3e-4, 0.2, evaluate_every=100, patience=3), 16,
    samples=384, blocks=4, measured=96, noises=2, tuned=96,
)  # fmt: skip
EMOJI = Setting(
    "ddpm-emoji", 50, (36, 40, 44), 16, False, 0.25, 96, TrainingOptions(60, 64, 3e-4, 0.2, evaluate_every=10, patience=3), 8,
    samples=48, blocks=4, measured=16, noises=1, tuned=8, held_out=0.25, halvings=5, batch=8,
)  # fmt: skip
_LITTLE = {
    "label_seeds": 12, "num_bins": 2, "samples": 4, "blocks": 2, "measured": 2, "noises": 1, "tuned": 6, "held_out": 0.34,
    "halvings": 1, "training": TrainingOptions(2, 8, 3e-4, evaluate_every=1),
}  # fmt: skip
SMOKE = (
    replace(DIGITS, steps=8, labelled=(6,), **_LITTLE),
    replace(EMOJI, steps=6, labelled=(4,), rank=2, **_LITTLE | {"label_seeds": 6, "held_out": 0.67}),
)


class Bench:
    """A model with everything that is computed of it once and kept.

    Args:
        setting: The model and how much is measured.
        cache: Folder of labels and results; a temporary one if None.
    """

    def __init__(self, setting: Setting, cache: Path | None) -> None:
        self.setting = setting
        self.pipe = load_pipeline(None) if setting.name == "digits" else load_zoo(setting.name)
        self.pipe.set_progress_bar_config(disable=True)
        self.labels = (cache or Path(tempfile.mkdtemp())) / f"{setting.name}-labels"
        choices = repr((asdict(setting), REFERENCE_T, TUNING_SEED, FIRST_SEED, SCALES, WINDOW)).encode()
        self.folder = self.labels.with_name(f"{setting.name}-{hashlib.sha256(choices).hexdigest()[:12]}")
        self.folder.mkdir(parents=True, exist_ok=True)
        level = self.pipe.scheduler.alphas_cumprod[REFERENCE_T].double()
        self.alpha_ref, self.sigma_ref = float(level.sqrt()), float((1 - level).sqrt())

    def dataset(self) -> GeometryDataset:
        """The labels, generated where they are missing."""
        setting = self.setting
        request = DatasetRequest(
            seeds=range(setting.label_seeds), record_steps=setting.labelled, psi_rank=setting.rank, batch_size=setting.batch,
            spectrum="auto" if setting.is_dense else "randomized", held_out=setting.held_out,
            call={"num_inference_steps": setting.steps, "output_type": "np"},
        )  # fmt: skip
        return generate_dataset(self.pipe, self.labels, request, progress=False)

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives, from the cache where it is there."""
        return kept(self.folder, name, make)

    def reward(self, name: str, descriptor: str, train: dict[str, Tensor] | None = None) -> tuple[GeometryReward, dict[str, Any]]:
        """A reward and its metrics on the held-out seeds; ``train`` are the labels if not all of them."""
        folder = self.folder / f"reward-{name}"
        if not (folder / "metrics.json").exists():
            held_out, train = dict(self.split("held_out")), train or dict(self.split("train"))
            self.pipe.unet.requires_grad_(True)
            config = {"num_bins": self.setting.num_bins, "start_from": self.pipe, "progress": False, "descriptor": descriptor}
            config |= {"psi_rank": self.setting.rank} if descriptor == "psi" else {}
            config["checkpoint"] = self.folder / f"checkpoint-{name}"
            reward, metrics = train_reward(train, held_out, options=self.setting.training, **config)
            reward.save_pretrained(folder)
            document = asdict(metrics) | {"spearman": metrics.spearman, "spearman_sem": mean_error(metrics.levels)}
            (folder / "metrics.json").write_text(json.dumps(document))
        return GeometryReward.from_pretrained(folder), json.loads((folder / "metrics.json").read_text())

    def split(self, which: str) -> dict[str, Tensor]:
        """The labels of a split."""
        return GeometryDataset(self.labels, which).tensors

    def generate(self, first: int, count: int, guidance: GeometryGuidance | None) -> Tensor:
        """Finished samples (count, c, h, w) in [-1, 1] of seeds first, first + 1, ..."""
        call = {"batch_size": count, "num_inference_steps": self.setting.steps, "output_type": "np"}
        call["generator"] = [torch.Generator().manual_seed(first + i) for i in range(count)]
        if guidance is None:
            images = self.pipe(**call).images
        else:
            with guided(self.pipe, guidance):
                images = self.pipe(**call).images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    def run(
        self, name: str, guidance: GeometryGuidance | None, first: int = FIRST_SEED, count: int | None = None
    ) -> dict[str, Tensor]:
        """Samples with the true descriptors of the first of them, each (measured, noises), and the seconds a sample took."""
        count = count or self.setting.samples

        def make() -> dict[str, Tensor]:
            start = time.process_time()
            samples = self.generate(first, count, guidance)
            seconds = torch.tensor((time.process_time() - start) / count)
            return {"samples": samples, "seconds": seconds} | self.truth(samples[: self.setting.measured])

        return self.kept(name, make)

    def tuned_scale(self, name: str, objective: Any, sign: int) -> tuple[float, float]:
        """(scale of this sign, change of the image) on the tuning seeds, as near to the setting's change as bisection comes."""

        def make() -> dict[str, Tensor]:
            count, (low, high) = self.setting.tuned, SCALES
            plain, found = self.generate(TUNING_SEED, count, None), []
            for _ in range(self.setting.halvings):
                middle = (low * high) ** 0.5
                made = self.generate(TUNING_SEED, count, GeometryGuidance(objective, sign * middle, **WINDOW))
                found.append((sign * middle, float(image_change(made, plain).mean())))
                low, high = (middle, high) if found[-1][1] < self.setting.change else (low, middle)
            best = min(found, key=lambda pair: abs(pair[1] - self.setting.change))
            return {"scale": torch.tensor(best[0]), "change": torch.tensor(best[1])}

        kept = self.kept(f"scale {name} {'+' if sign > 0 else '-'}", make)
        return float(kept["scale"]), float(kept["change"])

    def truth(self, samples: Tensor) -> dict[str, Tensor]:
        """psi in nats, nu and delta in knots, each (n, noises)."""
        network = self.pipe.unet.requires_grad_(False)
        levels = {"alpha_t": self.alpha_ref, "sigma_t": self.sigma_ref}
        denoiser = Denoiser.from_function(lambda x: network(x, REFERENCE_T).sample, **levels)
        noise = torch.randn(self.setting.noises, *samples.shape[1:], generator=torch.Generator().manual_seed(77))
        columns = []
        for draw, epsilon in enumerate(noise):
            rows = []
            for x_t in (self.alpha_ref * samples + self.sigma_ref * epsilon).split(self.setting.batch):
                spectra = self.spectra(denoiser, x_t, draw)
                psi, nu = zip(
                    *((local_scaling(s, rank=self.setting.rank).value, local_rank(s).value) for s in spectra), strict=True
                )
                common = [torch.Generator().manual_seed(draw) for _ in x_t]
                counts = {"num_directions": 8, "num_draws": 1, "generators": common}
                met = batch_complexity(denoiser.canonical_map("denoised"), x_t, 0.1 * self.sigma_ref, **counts)
                rows.append(torch.stack([torch.tensor(psi), torch.tensor(nu), met[0]], dim=1))
            columns.append(torch.cat(rows))
        return dict(zip(DESCRIPTORS, torch.stack(columns, dim=1).unbind(2), strict=True))

    def spectra(self, denoiser: Denoiser, x_t: Tensor, draw: int) -> list[Spectrum]:
        """Of D' at every sample, all rows of a Jacobian together, or by the same random directions for every sample."""
        if not self.setting.is_dense:
            options = {"num_singular_values": self.setting.rank}
            alone = [denoiser.jacobian(x, chunk_size=64) for x in x_t]
            return [randomized_spectrum(j, generator=torch.Generator().manual_seed(draw), **options) for j in alone]
        size = x_t[0].numel()
        stacked = Jacobian(denoiser.canonical_map("denoised"), x_t, chunk_size=max(1, 2048 // len(x_t)))
        rows = torch.eye(size).reshape(size, 1, *x_t.shape[1:]).expand(size, *x_t.shape)
        matrices = stacked.vjp(rows).flatten(2).transpose(0, 1)
        return [matrix_spectrum(matrix, method="dense", products=size) for matrix in matrices]


def image_change(samples: Tensor, plain: Tensor) -> Tensor:
    """Root mean square over pixels of the difference, (n,)."""
    return (samples - plain).flatten(1).square().mean(dim=1).sqrt()


def mean_error(levels: list) -> float:
    """Standard error of a mean over noise levels; that of fully dependent ones, which the runs of equal seeds may be."""
    return sum(level.spearman_sem for level in levels) / len(levels)


def moved(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """Training labels with a copy of each sample moved by one pixel, rolled over the border, in a random one of four directions."""
    generator = torch.Generator().manual_seed(3)
    ways = torch.randint(4, (len(part["x_t"]),), generator=generator)
    turned = torch.stack([part["x_t"].roll(step, axis) for axis in (-1, -2) for step in (-1, 1)])
    copies = turned[ways, torch.arange(len(ways))]
    return {name: torch.cat([value, copies if name == "x_t" else value]) for name, value in part.items()}
