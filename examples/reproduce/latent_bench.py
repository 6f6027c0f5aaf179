"""The bench of the guidance study in latents: a class- or text-conditional model of the zoo with its labels, rewards and runs.

psi is that of the network without its conditioning (the empty prompt, the null class), as classifier-free guidance asks it at every
step: one function of the sample for all digits, at half the price of the guided network's. Every noise level has seeds of its own,
since psi at one noise and at the next are nearly the same number of one run.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from guidance_study import FIRST_SEED, Study
from latent_quality import DigitJudge
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.append(str(Path(__file__).parent.parent / "zoo"))

from data import caption
from load import load_zoo

from diffusers_geometry import Denoiser, GeometryDataset, GeometryGuidance, GeometryReward, best_of, guided, record
from diffusers_geometry.dataset import generate_dataset, plan_dataset
from diffusers_geometry.labels import DatasetRequest, label_unit
from diffusers_geometry.objectives import Evaluation, GuidedStep, PsiObjective
from diffusers_geometry.probe import Probe
from diffusers_geometry.reward_training import TrainingOptions
from diffusers_geometry.schedule import NoiseLevel

RANK, POINTS, BLOCK = 16, 8, 10  # POINTS: Jacobians taken together; BLOCK: samples whose psi is kept together


@dataclass(frozen=True)
class Model:
    """A model of the zoo and how it is steered.

    Attributes:
        name: In the zoo.
        guidance_scale: Of classifier-free guidance; ``other_scales`` are the control's.
        labelled: Loop positions.
        reference: Loop position at whose noise true psi is taken, below every labelled one.
        window: Of guidance, as in :class:`guidance_study.Study`; ``recommended`` likewise.
        steps: Of a run.
    """

    name: str
    guidance_scale: float
    other_scales: tuple[float, ...]
    labelled: tuple[int, ...]
    reference: int
    window: dict[str, Any]
    recommended: tuple[float, float]
    steps: int = 50


@dataclass(frozen=True)
class Effort:
    """How much is measured; ``label_seeds`` are per level and digit of ``digits``, ``spread_samples`` unguided ones with psi."""

    label_seeds: int = 12
    held_out: float = 0.34
    digits: tuple[int, ...] = tuple(range(10))
    samples: int = 60
    psi_samples: int = 10
    spread_samples: int = 30
    noises: int = 4
    scales: tuple[float, ...] = (1.5, 3.0, 6.0, 9.0, 12.0)
    exact: int = 2
    groups: int = 5
    candidates: int = 6
    pairs: int = 3
    rounds: int = 2

    @property
    def identity(self) -> tuple[Any, ...]:
        """What every number depends on; the others say how many there are."""
        return self.label_seeds, self.held_out, self.digits, self.noises, self.samples


class LatentBench(Study):
    """A latent model of the zoo."""

    best_is_paired = True  # they are of one digit
    prices = {"asked digit": "share that shows the asked digit falls"}  # noqa: RUF012

    def __init__(self, model: Model, effort: Effort, cache: Path | None) -> None:
        self.model, self.window, self.recommended, self.judge = model, model.window, model.recommended, DigitJudge()
        super().__init__(effort, cache and cache / model.name, (effort.identity, asdict(model), RANK, FIRST_SEED))
        self.pipe = load_zoo(model.name)
        self.pipe.set_progress_bar_config(disable=True)
        self.is_text = hasattr(self.pipe, "text_encoder")
        self.network = (self.pipe.unet if self.is_text else self.pipe.transformer).requires_grad_(False)
        self.pipe.vae.requires_grad_(False)
        self.pipe.scheduler.set_timesteps(model.steps)
        self.timestep = int(self.pipe.scheduler.timesteps[model.reference])
        kept = self.pipe.scheduler.alphas_cumprod[self.timestep].double()
        self.alpha_ref, self.sigma_ref = float(kept.sqrt()), float((1 - kept).sqrt())
        self.noise = torch.randn(effort.noises, 4, 8, 8, generator=torch.Generator().manual_seed(77))
        self._nothing = self.pipe.encode_prompt("", "cpu", 1, False)[0].detach() if self.is_text else torch.tensor([1000])

    def unconditional(self, x_t: Tensor, timestep: int) -> Tensor:
        """The predicted noise without conditioning, (B, 4, 8, 8)."""
        nothing = self._nothing.expand(len(x_t), *self._nothing.shape[1:])
        if self.is_text:
            return self.network(x_t, timestep, encoder_hidden_states=nothing).sample
        return self.network(x_t, timestep=torch.full((len(x_t),), timestep), class_labels=nothing).sample[:, :4]

    def run(self, name: str, guidance: GeometryGuidance | None, count: int | None = None, first: int = FIRST_SEED) -> dict:
        """As that of a :class:`Study`, psi kept ten samples at a time."""
        return self.with_psi(name, lambda: self.generate(count or self.effort.samples, guidance, first))

    def with_psi(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives, with the true psi of its first latents."""
        made = self.kept(name, make)
        wanted = self.effort.spread_samples if name == "unguided" else self.effort.psi_samples
        parts = made["latents"][:wanted].split(BLOCK)
        found = [
            self.kept(f"{name} psi {i}", lambda part=part: {"psi": self.true_psi(part)})["psi"] for i, part in enumerate(parts)
        ]
        return made | {"psi": torch.cat(found)}

    def true_psi(self, points: Tensor) -> Tensor:
        """psi at rank 16 of D' at alpha_ref x + sigma_ref eps under the same noises for every sample, (B, noises)."""
        noisy = self.alpha_ref * points[:, None] + self.sigma_ref * self.noise
        found = [self._psi(part) for part in noisy.flatten(0, 1).split(POINTS)]
        return torch.cat(found).unflatten(0, (len(points), -1))

    def _psi(self, x_t: Tensor) -> Tensor:
        """Of the whole D' = I - sigma_t d epsilon / dx_t at each point, row k of all by one backward pass; (B,)."""
        size = x_t[0].numel()
        with sdpa_kernel(SDPBackend.MATH):  # the default one loops over the rows in its backward pass
            pull = torch.func.vjp(lambda x: self.unconditional(x, self.timestep), x_t)[1]
        rows = torch.eye(size).reshape(size, 1, *x_t.shape[1:]).expand(size, *x_t.shape)
        slopes = torch.cat([torch.func.vmap(pull)(part)[0] for part in rows.split(POINTS)]).flatten(2).transpose(0, 1)
        matrices = torch.eye(size, dtype=torch.float64) - self.sigma_ref * slopes.double()
        return torch.linalg.svdvals(matrices)[:, :RANK].log().sum(dim=1).float()

    def call(self, digits: list[int], seeds: list[int], guidance_scale: float | None = None) -> dict[str, Any]:
        """Arguments of the pipeline."""
        asked = {"prompt": [prompt(d) for d in digits]} if self.is_text else {"class_labels": digits}
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        kind = {"output_type": "latent" if self.is_text else "np"}
        return asked | kind | {"generator": generator, "num_inference_steps": self.model.steps,
                               "guidance_scale": guidance_scale or self.model.guidance_scale}  # fmt: skip

    def generate(
        self, count: int, guidance: GeometryGuidance | None, first: int = FIRST_SEED, guidance_scale: float | None = None
    ) -> dict[str, Tensor]:
        """Latents and images in [-1, 1] of seeds first, first + 1, ...; sample i is asked for the digit i mod 10."""
        call = self.call([i % 10 for i in range(count)], [first + i for i in range(count)], guidance_scale)
        start, shift = time.perf_counter(), torch.zeros(())
        if guidance is None:
            with record(self.pipe, [self.model.steps - 1]) as recording:
                self.pipe(**call)
        else:
            with guided(self.pipe, guidance) as run, record(self.pipe, [self.model.steps - 1]) as recording:
                self.pipe(**call)
            shift = torch.stack([(step.shift / step.denoised).mean() for step in run.log]).mean()
        seconds, latents = torch.tensor(time.perf_counter() - start), recording.final_sample[:count]
        return {"samples": self.decoded(latents), "latents": latents, "shift": shift, "seconds": seconds}

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Images (B, 1, 32, 32) in [-1, 1]."""
        vae = self.pipe.vae
        return torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(50)]).clamp(-1, 1)

    def judged(self, found: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Beside the unguided samples of the same seeds, in ten groups or as many tens as there are."""
        asked = torch.arange(len(found["samples"])) % 10
        return self.judge(found["samples"], plain["samples"], asked, max(2, min(10, len(asked) // 10)))

    def other_runs(self) -> list[tuple[str, dict[str, Tensor], bool]]:
        """Other scales of classifier-free guidance."""
        runs = []
        for scale in self.model.other_scales:

            def make(scale: float = scale) -> dict[str, Tensor]:
                return self.generate(self.effort.samples, None, guidance_scale=scale)

            runs.append((f"guidance_scale {scale:g}", self.with_psi(f"cfg{scale:g}", make), True))
        return runs

    def exact_objective(self) -> ExactPsi:
        """psi without conditioning."""
        return ExactPsi(self)

    def best_of_groups(self, lowest: bool) -> dict[str, Tensor]:
        """The best of every group of seeds, a group a digit in turn, by psi at the lowest labelled noise."""
        effort, chosen, start = self.effort, [], time.perf_counter()
        alphas = self.pipe.scheduler.alphas_cumprod[self.pipe.scheduler.timesteps[self.model.labelled[-1]]]
        for group in range(effort.groups):
            digit = group % 10
            seeds = range(FIRST_SEED + group * effort.candidates, FIRST_SEED + (group + 1) * effort.candidates)
            call = self.call([], [])
            asked = {"prompt": prompt(digit)} if self.is_text else {"class_label": digit}
            options = {k: call[k] for k in ("output_type", "num_inference_steps", "guidance_scale")}
            options |= {"batch_size": effort.candidates, "num_noises": 2, "branch": "unconditional", "psi_rank": RANK}
            sigma = float(((1 - alphas) / alphas).sqrt())
            chosen.append(
                best_of(self.pipe, seeds, lowest=lowest, sigma_ref=sigma, spectrum="dense", **asked, **options).samples[0]
            )
        latents = torch.stack(chosen)
        seconds = torch.tensor(time.perf_counter() - start)
        return {"samples": self.decoded(latents), "latents": latents, "psi": self.true_psi(latents), "seconds": seconds}

    def requests(self) -> list[DatasetRequest]:
        """One a level."""
        effort, call = self.effort, self.call([], [])
        asked = {"prompts": tuple(map(prompt, effort.digits))} if self.is_text else {"class_labels": effort.digits}
        shared = {
            "psi_rank": RANK, "branch": "unconditional", "batch_size": 20, "held_out": effort.held_out, "delta_radius": None,
            "call": {k: call[k] for k in ("output_type", "num_inference_steps", "guidance_scale")},
        }  # fmt: skip
        seeds = [range(k * effort.label_seeds, (k + 1) * effort.label_seeds) for k in range(len(self.model.labelled))]
        pairs = zip(self.model.labelled, seeds, strict=True)
        return [DatasetRequest(**asked, seeds=own, record_steps=(level,), **shared) for level, own in pairs]

    def label(self, progress: bool) -> list[GeometryDataset]:
        """The labels of all levels."""
        pairs = zip(self.model.labelled, self.requests(), strict=True)
        return [generate_dataset(self.pipe, self.labels / str(level), own, progress=progress) for level, own in pairs]

    def splits(self) -> list[dict[str, Tensor]]:
        """Labels to train on and held-out ones, all levels together."""
        parts = []
        for split in ("train", "held_out"):
            own = [GeometryDataset(self.labels / str(level), split).tensors for level in self.model.labelled]
            parts.append({name: torch.cat([tensors[name] for tensors in own]) for name in own[0]})
        return parts

    def training(self) -> tuple[TrainingOptions, dict[str, Any]]:
        """A frozen part of the network, read out in closed form: labels are few."""
        return TrainingOptions(), {"head": "kernel", "num_bins": 2, "start_from": self.pipe, "psi_rank": RANK}

    def small_reward(self) -> GeometryReward:
        """One of the package's own small trunk, whose price does not depend on its weights: they are random."""
        labels = self.splits()[0]
        reward = GeometryReward((4, 8, 8), num_levels=len(self.model.labelled), num_bins=2)
        reward.set_levels(labels["sigma"], labels["psi"])
        return reward.eval()

    def speed(self, guidance: GeometryGuidance, batch: int) -> dict[str, Tensor]:
        """Processor seconds of whole calls without and with guidance in turn, and guided steps of a call."""
        call, found, steps = self.call([i % 10 for i in range(batch)], []), {"unguided": [], "guided": []}, 0
        for pair in range(self.effort.pairs + 1):  # the first warms up
            for name, taken in found.items():
                call["generator"] = [torch.Generator().manual_seed(i) for i in range(batch)]
                start = time.process_time()
                with guided(self.pipe, guidance) if name == "guided" else nullcontext() as run:
                    self.pipe(**call)
                steps = len(run.log) if run else steps
                taken += [time.process_time() - start] if pair else []
        ratio = statistics.median(g / u for g, u in zip(found["guided"], found["unguided"], strict=True))
        numbers = {"ratio": ratio, "steps": steps, "seconds": statistics.median(found["unguided"])}
        return {name: torch.tensor(float(number)) for name, number in numbers.items()}

    def label_cost(self) -> dict[str, Tensor]:
        """Processor seconds of a label of the first unit, and what its plan says: medians of rounds in turn."""
        request, taken, planned = self.requests()[0], [], []
        with mock.patch.object(time, "perf_counter", time.process_time):  # both count by it; a busy machine has no other clock
            for _ in range(self.effort.rounds):
                plan = plan_dataset(self.pipe, request)
                labels, seconds = label_unit(self.pipe, request, request.units[0], Probe(plan.unit.probe))
                taken.append(seconds / len(labels["psi"]))
                planned.append(plan.seconds / plan.labels)
        return {"taken": torch.tensor(statistics.median(taken)), "planned": torch.tensor(statistics.median(planned))}


class ExactPsi:
    """psi of the network without conditioning, by its dense Jacobian, with its exact gradient."""

    needs_network = False

    def __init__(self, bench: LatentBench) -> None:
        self.bench, self.inner = bench, PsiObjective(RANK)
        steps, alphas = bench.pipe.scheduler.timesteps, bench.pipe.scheduler.alphas_cumprod
        ends = [alphas[steps[position]] for position in (bench.model.labelled[-1], bench.model.labelled[0])]
        self.least, self.most = (float(((1 - a) / a).sqrt()) for a in ends)

    def covers(self, level: NoiseLevel) -> bool:
        """Whether the noise is among the labelled ones."""
        return self.least / 1.25 <= level.sigma <= self.most * 1.25

    def evaluate(self, step: GuidedStep) -> Evaluation:
        """At the step's noise."""
        level = step.level
        denoiser = Denoiser.from_function(
            lambda x: self.bench.unconditional(x, int(level.timestep)), alpha_t=level.alpha_t, sigma_t=level.sigma_t
        )
        return self.inner.evaluate(dataclasses.replace(step, denoiser=lambda i: denoiser))


def prompt(digit: int) -> str:
    """The caption of a digit that tells nothing else."""
    return caption((-1, -1, -1), digit)
