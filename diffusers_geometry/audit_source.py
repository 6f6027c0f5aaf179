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
from .loading import load_pipeline
from .mixin import with_geometry

BUNDLED = "the bundled digits"
_VERSIONS = ("diffusers_geometry", "diffusers", "torch", "transformers", "accelerate", "numpy", "huggingface_hub")
DECISIVE = ("diffusers_geometry", "diffusers", "torch", "transformers", "numpy")  # versions of which numbers may depend


def load_source(model: Any, revision: str | None, dtype: str, device: str, token: str | None = None) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the ``model`` of docs/audit.md.

    Args:
        model: A folder, a Hub id, None for the bundled digits, or a pipeline that is loaded already.
        revision: Of a Hub id.
        dtype: Of the weights, as they are loaded; of a pipeline its own.
        device: Where it computes; of a pipeline its own.
        token: For a private or gated Hub model.

    Raises:
        UsageError: nothing can be loaded there.
        HubError: the Hub does not give it.
    """
    if model is not None and not isinstance(model, (str, Path)):
        identity = model_identity(model)
        where = {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
        name = str(getattr(model, "name_or_path", None) or type(model).__name__)
        found = {"name": name, "revision": revision, **identity_of(model), **where, "weights": {}}
        return _quiet(with_geometry(model)), found | {"weights_sha256": identity["weights_sha256"]}
    name = BUNDLED if model in (None, BUNDLED) else str(model)
    found = snapshot(DIGITS if name == BUNDLED else name, revision, token)
    pipe = load_pipeline(str(found.path), dtype, own_device(device))
    weights = weight_hashes(found.path)
    return _quiet(pipe), {
        "name": found.repo_id or name, "revision": found.sha, **identity_of(pipe), "dtype": dtype, "device": device,
        "weights": weights, "weights_sha256": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest(),
    }  # fmt: skip


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
