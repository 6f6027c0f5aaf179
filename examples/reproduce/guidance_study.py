"""What the guidance studies share: every run by name, computed once and then read from a cache; controls; how far psi was moved."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_geometry import GeometryDataset, GeometryGuidance, GeometryReward
from diffusers_geometry.reward_training import TrainingOptions, train_reward

FIRST_SEED = 1_000_000  # of the evaluation; labels have seeds 0, 1, ..., scales were chosen on seeds from 900,000


def kept(folder: Path, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that ``make`` gives, from the folder where they are there."""
    path = folder / f"{name.replace(' ', '-')}.safetensors"
    if not path.exists():
        save_file({k: v.contiguous() for k, v in make().items()}, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    return load_file(path)


class Study:
    """A model, its labels, its rewards and its runs.

    Args:
        effort: How much is measured; has samples, psi_samples, num_bins.
        cache: Folder that holds the labels, and a folder of results for every choice of settings; a temporary one if None.
        settings: All choices that the results depend on.

    Attributes:
        pipe: The pipeline; set by the subclass, as the others.
        window: Where guidance acts and its trust radius, arguments of GeometryGuidance.
        recommended: A scale that lowers psi and one that raises it, chosen on other seeds.
        prices: Measures that must not fall by more than 5 points, and how that is said.
        best_is_paired: Whether sample i of the best of N is to be compared with the unguided sample i.
    """

    pipe: Any
    window: dict[str, Any]
    recommended: tuple[float, float]
    prices: dict[str, str]
    best_is_paired = False

    def __init__(self, effort: Any, cache: Path | None, settings: Any) -> None:
        self.effort = effort
        self.labels = (cache or Path(tempfile.mkdtemp())) / "labels"
        self.folder = self.labels.with_name(hashlib.sha256(repr(settings).encode()).hexdigest()[:12])
        self.folder.mkdir(parents=True, exist_ok=True)

    def generate(self, count: int, guidance: GeometryGuidance | None, first: int = FIRST_SEED) -> dict[str, Tensor]:
        """Samples of seeds first, first + 1, ..., with "seconds"; "latents" where samples are decoded from them."""
        raise NotImplementedError

    def true_psi(self, points: Tensor) -> Tensor:
        """psi of finished samples (or latents), (B, noises), by no reward."""
        raise NotImplementedError

    def training(self) -> tuple[TrainingOptions, dict[str, Any]]:
        """How a reward is trained, and its config."""
        raise NotImplementedError

    def judged(self, found: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Price and diversity of samples with their standard errors, beside the unguided ones of the same seeds."""
        raise NotImplementedError

    def other_runs(self) -> list[tuple[str, dict[str, Tensor], bool]]:
        """(name, run, whether it has the seeds of the unguided one) of further controls."""
        raise NotImplementedError

    def exact_objective(self) -> Any:
        """psi itself, with its exact gradient."""
        raise NotImplementedError

    def best_of_groups(self, lowest: bool) -> dict[str, Tensor]:
        """The best of every group of seeds by true psi, under other noises than the evaluation's."""
        raise NotImplementedError

    def guidance(self, objective: Any, scale: float) -> GeometryGuidance:
        """Guidance in the study's window."""
        return GeometryGuidance(objective, scale, **self.window)

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives, from the cache where it is there."""
        return kept(self.folder, name, make)

    def run(self, name: str, guidance: GeometryGuidance | None, count: int | None = None, first: int = FIRST_SEED) -> dict:
        """A generation with the true psi of its first samples."""
        effort = self.effort

        def make() -> dict[str, Tensor]:
            made = self.generate(count or effort.samples, guidance, first)
            return made | {"psi": self.true_psi(made.get("latents", made["samples"])[: effort.psi_samples])}

        return self.kept(name, make)

    def splits(self) -> list[dict[str, Tensor]]:
        """Labels to train on, and held-out ones."""
        return [dict(GeometryDataset(self.labels, split).tensors) for split in ("train", "held_out")]

    def reward(self, shuffled: bool) -> tuple[GeometryReward, dict[str, Any]]:
        """A reward and its metrics; of labels that are shuffled within their noise level, for a control."""
        folder = self.folder / ("shuffled" if shuffled else "reward")
        if not (folder / "metrics.json").exists():
            parts = self.splits()
            for part in parts if shuffled else ():
                part["psi"] = shuffled_within(part["psi"], part["sigma"])
            options, config = self.training()
            reward, metrics = train_reward(*parts, options=options, progress=False, **config)
            reward.save_pretrained(folder)
            document = asdict(metrics) | {"spearman": metrics.spearman, "parameters": sum(p.numel() for p in reward.parameters())}
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


def shift_of(found: dict[str, Tensor], plain: dict[str, Tensor], paired: bool = True) -> tuple[float, float]:
    """Change of mean psi in standard deviations of the unguided samples, and its standard error over the samples."""
    psi, before = found["psi"].mean(1), plain["psi"].mean(1)
    spread = before.std()
    if paired:
        change = (psi - before[: len(psi)]) / spread
        return float(change.mean()), float(change.std() / math.sqrt(len(change)))
    error = math.hypot(psi.std() / math.sqrt(len(psi)), spread / math.sqrt(len(before)))
    return float((psi.mean() - before.mean()) / spread), error / float(spread)
