"""A geometry pipeline from a name, and the arguments of its call from text: what the commands share."""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what can."""


def load_pipeline(model: str | None, dtype: str = "float32", device: str = "cpu", *, token: str | bool | None = None) -> Any:
    """A geometry pipeline from a folder, a Hub id, or the bundled digits; safetensors only.

    A Hub id is pinned to the commit that it means now (:func:`.hub.snapshot`), or to the one it names: ``org/model@sha``; the
    pipeline's ``name_or_path`` says which.

    Raises:
        UsageError: nothing can be loaded there, unknown dtype or device.
        HubError: the Hub does not give it, or not in safetensors.
    """
    from .bundled import DIGITS
    from .hub import snapshot

    name = str(DIGITS) if model is None else model
    if Path(name).exists() and not (Path(name) / "model_index.json").is_file():
        raise UsageError(f"{name} holds no pipeline. Expected a folder with a model_index.json, as save_pretrained writes it.")
    import diffusers
    import torch

    from .mixin import with_geometry

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise UsageError(f"dtype {dtype!r} is not known. Expected one of {', '.join(dtypes)}.")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        torch.empty(0, device=device)
    except Exception as error:
        raise UsageError(f"--device {device} cannot be used here: {one_line(error)}") from error
    found = snapshot(name, token=token)
    _check_index(found.path / "model_index.json")
    try:
        loader = _own_class(diffusers.DiffusionPipeline.load_config(found.path)) or diffusers.DiffusionPipeline
        pipe = loader.from_pretrained(found.path, dtype=dtypes[dtype], use_safetensors=True)
    except Exception as error:  # diffusers raises whatever the broken file makes it raise
        raise UsageError(f"cannot load the pipeline in {found.name}: {one_line(error)}") from error
    pipe.register_to_config(_name_or_path=found.name)
    return with_geometry(pipe.to(torch.device(device)))


def _check_index(path: Path) -> None:
    """Refuses a model_index.json that names no pipeline of this diffusers."""
    import diffusers

    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {one_line(error)}") from error
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str) or not (hasattr(diffusers, name) or _own_class(index)):
        raise UsageError(f"{path} names the pipeline class {name!r}. Expected one of diffusers {diffusers.__version__}.")


def _own_class(index: dict[str, Any]) -> type | None:
    """The pipeline class of this package that an index names, which diffusers would not find."""
    from . import vector

    name = index.get("_class_name")
    return vector.GeometryVectorPipeline if name == vector.GeometryVectorPipeline.__name__ else None


def call_arguments(
    pipe: Any, prompt: str | None, labels: list[int] | None, steps: int, seed: int, call: list[str]
) -> dict[str, Any]:
    """Keyword arguments for the pipeline's call, checked against its signature."""
    import torch

    if steps < 1:
        raise UsageError(f"--steps {steps} is not possible. Expected at least 1.")
    arguments: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": steps}
    if prompt is not None:
        arguments["prompt"] = prompt
    if labels:
        arguments["class_labels"] = labels
    return completed_call(pipe, arguments | parsed_call(call))


def parsed_call(call: list[str]) -> dict[str, Any]:
    """The arguments of ``--call key=value``; values are JSON where they can be, else text."""
    arguments = {}
    for item in call:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--call {item!r} has no value. Expected key=value.")
        if key in ("generator", "num_inference_steps"):
            raise UsageError(f"--call {key} is set by --{'seed' if key == 'generator' else 'steps'}. Expected that option.")
        arguments[key] = _literal(value)
    return arguments


def completed_call(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments checked against the signature of the pipeline's call, and the output type that its precision needs.

    Raises:
        UsageError: one that the pipeline does not take, or that it needs and is not there; a class it does not have.
    """
    import torch

    parameters = inspect.signature(type(pipe).__call__).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in arguments:
        if name not in parameters and not open_ended:
            accepted = ", ".join(list(parameters)[1:])
            raise UsageError(f"{type(pipe).__name__} takes no argument {name!r}. Expected one of: {accepted}.")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in ("self", *arguments) and p.kind not in (2, 4)]
    if missing:
        raise UsageError(f"{type(pipe).__name__} needs {', '.join(missing)}. Expected --prompt, --class-label or --call key=value.")
    _check_labels(pipe, arguments.get("class_labels") or [])
    if pipe.dtype == torch.bfloat16 and "output_type" in parameters and "output_type" not in arguments:
        arguments = arguments | {"output_type": "pt"}  # NumPy has no bfloat16: pixel pipelines cannot make PIL images of it
    return arguments


def _check_labels(pipe: Any, labels: list[int]) -> None:
    """Refuses class labels that the network has no embedding for."""
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    classes = config.get("num_embeds_ada_norm")
    outside = [label for label in labels if classes is not None and not 0 <= label <= classes]
    if outside:
        raise UsageError(f"--class-label {outside[0]} is not a class of this model. Expected 0 to {classes - 1}.")


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def check_writable(folder: Path) -> None:
    """Refuses an output folder that cannot be written, before anything is computed; creates nothing."""
    existing = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UsageError(f"cannot write to --output {folder}: {one_line(error)}. Expected a folder that can be written.") from None


def step_choice(option: str, text: str, refusal: str, *, all_allowed: bool = True) -> int | list[int] | str:
    """A number of loop positions, "all", or positions separated by commas, from the text of an option.

    Raises:
        UsageError: none of these; it says the option, its text and ``refusal``.
    """
    if all_allowed and text == "all":
        return text
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} {refusal}.") from None
    return numbers[0] if "," not in text else numbers


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
