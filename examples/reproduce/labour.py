"""The division of labour over the noise: who brings a sample to the linear manifold, and who sets its variances there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from diffusers_geometry import record
from diffusers_geometry.exact import LinearManifoldDenoiser


@torch.no_grad()
def labour(pipe: Any, manifold: LinearManifoldDenoiser, samples: int, steps: int) -> dict[str, np.ndarray]:
    """Over the noise: share of |score|^2 in the normal space, relative error of the variances of D(x_t) inside, distance of x_t.

    Along a direction of variance l those of D(x_t) are l^2 / (l + sigma^2).
    """
    inside = manifold.directions.double()
    with record(pipe, "all") as recording:
        pipe(samples, torch.Generator().manual_seed(0), num_inference_steps=steps)
    rows = []
    for step in recording:
        x, score = step.sample.double(), step.denoiser.score(step.sample).double()
        denoised = step.denoiser.denoised(step.sample).double()
        tangent = score @ inside
        variance = (denoised @ inside).var(0)
        rows.append((
            step.sigma,
            1 - (tangent.square().sum() / score.square().sum()).item(),
            (variance * (manifold.variances + step.sigma**2) / manifold.variances**2 - 1).abs().mean().item(),
            (x - x @ inside @ inside.T).norm(dim=1).mean().item(),
        ))  # fmt: skip
    return dict(zip(("sigma", "normal_share", "variance_error", "distance"), np.array(rows).T, strict=True))


def labour_table(found: dict[str, dict[str, np.ndarray]], samples: int) -> list[str]:
    """The error of the variances inside and the distance to the manifold over the noise."""
    floor = math.sqrt(2 / (samples - 1)) * math.sqrt(2 / math.pi)
    lines = [
        "| σ | distance to the manifold / σ, trained | error of the variances inside, trained | exact score |",
        "| --- " * 4 + "|",
    ]
    trained, exact = found["trained"], found["exact"]
    for i in np.unique(np.linspace(0, len(trained["sigma"]) - 1, 10).round().astype(int)):
        cells = (trained["distance"][i] / trained["sigma"][i], trained["variance_error"][i], exact["variance_error"][i])
        lines.append(f"| {trained['sigma'][i]:.3g} | {cells[0]:.2f} | {cells[1]:.3f} | {cells[2]:.3f} |")
    note = (
        f"*Mean over directions of |variance of D(x_t) along it / closed form - 1|, {samples:,} samples: were the variances right, "
        f"their sampling alone would show {floor:.3f}. √60 = {math.sqrt(60):.2f} is the noise in the normal space.*"
    )
    return [*lines, "", note, ""]
