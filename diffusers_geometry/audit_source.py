"""The model of an audit, and what identifies it: commit, hashes of weights, scheduler, precision, versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .bundled import DIGITS
from .dataset import model_identity
from .hub import snapshot, weight_hashes
from .loading import UsageError, load_pipeline
from .mixin import with_geometry

BUNDLED = "the bundled digits"
_VERSIONS = ("diffusers_geometry", "diffusers", "torch", "transformers", "accelerate", "numpy", "huggingface_hub")
DECISIVE = ("diffusers_geometry", "diffusers", "torch", "transformers", "numpy")  # versions of which numbers may depend


def load_source(
    model: Any, revision: str | None, dtype: str, device: str, token: str | None = None, lora: str | Path | None = None
) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the ``model`` of docs/audit.md.

    Args:
        model: A folder, a Hub id, None for the bundled digits, or a pipeline that is loaded already.
        revision: Of a Hub id.
        dtype: Of the weights, as they are loaded; of a pipeline its own.
        device: Where it computes; of a pipeline its own.
        token: For a private or gated Hub model.
        lora: A safetensors file of adapter weights to load into the pipeline, as ``save_lora_weights`` wrote it.

    Raises:
        UsageError: nothing can be loaded there, no such adapter.
        ValueError: an adapter for a pipeline that is loaded already.
        HubError: the Hub does not give it.
    """
    if model is not None and not isinstance(model, (str, Path)):
        if lora is not None:
            raise ValueError(f"lora={str(lora)!r} with a loaded {type(model).__name__}. Expected it loaded there already.")
        identity = model_identity(model)
        where = {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
        name = str(getattr(model, "name_or_path", None) or type(model).__name__)
        found = {"name": name, "revision": revision, **identity_of(model), **where, "weights": {}}
        return _quiet(with_geometry(model)), found | {"weights_sha256": identity["weights_sha256"]}
    name = BUNDLED if model in (None, BUNDLED) else str(model)
    found = snapshot(DIGITS if name == BUNDLED else name, revision, token)
    pipe = load_pipeline(str(found.path), dtype, own_device(device))
    weights = weight_hashes(found.path) | ({} if lora is None else {f"lora/{Path(lora).name}": _load_adapter(pipe, Path(lora))})
    return _quiet(pipe), {
        "name": found.repo_id or name, "revision": found.sha, **identity_of(pipe), "dtype": dtype, "device": device,
        "lora": None if lora is None else str(lora), "weights": weights,
        "weights_sha256": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest(),
    }  # fmt: skip


def _load_adapter(pipe: Any, path: Path) -> str:
    """Loads LoRA weights into the pipeline; their sha256."""
    if path.suffix != ".safetensors" or not path.is_file():
        raise UsageError(f"--lora {path} is no safetensors file. Expected one that save_lora_weights wrote, with its name.")
    if not hasattr(pipe, "load_lora_weights"):
        raise UsageError(f"--lora {path}: {type(pipe).__name__} takes no adapters. Expected a pipeline that does.")
    pipe.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
    adapters = pipe.get_list_adapters()
    if not any(adapters.values()):
        raise UsageError(f"--lora {path} holds no weights of {type(pipe).__name__}. Expected an adapter of this architecture.")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def own_device(device: str) -> str:
    """The accelerator of this process, where a launch has several and the device does not say which ("cuda", not "cuda:1")."""
    if device == "cpu" or ":" in device or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    return str(PartialState().device)


def _quiet(pipe: Any) -> Any:
    """A pipeline of our own without bars of its own: the audit has one."""
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    return pipe


def identity_of(pipe: Any) -> dict[str, Any]:
    """Pipeline class, and scheduler with its settings."""
    settings = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
    scheduler = {"class": type(pipe.scheduler).__name__, "config": json.loads(json.dumps(settings, default=str))}
    return {"pipeline": type(pipe).__name__, "scheduler": scheduler}


def versions() -> dict[str, str]:
    """Of everything that numbers may depend on."""
    found = {name: importlib.metadata.version(name) for name in _VERSIONS}
    return found | {"python": platform.python_version()}
