"""Which files of a pipeline's repository are loaded: configuration and safetensors of its components, and nothing that runs code.

A diffusers pipeline is a ``model_index.json`` and a folder per component (``{"unet": ["diffusers", "UNet2DModel"], ...}``). A
folder may hold the same weights many times: pickled (.bin), as variants (``.fp16.``), for other frameworks. ``from_pretrained``
with ``use_safetensors=True`` reads one of them, and here are the rules by which it does, applied to names alone: before anything
is downloaded. A name has a variant when it has a part between dots: ``diffusion_pytorch_model.fp16.safetensors``,
``model.fp16-00001-of-00002.safetensors``, ``model.safetensors.index.fp16.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from .hub_errors import HubError

INDEX = "model_index.json"
_CONFIGURATION = (".json", ".txt", ".model", ".jinja")
_PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


def components(index: Any) -> set[str]:
    """Folders that the content of a model_index.json names; a component that is null has none.

    Raises:
        HubError: the content is no table, or a name could lead out of the folder.
    """
    if not isinstance(index, dict):
        raise HubError(f"{INDEX} holds a {type(index).__name__}. Expected a table of components, as save_pretrained writes it.")
    found = {name for name, value in index.items() if isinstance(value, list) and not name.startswith("_") and any(value)}
    if odd := sorted(name for name in found if not name.isidentifier()):
        raise HubError(f"{INDEX} names the component {odd[0]!r:.80}. Expected the name of a folder and argument, such as 'unet'.")
    return found


def is_loaded(name: str, folders: set[str]) -> bool:
    """Whether diffusers reads a file of these components' folders when it loads the default variant from safetensors."""
    folder, _, file = name.rpartition("/")
    if not folder:
        return name == INDEX
    if folder not in folders:
        return False
    if ".safetensors" in file:
        return re.fullmatch(r"[^.]+\.safetensors(\.index\.json)?", file) is not None
    return file.endswith(_CONFIGURATION) and not any(f"{pickled}." in file for pickled in _PICKLED)


def loaded_files(repo_id: str, index: str, names: Collection[str]) -> list[str]:
    """Files of a repository that are loaded.

    Args:
        repo_id: For messages.
        index: Text of its model_index.json.
        names: All its files.

    Raises:
        HubError: no JSON; a component has weights but none in safetensors, or as a variant only; it wants code of its own.
    """
    try:
        table = json.loads(index)
    except ValueError as error:
        raise HubError(f"{INDEX} of {repo_id} is not JSON: {error}. Expected what save_pretrained writes.") from None
    folders = components(table)
    for folder in sorted(folders):
        _check_weights(repo_id, folder, [name for name in names if name.rpartition("/")[0] == folder])
    code = [f"{folder}/{table[folder][0]}.py" for folder in sorted(folders) if f"{folder}/{table[folder][0]}.py" in names]
    if isinstance(table.get("_class_name"), list):  # [module, class]: diffusers' form for a pipeline class of the repository
        code.insert(0, f"{table['_class_name'][0]}.py")
    if code:
        raise HubError(
            f"{repo_id} wants code of its own to be run ({', '.join(code)}), which is never downloaded here. Expected a pipeline "
            "of diffusers; in Python, one that you loaded yourself."
        )
    return sorted(name for name in names if is_loaded(name, folders))


def refuse_without_index(repo_id: str, names: Collection[str]) -> None:
    """Refuses a repository that is no pipeline, and says so if its weights are pickled besides."""
    if INDEX not in names:
        pickled = [name for name in names if name.endswith(_PICKLED)]
        held = f", and its weights are pickled ({pickled[0]}), so that loading them can run any code" if pickled else ""
        raise HubError(
            f"{repo_id} holds no pipeline: it has no {INDEX}{held}. Expected a diffusers pipeline in safetensors, as "
            "save_pretrained writes it."
        )


def _check_weights(repo_id: str, folder: str, inside: list[str]) -> None:
    pickled = [name for name in inside if name.endswith(_PICKLED)]
    safe = [name for name in inside if name.endswith(".safetensors")]
    if pickled and not safe:
        raise HubError(
            f"{repo_id} has only pickled weights for its {folder} ({pickled[0]}), and loading these can run any code. Expected "
            "safetensors; its owner can convert it at https://huggingface.co/spaces/safetensors/convert."
        )
    if safe and not any(is_loaded(name, {folder}) for name in safe):
        raise HubError(f"{repo_id} has its {folder} only as a variant ({safe[0]}). Expected one without, or a folder of your own.")
