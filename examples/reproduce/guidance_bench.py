"""The bench of the guidance study: the bundled digits with a reward, controls, and every run by name, computed once and kept.

True psi is never the reward's word: it is that of a dense D' at alpha_ref x + sigma_ref eps of the finished sample x, at a noise
below every one that the reward was trained on, over the same draws eps for every sample.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sample_quality import Judge
from torch import Tensor

from diffusers_geometry import Denoiser, GeometryDataset, GeometryGuidance, GeometryReward, best_of, dense_spectrum, guided
from diffusers_geometry.descriptors import local_scaling
from diffusers_geometry.loading import load_pipeline
from diffusers_geometry.reward_training import TrainingOptions, train_reward

RANK, STEPS, REFERENCE_T = 16, 50, 40  # true psi is taken at training timestep 40, sigma 0.144
LABELLED = (36, 39, 41, 43, 45, 46)  # loop positions, sigma 1.02 to 0.209
FIRST_SEED = 1_000_000  # of the evaluation; labels have seeds 0, 1, ..., scales were chosen on seeds from 900,000
WINDOW = {"start": 0.6, "stop": 0.95, "trust": "noise", "trust_radius": 2.0}
RECOMMENDED = (-8.0, 4.0)


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    label_seeds: int = 1920
    held_out: float = 0.1
    train_steps: int = 800
    num_bins: int = 16
    samples: int = 480
    blocks: int = 4
    psi_samples: int = 128
    noises: int = 4
    scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    exact: int = 24
    groups: int = 24
    candidates: int = 8


SMOKE = Effort(
    label_seeds=12, held_out=0.34, train_steps=4, num_bins=2, samples=12, blocks=2, psi_samples=2, noises=2, scales=(4.0, 8.0),
    exact=2, groups=2, candidates=2,
)  # fmt: skip


class Bench:
    """The bundled model, and every number of this study by name: computed once, then read from the cache."""

    def __init__(self, effort: Effort, cache: Path | None) -> None:
        self.effort, self.judge = effort, Judge()
        self.pipe = load_pipeline(None)
        self.pipe.set_progress_bar_config(disable=True)
        settings = repr((asdict(effort), RANK, STEPS, REFERENCE_T, LABELLED, FIRST_SEED, WINDOW, RECOMMENDED))
        self.labels = (cache or Path(tempfile.mkdtemp())) / "labels"
        self.folder = self.labels.with_name(hashlib.sha256(settings.encode()).hexdigest()[:12])
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.pipe.scheduler.alphas_cumprod[REFERENCE_T].double()
        self.alpha_ref, self.sigma_ref = float(kept.sqrt()), float((1 - kept).sqrt())
        self.noise = torch.randn(effort.noises, 1, 8, 8, generator=torch.Generator().manual_seed(77))

    def true_psi(self, samples: Tensor) -> Tensor:
        """psi at rank 16 of D' at alpha_ref x + sigma_ref eps under the same noises for every sample, (B, noises)."""
        network = self.pipe.unet.requires_grad_(False)
        denoiser = Denoiser.from_function(lambda x: network(x, REFERENCE_T).sample, alpha_t=self.alpha_ref, sigma_t=self.sigma_ref)
        points = [[self.alpha_ref * x + self.sigma_ref * e for e in self.noise] for x in samples]
        return torch.tensor(
            [[local_scaling(dense_spectrum(denoiser.jacobian(x, chunk_size=64)), rank=RANK).value for x in row] for row in points]
        )

    def generate(self, count: int, guidance: GeometryGuidance | None, first: int = FIRST_SEED) -> dict[str, Tensor]:
        """Final samples in [-1, 1] of seeds first, first + 1, ..., how long the shifts were, and the seconds it took."""
        call = {"batch_size": count, "num_inference_steps": STEPS, "output_type": "np"}
        call["generator"] = [torch.Generator().manual_seed(first + i) for i in range(count)]
        start, shift = time.perf_counter(), torch.zeros(())
        if guidance is None:
            images = self.pipe(**call).images
        else:
            with guided(self.pipe, guidance) as run:
                images = self.pipe(**call).images
            shift = torch.stack([(step.shift / step.denoised).mean() for step in run.log]).mean()
        seconds = torch.tensor(time.perf_counter() - start)
        return {"samples": torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, "shift": shift, "seconds": seconds}

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives, from the cache where it is there."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            save_file({k: v.contiguous() for k, v in make().items()}, path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
        return load_file(path)

    def run(self, name: str, guidance: GeometryGuidance | None, count: int | None = None, first: int = FIRST_SEED) -> dict:
        """A generation with the true psi of its first samples."""
        effort = self.effort

        def make() -> dict[str, Tensor]:
            made = self.generate(count or effort.samples, guidance, first)
            return made | {"psi": self.true_psi(made["samples"][: effort.psi_samples])}

        return self.kept(name, make)

    def reward(self, shuffled: bool) -> tuple[GeometryReward, dict[str, Any]]:
        """A reward and its metrics; of labels that are shuffled within their noise level, for a control."""
        folder = self.folder / ("shuffled" if shuffled else "reward")
        if not (folder / "metrics.json").exists():
            parts = [dict(GeometryDataset(self.labels, split).tensors) for split in ("train", "held_out")]
            for part in parts if shuffled else ():
                part["psi"] = shuffled_within(part["psi"], part["sigma"])
            options = {"num_bins": self.effort.num_bins, "start_from": self.pipe, "psi_rank": RANK, "progress": False}
            steps = self.effort.train_steps
            training = TrainingOptions(
                steps, 128, 3e-4, 0.2, evaluate_every=max(1, steps // 8), patience=3
            )  # a copy of a trained encoder overfits soon
            self.pipe.unet.requires_grad_(True)
            reward, metrics = train_reward(*parts, options=training, **options)
            reward.save_pretrained(folder)
            document = asdict(metrics) | {"spearman": metrics.spearman}
            (folder / "metrics.json").write_text(json.dumps(document))
        return GeometryReward.from_pretrained(folder), json.loads((folder / "metrics.json").read_text())


def shuffled_within(labels: Tensor, sigma: Tensor) -> Tensor:
    """Labels dealt anew among the samples of their noise level."""
    dealt, generator = labels.clone(), torch.Generator().manual_seed(5)
    for level in sigma.unique():
        own = (sigma == level).nonzero().flatten()
        dealt[own] = labels[own[torch.randperm(len(own), generator=generator)]]
    return dealt


def random_direction(x_0: Tensor, x_t: Tensor, sigma: float) -> Tensor:
    """A linear function of x_t, of a direction per sample that stays the same over the run."""
    directions = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(11))
    return (x_t * directions.to(x_t)).flatten(1).sum(dim=1)


