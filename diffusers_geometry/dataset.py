"""Labelled data for a reward: points x_t that a pipeline visits, with psi, nu and delta of its denoiser there.

A folder holds ``dataset.json``, what was asked for, and one ``shard-*.safetensors`` a unit of work, a batch of (conditioning, seed)
pairs. A unit's name and content follow from the request alone and its file appears whole, so that a run that was killed at any
moment continues with nothing lost or doubled, and processes share the units by index modulo their number. Seeds are held out,
never samples: two steps of one run, or two prompts on one noise, are near copies of one another.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from .analyze import plan_geometry
from .labels import DatasetRequest, label_unit
from .plan import GeometryPlan
from .probe import Probe
from .storage import write_together

Split = Literal["train", "held_out", "all"]
MANIFEST = "dataset.json"


@dataclass(frozen=True)
class DatasetPlan:
    """What a dataset will cost: the plan of its first unit, how many units there are, and what delta adds to a label."""

    unit: GeometryPlan
    units: int
    labels: int
    delta_evaluations: int = 0

    @property
    def products(self) -> int:
        """Jacobian products of all labels, at most."""
        return self.unit.probe.products * self.labels

    @property
    def seconds(self) -> float:
        """Seconds of probing on one process, at most; the generation itself comes on top."""
        return (self.unit.costs.seconds(self.unit.probe) + self.unit.costs.evaluation * self.delta_evaluations) * self.labels

    def table(self) -> str:
        """The plan as text."""
        probe = self.unit.probe
        work = f"{self.labels} labels in {self.units} units by {probe.method}, engine {self.unit.engine}: {self.products} products"
        work += f" and {self.delta_evaluations * self.labels} evaluations for delta" if self.delta_evaluations else ""
        return f"{work}, {self.seconds:.3g} s of probing on one process ({self.seconds / self.labels:.3g} s a label)"


class GeometryDataset(torch.utils.data.Dataset):
    """The labels of a folder, as a map-style dataset; samples are read into memory once, when first asked for.

    Args:
        folder: As :func:`generate_dataset` wrote it.
        split: "train", "held_out" or "all"; by seeds.
        allow_incomplete: Take the shards that are there; otherwise missing ones are an error.

    Raises:
        FileNotFoundError: no dataset, or shards are missing.
    """

    def __init__(self, folder: str | Path, split: Split = "all", *, allow_incomplete: bool = False) -> None:
        self.folder, self.split = Path(folder), split
        if split not in ("train", "held_out", "all"):
            raise ValueError(f"split={split!r}. Expected 'train', 'held_out' or 'all'.")
        self.request, self.manifest = _read_manifest(self.folder)
        units = self.request.units
        self.shards = [p for i in range(len(units)) if (p := _shard(self.folder, i)).exists()]
        if not self.shards or (len(self.shards) < len(units) and not allow_incomplete):
            raise FileNotFoundError(
                f"{self.folder} holds {len(self.shards)} of {len(units)} shards. Expected all: run the generation again to "
                "continue it, or pass allow_incomplete=True."
            )
        self._tensors: dict[str, Tensor] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All samples of the split stacked, by name: x_t (N, *dims), the others (N,); psi in nats, delta in knots."""
        if self._tensors is None:
            held = torch.tensor([self.request.is_held_out(s) for s in self.request.seeds])
            index = {s: i for i, s in enumerate(self.request.seeds)}
            parts = []
            for shard in (load_file(path) for path in self.shards):
                wanted = held[[index[s] for s in shard["seed"].tolist()]]
                wanted = {"train": ~wanted, "held_out": wanted, "all": wanted | ~wanted}[self.split]
                parts.append({name: shard[name][wanted] for name in self.request.fields})
            self._tensors = {name: torch.cat([p[name] for p in parts]) for name in self.request.fields}
            self._tensors["sigma"] = self._tensors["sigma_t"] / self._tensors["alpha_t"]
        return self._tensors

    @property
    def seconds_per_label(self) -> float:
        """Measured seconds of probing one label took."""
        spent = labels = 0.0
        for path in self.shards:
            with safe_open(path, "pt") as shard:
                spent += float(shard.metadata()["seconds"])
                labels += len(shard.get_tensor("psi"))
        return spent / labels

    def __len__(self) -> int:
        return len(self.tensors["psi"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: tensor[i] for name, tensor in self.tensors.items()}


def plan_dataset(pipe: Any, request: DatasetRequest) -> DatasetPlan:
    """The cost of a dataset before it is spent; times one product of each kind in the first unit."""
    units = request.units
    options = {"spectrum": request.spectrum, "num_singular_values": request.psi_rank, "max_products": request.max_products}
    options |= {"of": request.of, "branch": request.branch, "record_steps": request.record_steps, "probe_chunk_size": 64}
    plan = plan_geometry(pipe, **request.arguments(units[0]), **options)
    plan = replace(plan, probe=replace(plan.probe, trace_products=0))  # no label takes the trace
    if request.psi_rank is not None and request.psi_rank > plan.probe.size:
        raise ValueError(f"psi_rank={request.psi_rank}. Expected at most {plan.probe.size}, the numbers of one sample.")
    labels = plan.steps * sum(len(u) for u in units)
    return DatasetPlan(plan, len(units), labels, request.delta_evaluations(plan.probe.size))


def generate_dataset(
    pipe: Any, folder: str | Path, request: DatasetRequest, *, max_seconds: float | None = None, progress: bool = True
) -> GeometryDataset | None:
    """Labels every unit of the request that the folder does not hold yet; call again after a stop to continue.

    Processes of ``accelerate launch`` share the units of one folder (on CPUs use ``torchrun``: accelerate starts one there).

    Args:
        pipe: A diffusers pipeline that takes a list of generators.
        folder: Where the shards go.
        request: What to label.
        max_seconds: Refuses a plan that would probe longer, over all processes' units.
        progress: Show a bar.

    Returns:
        The dataset, complete.

    Raises:
        ValueError: the folder holds another request or another model's labels; a plan beyond ``max_seconds``.
    """
    state, folder = PartialState(cpu=torch.device(pipe.device).type == "cpu"), Path(folder)
    plan = plan_dataset(pipe, request)
    if max_seconds is not None and plan.seconds > max_seconds:
        raise ValueError(f"max_seconds={max_seconds:g}. Expected at least {plan.seconds:.3g}: {plan.table()}.")
    manifest = {"request": asdict(request), "model": model_identity(pipe), "probe": plan.unit.probe.as_dict()}
    if state.is_main_process:
        _write_manifest(folder, manifest)
    state.wait_for_everyone()
    if _read_manifest(folder)[1] != json.loads(json.dumps(manifest)):
        raise ValueError(f"{folder} holds labels of another request or model. Expected an empty folder, or the same again.")
    mine = list(enumerate(request.units))[state.process_index :: state.num_processes]
    for i, pairs in tqdm(mine, desc="labels", unit="unit", disable=not (progress and state.is_main_process)):
        if not _is_whole(_shard(folder, i), request.fields):
            tensors, seconds = label_unit(pipe, request, pairs, Probe(plan.unit.probe))
            said = {"seconds": f"{seconds:.6g}", "process": str(state.process_index)}
            write_together(folder, {_shard(folder, i).name: save(tensors, said)})
    state.wait_for_everyone()
    return GeometryDataset(folder)


def model_identity(pipe: Any) -> dict[str, Any]:
    """What tells two models apart: pipeline and scheduler with its settings, and a hash of all weights."""
    digest = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        for key, value in sorted(module.state_dict().items()) if isinstance(module, nn.Module) else ():
            digest.update(f"{name}.{key}".encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    settings = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
    scheduler = {"class": type(pipe.scheduler).__name__, **json.loads(json.dumps(settings, default=str))}
    return {"pipeline": type(pipe).__name__, "scheduler": scheduler, "weights_sha256": digest.hexdigest()}


def _shard(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:05d}.safetensors"


def _is_whole(path: Path, fields: tuple[str, ...]) -> bool:
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as shard:
            return set(fields) <= set(shard.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read ({error}). Expected a whole shard; delete the file to label its unit again."
        ) from error


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes what is asked for into a new folder; an existing one is left for comparison."""
    if not (folder / MANIFEST).exists():
        write_together(folder, {MANIFEST: json.dumps(manifest, indent=1).encode()})


def _read_manifest(folder: Path) -> tuple[DatasetRequest, dict[str, Any]]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}. Expected a folder that generate_dataset wrote.")
    manifest = json.loads(path.read_text())
    return DatasetRequest(**manifest["request"]), manifest
