"""The zoo's models by name.

sys.path.append("examples/zoo")
from load import load_zoo
trace = load_zoo("sd-mnist").analyze_geometry("a thick slanted seven")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from diffusers_geometry import GeometryVectorPipeline, VectorNetwork, with_geometry

ZOO = Path(__file__).parent


def names() -> list[str]:
    """Every model of the zoo."""
    return sorted(path.parent.name for path in ZOO.glob("*/model_index.json"))


def load_zoo(name: str, training_step: int | None = None) -> Any:
    """A geometry pipeline of the zoo.

    Args:
        name: One of :func:`names`.
        training_step: For the linear manifolds, the network as it was after this many steps of training.

    Raises:
        ValueError: no such model, or no such step of it.
    """
    if name not in names():
        raise ValueError(f"name={name!r}. Expected one of {names()}.")
    folder, components = ZOO / name, {}
    if training_step is not None:
        kept = sorted(int(path.name.removeprefix("step")) for path in folder.glob("training/step*"))
        if training_step not in kept:
            raise ValueError(f"training_step={training_step} of {name}. Expected one of {kept}.")
        path = folder / "training" / f"step{training_step}"
        components["network"] = VectorNetwork.from_pretrained(path, use_safetensors=True)
    is_vector = json.loads((folder / "model_index.json").read_text())["_class_name"] == GeometryVectorPipeline.__name__
    pipeline_class = GeometryVectorPipeline if is_vector else DiffusionPipeline
    return with_geometry(pipeline_class.from_pretrained(folder, use_safetensors=True, **components))


def load_basis(name: str) -> Tensor:
    """F of a linear manifold's data x_0 = F z, shape (d, m)."""
    return load_file(ZOO / name / "basis.safetensors")["basis"]