def best_of_groups(bench: Bench, lowest: bool) -> dict[str, Tensor]:
    """The best of every group of seeds by psi at the run's last labelled noise, under other noises than the evaluation's."""
    effort, chosen, start = bench.effort, [], time.perf_counter()
    for group in range(effort.groups):
        seeds = range(FIRST_SEED + group * effort.candidates, FIRST_SEED + (group + 1) * effort.candidates)
        options = {"num_inference_steps": STEPS, "output_type": "np", "batch_size": effort.candidates, "num_noises": 2}
        found = best_of(bench.pipe, seeds, lowest=lowest, sigma_ref=0.209, psi_rank=RANK, **options)
        chosen.append(torch.from_numpy(found.outputs[0]).permute(2, 0, 1) * 2 - 1)
    samples = torch.stack(chosen)
    return {"samples": samples, "psi": bench.true_psi(samples), "seconds": torch.tensor(time.perf_counter() - start)}


def shift_of(found: dict[str, Tensor], plain: dict[str, Tensor], paired: bool = True) -> tuple[float, float]:
    """Change of mean psi in standard deviations of the unguided samples, and its standard error over the samples."""
    psi, before = found["psi"].mean(1), plain["psi"].mean(1)
    spread = before.std()
    if paired:
        change = (psi - before[: len(psi)]) / spread
        return float(change.mean()), float(change.std() / math.sqrt(len(change)))
    error = math.hypot(psi.std() / math.sqrt(len(psi)), spread / math.sqrt(len(before)))
    return float((psi.mean() - before.mean()) / spread), error / float(spread)
