"""Files that are written whole or not at all, and the images and numbers in them; safetensors and JSON only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def write_together(directory: Path, contents: dict[str, bytes]) -> None:
    """Writes all files or none: each beside its place first, then renamed; on failure the files that were there come back."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = {name: directory / f".{name}.partial" for name in contents}
    previous = {name: directory / f".{name}.previous" for name in contents}
    placed: list[str] = []
    try:
        for name, data in contents.items():
            partial[name].write_bytes(data)
        for name, path in partial.items():
            if (directory / name).is_dir():
                raise IsADirectoryError(f"{directory / name} is a folder. Expected a place for a file.")
            if (directory / name).exists():
                (directory / name).replace(previous[name])
            placed.append(name)
            path.replace(directory / name)
    except BaseException:
        for name in placed:
            (directory / name).unlink(missing_ok=True)
            if previous[name].exists():
                previous[name].replace(directory / name)
        raise
    finally:
        for path in (*partial.values(), *previous.values()):
            path.unlink(missing_ok=True)


def finite(value: float | None) -> float | None:
    """A number that JSON has, or None."""
    return None if value is None or not math.isfinite(value) else float(value)


def pack_images(images: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Puts a pipeline's images into ``arrays`` and returns what they were: numpy, torch, or a list of PIL images or arrays."""
    if images is None:
        return None
    if isinstance(images, np.ndarray):
        arrays["images"] = images
        return {"kind": "numpy"}
    if isinstance(images, Tensor):
        # NumPy has no bfloat16; float32 holds it exactly.
        half = images.dtype == torch.bfloat16
        arrays["images"] = (images.float() if half else images).detach().cpu().numpy()
        return {"kind": "torch", "dtype": str(images.dtype).removeprefix("torch.")}
    for i, image in enumerate(images):
        arrays[f"images.{i}"] = np.asarray(image)
        if arrays[f"images.{i}"].dtype == object:
            raise TypeError(f"images[{i}] is a {type(image).__name__}. Expected an array or a PIL image.")
    return {"kind": "pil" if all(hasattr(image, "mode") for image in images) else "list", "count": len(images)}


def unpack_images(packed: dict[str, Any] | None, arrays: dict[str, np.ndarray]) -> Any:
    """The images that :func:`pack_images` took."""
    if packed is None:
        return None
    if packed["kind"] in ("numpy", "torch"):
        return (
            arrays["images"]
            if packed["kind"] == "numpy"
            else torch.from_numpy(arrays["images"]).to(getattr(torch, packed["dtype"]))
        )
    images = [arrays[f"images.{i}"] for i in range(packed["count"])]
    if packed["kind"] == "list":
        return images
    from PIL import Image

    return [Image.fromarray(image) for image in images]
