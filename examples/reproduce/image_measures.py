"""What an image shows without any model, the trivial baselines of a descriptor, and ways to spoil an image.

Visual complexity, as paper C means it: how many bytes a lossless file takes, and how much of the image is edge.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, sobel
from torch import Tensor

PATCH = 0.5  # side of a swapped patch, as a share of the image's
CORRUPTIONS = ("noise 0.1", "noise 0.2", "noise 0.4", "blur 0.5", "blur 1.0", "patch swap")


def file_size(images: Tensor, levels: int) -> np.ndarray:
    """Bytes of each image (n, c, h, w) in [-1, 1] as an optimised PNG of 8 bits, rounded first to this many grey levels, (n,)."""
    from PIL import Image

    steps = ((images.double().clamp(-1, 1) + 1) / 2 * (levels - 1)).round().to(torch.uint8).movedim(1, 3).numpy()
    sizes = []
    for pixels in steps:
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "png", optimize=True)
        sizes.append(file.tell())
    return np.array(sizes, dtype=float)


def edge_density(images: Tensor) -> np.ndarray:
    """Mean length of the Sobel gradient of the brightness, in its range per pixel, (n, c, h, w) in [-1, 1] -> (n,)."""
    grey = (images.double().mean(1).numpy() + 1) / 2
    # 8: the filter's answer to a slope of one.
    return np.array([np.hypot(sobel(own, 0, mode="nearest"), sobel(own, 1, mode="nearest")).mean() / 8 for own in grey])


def nearest_distance(images: Tensor, training: Tensor) -> np.ndarray:
    """Root mean square distance per pixel to the nearest of the training images, (n,)."""
    return (torch.cdist(images.flatten(1).double(), training.flatten(1).double()).amin(1) / images[0].numel() ** 0.5).numpy()


def corrupted(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Every image spoiled by one of :data:`CORRUPTIONS`.

    "noise s": Gaussian noise of this standard deviation, within the range of the pixels. "blur s": a Gaussian of s pixels. "patch
    swap": a square of half the side, somewhere, from the next image of a shuffled order.

    Raises:
        ValueError: no such kind.
    """
    name, _, strength = kind.rpartition(" ")
    if name == "noise":
        return (images + float(strength) * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
    if name == "blur":
        return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, float(strength), float(strength)), mode="nearest"))
    if kind != "patch swap":
        raise ValueError(f"kind={kind!r}. Expected one of {CORRUPTIONS}.")
    spoiled, side = images.clone(), round(PATCH * images.shape[-1])
    order = torch.randperm(len(images), generator=generator)
    donors = order[torch.argsort(order).add(1) % len(images)]  # the one after it in the order
    for i, (row, column) in enumerate(torch.randint(images.shape[-1] - side + 1, (len(images), 2), generator=generator).tolist()):
        square = (slice(None), slice(row, row + side), slice(column, column + side))
        spoiled[i][square] = images[donors[i]][square]
    return spoiled
