"""The card of a trained reward: what it predicts, how well on seeds it never saw, at which noises, and what it cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from .reward import GeometryReward
from .reward_metrics import RewardMetrics
from .storage import write_together

_UNITS = {"psi": "nats", "nu": "directions", "delta": "sign changes"}


def save_reward(reward: GeometryReward, metrics: RewardMetrics, folder: str | Path, *, made_of: dict[str, Any]) -> None:
    """Writes weights, config, card, metrics and the calibration figure into a folder.

    Args:
        reward: Trained.
        metrics: Its.
        folder: Where.
        made_of: What the labels come from, for the card: "model" and whatever else is worth saying.
    """
    folder = Path(folder)
    reward.save_pretrained(folder)
    document = asdict(metrics) | {"spearman": metrics.spearman, "r_squared": metrics.r_squared, "made_of": made_of}
    contents = {"metrics.json": json.dumps(document, indent=1, allow_nan=False).encode(), "calibration.png": _figure(metrics)}
    write_together(folder, contents | {"README.md": card(reward, metrics, made_of).encode()})


def card(reward: GeometryReward, metrics: RewardMetrics, made_of: dict[str, Any]) -> str:
    """The model card as Markdown."""
    config, levels = reward.config, metrics.levels
    what = f"{config.descriptor} over the {config.psi_rank} largest singular values" if config.psi_rank else config.descriptor
    head = f"{config.num_bins} quantile bins per noise level" if config.head == "bins" else "mean and log variance"
    rows = "\n".join(
        f"| {level.sigma:.4g} | {level.samples} | {level.spearman:.3f} ± {level.spearman_sem:.3f} | {level.r_squared:.3f} |"
        for level in sorted(levels, key=lambda level: -level.sigma)
    )
    labels = "" if metrics.seconds_per_label is None else f" A label took {metrics.seconds_per_label:.3g} s."
    size, ends = sum(p.numel() for p in reward.parameters()), reward.log_sigmas.exp()
    low, high = float(ends.min()), float(ends.max())
    facts = "".join(f"- {name.replace('_', ' ')}: {value}\n" for name, value in made_of.items())
    return f"""---
library_name: diffusers
tags:
- diffusers-geometry
- reward-model
---

# Reward: {what} of the denoiser's Jacobian, from a noisy sample

Predicts {what} ({_UNITS[config.descriptor]}) at x_t without a Jacobian product, differentiably, so that it can steer generation
(arXiv:2408.08307). Load it with `GeometryReward.from_pretrained`, use it with `GeometryGuidance(reward, scale=...)`.

{facts}- samples of shape {tuple(config.sample_shape)}; head: {head}; {size:,} parameters
- noise sigma from {low:.4g} to {high:.4g}; guidance leaves out others
- trained on {metrics.train_samples:,} labels, {metrics.best_step} of {metrics.steps} steps kept, {metrics.seconds:.0f} s; which to
  keep was decided on {metrics.validation_samples:,} labels of other seeds.{labels}

## Quality on {metrics.test_samples:,} labels of seeds that neither trained nor stopped it

Within a noise level; standard errors by bootstrap over seeds. Mean Spearman {metrics.spearman:.3f}, R² {metrics.r_squared:.3f}.

| sigma | labels | Spearman | R² |
|---|---|---|---|
{rows}

![Mean label against mean prediction, standardised within a noise level](calibration.png)

It was trained on what one model generates. On other models, samples far from their runs, or noises outside the range it is not a
measurement; the psi that guidance reached is to be measured with `analyze_geometry`, never with the reward itself.
"""


def _figure(metrics: RewardMetrics) -> bytes:
    """The calibration and the correlation per noise as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    predicted, true, sems = zip(*metrics.calibration, strict=True)
    left.axline((0, 0), slope=1, color="0.7", linewidth=1)
    left.errorbar(predicted, true, yerr=sems, marker="o", linewidth=1)
    left.set(
        xlabel="mean prediction (standard deviations of its level)", ylabel="mean label", title="calibration, tenths by prediction"
    )
    levels = sorted(metrics.levels, key=lambda level: level.sigma)
    sigmas, values = [level.sigma for level in levels], [level.spearman for level in levels]
    right.errorbar(sigmas, values, yerr=[level.spearman_sem for level in levels], marker="o", linewidth=1)
    right.set(xscale="log", xlabel="noise sigma", ylabel="Spearman within the level", title="test seeds")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
