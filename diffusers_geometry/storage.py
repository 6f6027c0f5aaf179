"""Files that are written whole or not at all, and images in them; safetensors and JSON only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def write_together(directory: Path, contents: dict[str, bytes]) -> None:
    """Writes all files or none: each beside its place first, then renamed; what was written is removed on failure."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = {directory / f".{name}.partial": data for name, data in contents.items()}
    try:
        for path, data in partial.items():
            path.write_bytes(data)
        for path in partial:
            path.replace(directory / path.name.removeprefix(".").removesuffix(".partial"))
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def pack_images(images: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Puts a pipeline's images into ``arrays`` and returns what they were: numpy, torch, or a list of PIL images or arrays."""
    if images is None:
        return None
    if isinstance(images, np.ndarray):
        arrays["images"] = images
        return {"kind": "numpy"}
    if isinstance(images, Tensor):
        arrays["images"] = images.detach().cpu().float().numpy()
        return {"kind": "torch"}
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
        return arrays["images"] if packed["kind"] == "numpy" else torch.from_numpy(arrays["images"])
    images = [arrays[f"images.{i}"] for i in range(packed["count"])]
    if packed["kind"] == "list":
        return images
    from PIL import Image

    return [Image.fromarray(image) for image in images]
