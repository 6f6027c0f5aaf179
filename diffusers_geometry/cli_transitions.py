"""What ``hf-geometry transitions`` does: examples from a file, a call of many runs, the measurement and its files."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from .loading import UsageError, one_line, step_choice

_POSITIONS_REFUSED = "is no choice of positions. Expected a number, 'all', or 10,40,90"


def transitions_of(pipe: Any, arguments: dict[str, Any], given: dict[str, Any]) -> str:
    """Measures, writes ``transitions.json`` and ``transitions.png``, and returns what to print.

    Args:
        pipe: The pipeline.
        arguments: Of its call.
        given: The options of the command.
    """
    examples = {name: None if given[name] is None else load_examples(given[name]) for name in ("data", "held_out")}
    report = pipe.measure_transitions(
        **batched(pipe, arguments, given["batch"]), **examples,
        branch_positions=step_choice("--positions", given["positions"], _POSITIONS_REFUSED),
        num_parents=given["parents"], num_clones=given["clones"], num_clusters=given["clusters"],
        agreement_level=given["agreement"], clone_seed=given["seed"], progress=not given["as_json"],
    )  # fmt: skip
    output: Path = given["output"]
    report.save(output / "transitions.json")
    report.plot(output / "transitions.png")
    if given["as_json"]:
        document = report.to_dict() | {"steps": report.rows(), "output": str(output)}
        del document["agreements"]
        return json.dumps(document, indent=1, allow_nan=False)
    return f"{report.table()}\n\nReport and figure in {output}/"


def batched(pipe: Any, arguments: dict[str, Any], batch: int) -> dict[str, Any]:
    """The call's arguments for ``batch`` runs at once, where the pipeline has a way to say that."""
    if batch < 1:
        raise UsageError(f"--batch {batch} is not possible. Expected at least 1.")
    parameters = inspect.signature(type(pipe).__call__).parameters
    name = next((n for n in ("batch_size", "num_images_per_prompt", "num_videos_per_prompt") if n in parameters), None)
    if name is not None:
        return {name: batch} | arguments
    if "class_labels" in arguments:
        labels = arguments["class_labels"]
        return arguments | {"class_labels": (labels * batch)[: max(batch, len(labels))]}
    return arguments


def load_examples(path: Path) -> Any:
    """A tensor of examples from a .npy file, or from a .safetensors file with one tensor or one named "images".

    Raises:
        UsageError: no such file, or not of these.
    """
    try:
        if path.suffix == ".npy":
            import numpy as np

            return np.load(path, allow_pickle=False)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
            if "images" in tensors or len(tensors) == 1:
                return tensors.get("images", next(iter(tensors.values())))
            raise UsageError(f"{path} has the tensors {sorted(tensors)}. Expected one, or one named 'images'.")
    except UsageError:
        raise
    except Exception as error:  # whatever a broken file makes its reader raise
        raise UsageError(f"cannot read {path}: {one_line(error)}") from error
    raise UsageError(f"{path} is not a file of examples. Expected .npy or .safetensors.")
