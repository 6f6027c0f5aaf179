"""Figures of the model cards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

SHOWN = 64  # pixels of a contact sheet along an image, at least


def contact_sheet(images: Tensor, path: Path, columns: int) -> None:
    """Images (n, c, h, w) in [-1, 1] in rows of ``columns``, with a margin of one pixel."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    rows = -(-len(pixels) // columns)
    _, channels, height, width = pixels.shape
    sheet = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 90, np.uint8)
    for i, picture in enumerate(pixels):
        y, x = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        sheet[y : y + height, x : x + width] = picture.transpose(1, 2, 0)
    drawn = Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)
    scale = -(-SHOWN // height)
    drawn.resize((drawn.width * scale, drawn.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)


def loss_figure(curve: list[tuple[int, float]], path: Path, name: str) -> None:
    """Training loss over steps, each point the mean over its interval."""
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*curve, strict=True), linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel("mean squared error")
    axes.set_title(f"{name}: loss", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)


def manifold_figure(curves: dict[str, np.ndarray], path: Path) -> None:
    """Singular values of D' over the noise level: the trained network's beside the exact ones; and their gaps."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, name in ((left, "trained"), (middle, "exact")):
        for i, values in enumerate(curves[name].T):
            colour = "#1f78b4" if i < 20 else "#33a02c" if i < 40 else "#bbbbbb"
            label = {0: "1 to 20", 20: "21 to 40", 40: "41 to 100"}.get(i)
            axes.plot(curves["sigma"] ** 2, values, color=colour, linewidth=0.8, label=label)
        axes.set_title(f"{name} singular values of D'", fontsize=10)
        axes.set_ylim(-0.03, 1.1)
        axes.legend(fontsize=8, loc="upper left")
        axes.set_ylabel("singular value")
    for position, colour in ((20, "#ff7f00"), (40, "#e31a1c")):
        for name, style in (("trained", "-"), ("exact", "--")):
            gap = curves[name][:, position - 1] - curves[name][:, position]
            right.plot(curves["sigma"] ** 2, gap, style, color=colour, label=f"after {position}, {name}")
    right.set_title("two gaps", fontsize=10)
    right.set_ylabel("drop between neighbouring singular values")
    right.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xlabel("noise σ² (generation runs to the right)")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
