"""One training loop for every model of the zoo: seeded, resumable after a kill at any moment, with the time that is left.

The step number seeds the batch, so that a run which was stopped and taken up again is the same run. Checkpoints are accelerate's
own (they hold pickles, so they stay in the cache of the user who made them); only the last one is kept, with a note of what it
belongs to.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from data import CACHE
from diffusers.training_utils import EMAModel
from filelock import FileLock
from torch import Tensor, nn
from tqdm import trange

ZOO = Path(__file__).parent
CURVE_POINTS = 100  # of a loss curve, each the mean over its share of the steps
SMOKE_STEPS = 3


def argument_parser(document: str, steps: int | None = None) -> argparse.ArgumentParser:
    """The options that every training script has."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=ZOO, help="where the folder of the model goes; what models share is read from the zoo"
    )
    parser.add_argument("--checkpoints", type=Path, default=CACHE / "zoo")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--save-seconds", type=float, default=60.0, help="time between two checkpoints")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} steps in temporary folders, to see that it runs")
    return parser


def finish(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line; a smoke run touches neither the zoo nor other checkpoints."""
    args = parser.parse_args()
    if args.smoke:
        args.steps = SMOKE_STEPS
        args.checkpoints = Path(tempfile.mkdtemp())
        args.output = Path(tempfile.mkdtemp()) if args.output == ZOO else args.output
    return args


@dataclass
class History:
    """What a training spent and how its loss fell; kept in the checkpoint.

    Attributes:
        settings: Of this training, as its card tells them.
        seconds: Spent between its start and its checkpoints.
        losses: One a step.
        step_seconds: Of the steps, as far as they were timed: other work on the machine lengthens some, not the median.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "losses": self.losses, "step_seconds": self.step_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.losses = state["seconds"], list(state["losses"])
        self.step_seconds = list(state.get("step_seconds", []))

    @property
    def undisturbed_minutes(self) -> float:
        """All steps at the median time of those that were timed: what the training takes on a machine of its own."""
        return statistics.median(self.step_seconds) * len(self.losses) / 60

    def __add__(self, later: History) -> History:
        """This training and one that went on from its weights; ``restarts`` keeps (steps, rate) of what came after the first."""
        if not self.losses:
            return later
        restart = [later.settings["steps"], later.settings["learning_rate"]]
        total = {"steps": self.settings["steps"] + restart[0], "restarts": [*self.settings.get("restarts", []), restart]}
        timed = self.step_seconds + later.step_seconds
        return History(self.settings | total, self.seconds + later.seconds, self.losses + later.losses, timed)

    def curve(self) -> list[tuple[int, float]]:
        """(last step of the interval, mean loss over it) for at most 100 intervals."""
        edges = torch.linspace(0, len(self.losses), min(CURVE_POINTS, len(self.losses)) + 1).round().long().tolist()
        means = [sum(self.losses[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        return list(zip(edges[1:], means, strict=True))


def fit(
    network: nn.Module,
    loss_of: Callable[[nn.Module, torch.Generator], Tensor],
    name: str,
    args: argparse.Namespace,
    *,
    trained_on: Sequence[Tensor],
    learning_rate: float = 1e-3,
    mixed_precision: str = "no",
    keep_at: Sequence[int] = (),
    keep: Callable[[int, nn.Module], None] | None = None,
) -> History:
    """Trains ``network`` in place to its exponential moving average; resumes from the last checkpoint of ``name``.

    Args:
        network: What is trained, initialised by the caller after ``torch.manual_seed``; on the CPU again afterwards.
        loss_of: (network, generator of this step) -> scalar loss.
        name: Folder of the checkpoints.
        args: From :func:`finish`.
        trained_on: The data, by which a checkpoint is known to belong to this run.
        learning_rate: Highest rate, reached after a twentieth of the steps, from where it falls to zero by a cosine.
        mixed_precision: Of accelerate, "no" or "bf16".
        keep_at: Numbers of steps after which ``keep`` is called.
        keep: Called with the number of steps done and the network carrying its moving average.

    Raises:
        RuntimeError: a checkpoint of another run, another process at work on it, or several processes.
        FloatingPointError: a loss that is not finite.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision)
    if accelerator.num_processes > 1:
        raise RuntimeError(f"{accelerator.num_processes} processes. Expected one: the steps seed the batches.")
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-4)
    warm = max(args.steps // 20, 1)
    rates = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warm),
         torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(args.steps - warm, 1))],
        [warm],
    )  # fmt: skip
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    settings = {"steps": args.steps, "learning_rate": learning_rate, "mixed_precision": mixed_precision}
    run = _fingerprint(repr((settings, shapes)), trained_on)
    model, optimizer, rates = accelerator.prepare(network, optimizer, rates)
    average = EMAModel(network.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    history = History(settings | {"device": str(accelerator.device), "threads": torch.get_num_threads()})
    accelerator.register_for_checkpointing(average, history)
    folder = args.checkpoints / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock", timeout=0):
        first = _resume(accelerator, folder, run)
        average.to(accelerator.device)
        saved = time.monotonic()
        model.train()
        for step in (bar := trange(first, args.steps, initial=first, total=args.steps, desc=name, mininterval=5)):
            began = time.monotonic()
            with accelerator.autocast():
                loss = loss_of(model, torch.Generator().manual_seed(step))
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"{name}: the loss is {loss.item()} at step {step}. Expected a finite one; lower the rate."
                )
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            average.step(network.parameters())
            history.losses.append(loss.item())
            history.step_seconds.append(time.monotonic() - began)
            if step + 1 in keep_at:
                average.store(network.parameters())
                average.copy_to(network.parameters())
                keep(step + 1, network)
                average.restore(network.parameters())
            if time.monotonic() - saved > args.save_seconds or step + 1 == args.steps:
                now = time.monotonic()
                history.seconds, saved = history.seconds + now - saved, now
                _checkpoint(accelerator, folder, step + 1, run)
                bar.set_postfix(loss=f"{sum(history.losses[-50:]) / len(history.losses[-50:]):.4f}")
    average.copy_to(network.parameters())
    network.to("cpu").eval()
    return history


def _fingerprint(settings: str, tensors: Sequence[Tensor]) -> str:
    """Tells one run from another: its settings, the network's shapes and the data."""
    digest = hashlib.sha256(settings.encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _resume(accelerator: Accelerator, folder: Path, run: str) -> int:
    """Loads the last checkpoint, if there is one; returns the steps it has done."""
    done = folder / "done"
    if not done.exists():
        return 0
    first, found = done.read_text().split()
    if found != run:
        raise RuntimeError(
            f"{folder} holds a checkpoint of another run (other steps, rate, data or network). Expected none, or one of this run: "
            "delete the folder to train anew."
        )
    accelerator.load_state(str(folder / f"step{first}"))
    return int(first)


def _checkpoint(accelerator: Accelerator, folder: Path, step: int, run: str) -> None:
    """Writes the state of ``step`` and only then says so; the one before it goes last."""
    shutil.rmtree(folder / f"step{step}", ignore_errors=True)  # half written before a kill
    accelerator.save_state(str(folder / f"step{step}"))
    (folder / "done.part").write_text(f"{step} {run}")
    os.replace(folder / "done.part", folder / "done")
    for other in folder.glob("step*"):
        if other.name != f"step{step}":
            shutil.rmtree(other)


def write_training(folder: Path, network: nn.Module, history: History, **facts: Any) -> None:
    """Notes in ``training.json`` how a model was made; its card is written from this and from ``quality.json``."""
    document = {
        "parameters": sum(p.numel() for p in network.parameters()), **history.settings, "minutes": history.seconds / 60,
        "undisturbed_minutes": history.undisturbed_minutes, "loss_curve": history.curve(), **facts,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
