"""Training of a :class:`~.reward.GeometryReward` on labels, and what is measured of it on seeds it never saw.

The held-out seeds are dealt in two: validation, on which training stops early, and test, on which alone the metrics are taken. Step
s draws its batch and its learning rate from s, and a checkpoint holds weights, optimiser moments and the best weights so far as
safetensors, so a run that was stopped continues to the same bits as one that was not (on one process).
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from .dataset import GeometryDataset
from .reward import GeometryReward
from .reward_kernel import RIDGES
from .reward_metrics import RewardMetrics, Samples, measured
from .reward_networks import copied_network, network_config
from .storage import write_together

WARMUP = 0.05


@dataclass(frozen=True)
class TrainingOptions:
    """How a reward is trained.

    Attributes:
        steps: Optimiser steps, at most.
        batch_size: Samples a step, over all processes and accumulated parts.
        learning_rate: Of AdamW, at its peak: warmed up, then falling as a cosine.
        weight_decay: Of AdamW.
        accumulation: Parts that a batch is taken in.
        mixed_precision: As accelerate names it: "no", "bf16" or "fp16".
        evaluate_every: Steps between validations, each of which writes a checkpoint.
        patience: Validations without a better loss after which training stops.
        seed: Of the weights and the batches.
    """

    steps: int = 4000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    accumulation: int = 1
    mixed_precision: str = "no"
    evaluate_every: int = 250
    patience: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.accumulation, self.evaluate_every, self.patience) < 1:
            raise ValueError(f"{self}. Expected positive counts.")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        warm = max(1, round(WARMUP * self.steps))
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warm) / max(1, self.steps - warm))))
        return self.learning_rate * min(1.0, (step + 1) / warm) * falling


def train_reward(
    train: GeometryDataset | Samples,
    held_out: GeometryDataset | Samples,
    *,
    descriptor: str = "psi",
    options: TrainingOptions | None = None,
    start_from: Any = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **config: Any,
) -> tuple[GeometryReward, RewardMetrics]:
    """A trained reward in eval mode, on the CPU, and its metrics on held-out seeds.

    Args:
        train: Labels: x_t (N, *dims), alpha_t, sigma_t, seed and the descriptor, each (N,).
        held_out: Likewise of other seeds.
        descriptor: The label's name.
        options: How.
        start_from: A pipeline of whose network the reward starts as a copy, see :mod:`.reward_networks`; a small trunk of its own
            otherwise.
        checkpoint: Folder in which a stopped run is continued; nothing is written if None.
        progress: Show a bar.
        **config: Of :class:`GeometryReward`; the sample's shape, the noise levels and data_std follow from the labels.

    Raises:
        ValueError: a seed in both sets, labels that are not finite, or a checkpoint of another run.
    """
    options, parts = options or TrainingOptions(), [_usable(s, descriptor) for s in (train, held_out)]
    cost = train.seconds_per_label if isinstance(train, GeometryDataset) else None
    psi_rank = train.request.psi_rank if isinstance(train, GeometryDataset) and descriptor == "psi" else None
    shared = set(parts[0]["seed"].tolist()) & set(parts[1]["seed"].tolist())
    if shared:
        raise ValueError(f"seeds {sorted(shared)[:5]} are in both sets. Expected held-out seeds, not held-out samples.")
    validation, test = _halves(parts[1])
    reward = _new_reward(parts[0], descriptor, options.seed, {"psi_rank": psi_rank, **config}, start_from)
    if reward.config.head == "kernel":
        return _fitted(reward, parts[0], validation, test, cost, options)
    settings = {"mixed_precision": options.mixed_precision, "gradient_accumulation_steps": options.accumulation}
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **settings)
    run = _Run(accelerator, reward, options, None if checkpoint is None else Path(checkpoint))
    start = time.perf_counter()
    run.train(parts[0], validation, progress)
    seconds = time.perf_counter() - start
    reward = accelerator.unwrap_model(run.model).cpu()
    reward.load_state_dict(run.best)
    reward.eval()
    return reward, RewardMetrics(
        *measured(reward, test), seconds, run.step, run.best_step, run.best_loss,
        len(parts[0]["label"]), len(validation["label"]), len(test["label"]), cost, asdict(options),
    )  # fmt: skip


def _fitted(
    reward: GeometryReward, samples: Samples, validation: Samples, test: Samples, cost: float | None, options: TrainingOptions
) -> tuple[GeometryReward, RewardMetrics]:
    """A reward whose readout has a closed form; steps are the ridges that were tried."""
    start, features = time.perf_counter(), []
    for part in (samples, validation):
        chunks = torch.arange(len(part["label"])).split(256)
        with torch.no_grad():
            features.append(torch.cat([reward.features(part["x_t"][c], part["sigma"][c], part["alpha_t"][c]) for c in chunks]))
    labels, others = (reward.standardised(part["label"], part["sigma"]) for part in (samples, validation))
    best, loss = reward.readout.fit(features[0], labels, features[1], others)
    reward.eval()
    sizes = (len(samples["label"]), len(validation["label"]), len(test["label"]))
    seconds = time.perf_counter() - start
    return reward, RewardMetrics(*measured(reward, test), seconds, len(RIDGES), best + 1, loss, *sizes, cost, asdict(options))


class _Run:
    """The state of a training: model, optimiser, best weights."""

    def __init__(self, accelerator: Accelerator, reward: GeometryReward, options: TrainingOptions, folder: Path | None) -> None:
        self.accelerator, self.options, self.folder = accelerator, options, folder
        trained = [p for p in reward.parameters() if p.requires_grad]
        decayed, others = ([p for p in trained if (p.ndim > 1) == many] for many in (True, False))
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.model, self.optimizer = accelerator.prepare(reward, torch.optim.AdamW(groups, lr=options.learning_rate))
        self.step = self.best_step = 0
        self.best_loss, self.best = math.inf, self._weights()
        self._identity = {**asdict(options), "config": {k: repr(v) for k, v in reward.config.items() if not k.startswith("_")}}
        self._load()

    def train(self, samples: Samples, validation: Samples, progress: bool) -> None:
        options, shown = self.options, progress and self.accelerator.is_main_process
        bar = tqdm(range(self.step, options.steps), "reward", options.steps, initial=self.step, disable=not shown)
        for step in bar:
            if self.step - self.best_step >= options.patience * options.evaluate_every:
                break
            self._step(step, samples)
            self.step = step + 1
            if self.step % options.evaluate_every == 0 or self.step == options.steps:
                loss = self._validate(validation)
                bar.set_postfix(validation=f"{loss:.4f}")
                if loss < self.best_loss:
                    self.best_loss, self.best_step, self.best = loss, self.step, self._weights()
                self._save()

    def _step(self, step: int, samples: Samples) -> None:
        options, accelerator = self.options, self.accelerator
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        chosen = torch.randint(len(samples["label"]), (options.batch_size,), generator=generator)
        chosen = chosen[accelerator.process_index :: accelerator.num_processes]
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(step)
        self.model.train()
        for part in chosen.tensor_split(options.accumulation):
            batch = {name: samples[name][part].to(accelerator.device) for name in ("x_t", "alpha_t", "sigma", "label")}
            with accelerator.accumulate(self.model):
                output = self.model(batch["x_t"], batch["sigma"], batch["alpha_t"])
                accelerator.backward(accelerator.unwrap_model(self.model).loss_of(output, batch["sigma"], batch["label"]))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()

    @torch.no_grad()
    def _validate(self, samples: Samples) -> float:
        """Mean loss; every process computes it whole, so that all agree when to stop."""
        model = self.accelerator.unwrap_model(self.model).eval()
        total = 0.0
        for part in torch.arange(len(samples["label"])).split(1024):
            x_t, alpha_t, sigma, label = (samples[n][part].to(model.device) for n in ("x_t", "alpha_t", "sigma", "label"))
            total += float(model.loss(x_t, sigma, label, alpha_t)) * len(part)
        return total / len(samples["label"])

    def _weights(self) -> dict[str, Tensor]:
        return {k: v.detach().cpu().clone() for k, v in self.accelerator.unwrap_model(self.model).state_dict().items()}

    def _save(self) -> None:
        """A checkpoint under a new name, then the older ones go: whenever it is killed, one whole checkpoint is there."""
        if self.folder is None or not self.accelerator.is_main_process:
            return
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"optimizer.{i}.{k}": torch.as_tensor(v).cpu() for i, state in moments.items() for k, v in state.items()}
        tensors |= {f"{kind}.{k}": v for kind, held in (("model", self._weights()), ("best", self.best)) for k, v in held.items()}
        scaler = {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        said = {"identity": self._identity, "best_step": self.best_step, "best_loss": self.best_loss, "scaler": scaler}
        name = f"checkpoint-{self.step:08d}.safetensors"
        write_together(self.folder, {name: save({k: v.clone() for k, v in tensors.items()}, {"run": json.dumps(said)})})
        for path in self.folder.glob("checkpoint-*.safetensors"):
            if path.name < name:
                path.unlink()

    def _load(self) -> None:
        found = sorted(self.folder.glob("checkpoint-*.safetensors")) if self.folder is not None else []
        if not found:
            return
        with safe_open(found[-1], "pt") as file:
            said = json.loads(file.metadata()["run"])
        if said["identity"] != json.loads(json.dumps(self._identity)):
            raise ValueError(
                f"{self.folder} holds a checkpoint of another training. Expected an empty folder, or the same options."
            )
        tensors, state = load_file(found[-1]), self.optimizer.state_dict()
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "optimizer":
                index, _, moment = name.partition(".")
                state["state"].setdefault(int(index), {})[moment] = value
        self.optimizer.load_state_dict(state)
        held = {
            kind: {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{kind}.")} for kind in ("model", "best")
        }
        self.accelerator.unwrap_model(self.model).load_state_dict(held["model"])
        if said["scaler"]:
            self.accelerator.scaler.load_state_dict(said["scaler"])
        self.best, self.best_step, self.best_loss = held["best"], said["best_step"], said["best_loss"]
        self.step = int(found[-1].stem.partition("-")[2])


def _usable(samples: GeometryDataset | Samples, descriptor: str) -> dict[str, Tensor]:
    """The tensors of a training, with ``sigma`` and ``label``; refuses what is not finite."""
    tensors = samples.tensors if isinstance(samples, GeometryDataset) else samples
    if descriptor not in tensors:
        raise ValueError(
            f"descriptor={descriptor!r} is not among the labels. Expected one of {sorted(set(tensors) & {'psi', 'nu', 'delta'})}."
        )
    used = {"x_t": tensors["x_t"], "seed": tensors["seed"], "label": tensors[descriptor].float()}
    used |= {"alpha_t": tensors["alpha_t"].float(), "sigma": (tensors["sigma_t"].double() / tensors["alpha_t"].double()).float()}
    bad = ~(torch.isfinite(used["label"]) & torch.isfinite(used["sigma"]))
    if bad.any():
        raise ValueError(f"{int(bad.sum())} labels or noises are not finite. Expected finite ones: leave steps at alpha_t = 0 out.")
    return used


def _new_reward(samples: Samples, descriptor: str, seed: int, config: dict[str, Any], start_from: Any) -> GeometryReward:
    """A reward of random weights, or the pipeline's own, with the label statistics of the training set."""
    if start_from is not None:
        if copied_network(start_from) is None:
            raise ValueError(
                f"start_from={type(start_from).__name__}. Expected a pipeline of a UNet2DModel, a UNet2DConditionModel with one "
                "text encoder, or a DiTTransformer2DModel, and a scheduler with alphas_cumprod; the reward's own trunk needs none."
            )
        config = {"network": network_config(start_from), "num_timesteps": len(start_from.scheduler.alphas_cumprod), **config}
    if config.get("head") == "kernel":
        config["num_anchors"] = len(samples["label"])
    levels = min(len(samples["sigma"].unique()), config.pop("max_levels", 32))
    clean = samples["sigma"] <= samples["sigma"].min() * (1 + 1e-6)  # y at the lowest noise stands for x_0
    data = samples["x_t"][clean] / samples["alpha_t"][clean].reshape(-1, *[1] * (samples["x_t"].ndim - 1))
    variance = max(float(data.square().mean()) - float(samples["sigma"].min()) ** 2, 1e-4)
    defaults = {"num_levels": levels, "data_std": math.sqrt(variance)}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # modules draw their weights from it; put back at once
        reward = GeometryReward(tuple(samples["x_t"].shape[1:]), descriptor, **(defaults | config))
    reward.set_levels(samples["sigma"], samples["label"])
    if start_from is not None:
        reward.trunk.start_from(start_from)
        level = samples["alpha_t"] * (1 + samples["sigma"] ** 2).sqrt()
        reward.trunk.standardise(samples["x_t"] / level.reshape(-1, *[1] * (samples["x_t"].ndim - 1)), samples["sigma"].log())
        reward.trunk.requires_grad_(not reward.trunk.frozen)
    return reward


def _halves(samples: Samples) -> tuple[Samples, Samples]:
    """Validation and test: every other held-out seed."""
    seeds = samples["seed"].unique()
    if len(seeds) < 4:
        raise ValueError(f"{len(seeds)} held-out seeds. Expected at least 4, for validation and test.")
    first = torch.isin(samples["seed"], seeds[::2])
    return tuple({name: value[chosen] for name, value in samples.items()} for chosen in (first, ~first))
