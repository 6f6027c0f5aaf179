"""Collapse of the exact score of finite data, Gaussian or a tanh of Gaussian latents, beside the theory for p -> infinity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_geometry.theory import EmpiricalCollapse, collapse_time_gaussian, collapse_time_glm, collapse_time_linear

RATIO = 0.52  # 2 alpha / beta = 2 log(n) / p of the extrapolation


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tanh_set(d: int, p: int, n: int, seed: int) -> Tensor:
    """n draws of tanh(W z) with one W, W_ij ~ N(0, 1/p), z ~ N(0, I_p), (n, d)."""
    generator = seeded(seed)
    weights = torch.randn(d, p, generator=generator) / math.sqrt(p)
    return torch.tanh(torch.randn(n, p, generator=generator) @ weights.T)


def measured_times(p: int, n: int, effort: Any, dim: int | None = None) -> dict[str, tuple[float, float]]:
    """Mean collapse time over data sets and its standard error, by each criterion; of Gaussian data, or of tanh in ``dim``."""
    seeds = range(effort.sets)
    sets = [torch.randn(n, p, generator=seeded(s)) if dim is None else tanh_set(dim, p, n, s) for s in seeds]
    collapses = [EmpiricalCollapse(x, num_draws=effort.draws, generator=seeded(1000 + i)) for i, x in enumerate(sets)]
    found = {}
    for criterion in ("weight", "log_odds"):
        times = np.array([collapse.time(criterion).value for collapse in collapses])
        found[criterion] = (times.mean(), times.std(ddof=1) / math.sqrt(len(times)))
    return found


def collapse_part(effort: Any, axes: list, lines: list[str]) -> None:
    by_size, by_dimension = axes
    grid = np.linspace(0.2, 2.6, 200)
    by_size.plot(grid, [collapse_time_linear(x / 2, 1.0) for x in grid], color="#333333", label="theory, p → ∞")
    lines += ["| p | n | theory t_C | E w = 1/2 | E log(w / (1 - w)) = 0 |", "| --- | --- | --- | --- | --- |"]
    for p, n in effort.sizes:
        found, theory = measured_times(p, n, effort), collapse_time_gaussian([1.0] * p, math.log(n))
        cells = [f"{value:.4f} ± {error:.4f}" for value, error in found.values()]
        lines.append(f"| {p} | {n} | {theory:.4f} | {cells[0]} | {cells[1]} |")
        for (value, error), (marker, colour) in zip(found.values(), (("o", "#1f78b4"), ("s", "#e31a1c")), strict=True):
            by_size.errorbar(2 * math.log(n) / p, value, 2 * error, fmt=marker, color=colour, markersize=5)
        place, below = (2 * math.log(n) / p, found["weight" if n == 4096 else "log_odds"][0]), n == 4096
        offset, side = ((-7, -12), "right") if below else ((7, 5), "left")
        by_size.annotate(f"{p}, {n}", place, xytext=offset, textcoords="offset points", fontsize=8, ha=side)
    tanh_part(effort, by_size, lines)
    for (marker, colour), label in zip((("o", "#1f78b4"), ("s", "#e31a1c")), ("E w = 1/2", "E log(w / (1 - w)) = 0"), strict=True):
        by_size.plot([], [], marker, color=colour, label=f"exact score, {label}")
    by_size.set(xlabel="2 α / β = 2 log(n) / p", ylabel="collapse time t_C", title="collapse of exact scores (labels: p, n)")
    dims = [(p, round(math.exp(RATIO * p / 2))) for p in effort.latent]
    found = [measured_times(p, n, effort)["log_odds"] for p, n in dims]
    inverse, (values, errors) = 1 / np.array(effort.latent, float), np.array(found).T
    used = slice(-min(4, len(values)), None)
    (slope, limit), covariance = np.polyfit(inverse[used], values[used], 1, w=1 / errors[used], cov="unscaled")
    uncertain = math.sqrt(covariance[1, 1])
    theory = collapse_time_linear(RATIO / 2, 1.0)
    by_dimension.errorbar(inverse, values, 2 * errors, fmt="s", color="#e31a1c", label="exact score, log odds")
    line = np.array([0, inverse.max()])
    by_dimension.plot(
        line,
        limit + slope * line,
        "--",
        color="#e31a1c",
        label=f"line through the {len(values[used])} largest p: {limit:.3f} ± {uncertain:.3f} at 1/p = 0",
    )
    by_dimension.plot(0, theory, "*", color="#333333", markersize=12, label=f"theory: {theory:.3f}")
    by_dimension.set(xlabel="1 / p", ylabel="collapse time t_C", title=f"at 2 α / β = {RATIO}")
    fitted = ", ".join(map(str, effort.latent[used]))
    left_out = ", ".join(map(str, effort.latent[: -len(values[used])])) or "none"
    lines += ["", f"At 2 α / β = {RATIO}: {limit:.4f} ± {uncertain:.4f} extrapolated to 1/p = 0 by a line through p = {fitted}; "
              f"theory {theory:.4f}. Left out of the fit: p = {left_out}.", ""]  # fmt: skip


def tanh_part(effort: Any, axes: Any, lines: list[str]) -> None:
    """Data x_0 = tanh(W z) of p = d / 2 latents, beside the replica-symmetric theory."""
    grid = np.linspace(0.4, 2.4, effort.tanh_curve)
    curve = [collapse_time_glm(x / 4, 0.5, "tanh") for x in grid]
    axes.plot(grid, curve, "--", color="#1b9e77", label="replica-symmetric theory of tanh, β = 1/2")
    lines += ["", "| data tanh(W z), d = 2 p: p | n | theory t_C | E w = 1/2 | E log(w / (1 - w)) = 0 |", "| --- " * 5 + "|"]
    for i, (d, p, n) in enumerate(effort.tanh_sizes):
        found, theory = measured_times(p, n, effort, d), collapse_time_glm(math.log(n) / d, p / d, "tanh")
        cells = [f"{value:.4f} ± {error:.4f}" for value, error in found.values()]
        lines.append(f"| {p} | {n} | {theory:.4f} | {cells[0]} | {cells[1]} |")
        value, error = found["weight"]
        label = None if i else "exact score of tanh, E w = 1/2 (p = " + ", ".join(str(s[1]) for s in effort.tanh_sizes) + ")"
        axes.errorbar(2 * math.log(n) / p, value, 2 * error, fmt="^v"[i % 2], color="#1b9e77", markersize=5, label=label)
