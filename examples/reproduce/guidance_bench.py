"""The bench of the guidance study: the bundled digits with a reward, controls, and every run by name, computed once and kept.

True psi is never the reward's word: it is that of a dense D' at alpha_ref x + sigma_ref eps of the finished sample x, at a noise
below every one that the reward was trained on, over the same draws eps for every sample.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from guidance_study import FIRST_SEED, Study
from sample_quality import Judge
from torch import Tensor

from diffusers_geometry import Denoiser, GeometryGuidance, best_of, dense_spectrum, guided
from diffusers_geometry.descriptors import local_scaling
from diffusers_geometry.loading import load_pipeline
from diffusers_geometry.objectives import PsiObjective
from diffusers_geometry.reward_training import TrainingOptions

RANK, STEPS, REFERENCE_T = 16, 50, 40  # true psi is taken at training timestep 40, sigma 0.144
LABELLED = (36, 39, 41, 43, 45, 46)  # loop positions, sigma 1.02 to 0.209
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


class Bench(Study):
    """The bundled model."""

    window, recommended = WINDOW, RECOMMENDED
    prices = {"confident": "confident share falls", "same digit": "share that keeps its digit falls"}  # noqa: RUF012

    def __init__(self, effort: Effort, cache: Path | None) -> None:
        settings = (asdict(effort), RANK, STEPS, REFERENCE_T, LABELLED, FIRST_SEED, WINDOW, RECOMMENDED)
        super().__init__(effort, cache, settings)
        self.judge = Judge()
        self.pipe = load_pipeline(None)
        self.pipe.set_progress_bar_config(disable=True)
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

    def judged(self, found: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Beside the unguided samples of the same seeds."""
        return self.judge(found["samples"], plain["samples"], self.effort.blocks)

    def other_runs(self) -> list[tuple[str, dict[str, Tensor], bool]]:
        """What other seeds do."""
        return [("unguided, other seeds", self.run("other-seeds", None, first=FIRST_SEED + 10_000), False)]

    def exact_objective(self) -> PsiObjective:
        """psi of the model itself."""
        self.pipe.unet.requires_grad_(False)
        return PsiObjective(RANK)

    def training(self) -> tuple[TrainingOptions, dict[str, Any]]:
        """A copy of a trained encoder overfits soon: few steps, small ones."""
        self.pipe.unet.requires_grad_(True)
        steps = self.effort.train_steps
        options = TrainingOptions(steps, 128, 3e-4, 0.2, evaluate_every=max(1, steps // 8), patience=3)
        return options, {"num_bins": self.effort.num_bins, "start_from": self.pipe, "psi_rank": RANK}

    def best_of_groups(self, lowest: bool) -> dict[str, Tensor]:
        """The best of every group of seeds by psi at the run's last labelled noise, under other noises than the evaluation's."""
        effort, chosen, start = self.effort, [], time.perf_counter()
        for group in range(effort.groups):
            seeds = range(FIRST_SEED + group * effort.candidates, FIRST_SEED + (group + 1) * effort.candidates)
            options = {"num_inference_steps": STEPS, "output_type": "np", "batch_size": effort.candidates, "num_noises": 2}
            found = best_of(self.pipe, seeds, lowest=lowest, sigma_ref=0.209, psi_rank=RANK, **options)
            chosen.append(torch.from_numpy(found.outputs[0]).permute(2, 0, 1) * 2 - 1)
        samples = torch.stack(chosen)
        return {"samples": samples, "psi": self.true_psi(samples), "seconds": torch.tensor(time.perf_counter() - start)}
