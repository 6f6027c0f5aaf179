"""Steer the bundled digits by psi: labels, a reward, dose and response in the true psi, its price, and controls.

python examples/reproduce/guidance.py               # about 20 minutes on two cores; continues after a stop from a cache folder
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from arguments import parse
from guidance_bench import LABELLED, RANK, SMOKE, STEPS, WINDOW, Bench, Effort
from guidance_rows import Row, contact_sheet, dose_panel, marks, marks_table, measured_rows, quality_panel, table
from matplotlib.figure import Figure
from sample_quality import MEASURES
from torch import Tensor

from diffusers_geometry import GeometryDataset
from diffusers_geometry.dataset import generate_dataset
from diffusers_geometry.labels import DatasetRequest

VERDICT = """\
The reward meets its mark, a mean Spearman above 0.8 within a noise level on unseen seeds, and guidance by it moves the true psi
both ways, further than a random direction of equal norm; most other marks are missed. At the scales chosen on other seeds psi
moves by a little less than one standard deviation up and by three quarters of one down, where it levels off; +8 passes the mark
upwards at the price of broken digits. The response is monotone only to within its errors: +0.5 and +1 do the same. The share of
confident digits falls by less than 5 points downwards and by more upwards, and many samples change their digit on the way.
Diversity goes against the mark: higher psi crowds the samples together, lower psi spreads them. A reward trained on shuffled
labels, which ranks nothing, raises psi at -8 beyond its error, where a random direction does not: a large push along what a
network has made up can move psi by itself. The other controls stay within two standard errors. The exact gradient of psi moves
it twice as far up as the reward does, and no further down to within the error. The best of eight by true psi needs no reward,
meets both marks, and costs eight generations and their Jacobians."""


def draw(rows: list[Row], metrics: dict[str, Any], output: Path) -> None:
    """Dose and response, the reward's quality, and a contact sheet."""
    figure = Figure(figsize=(12, 10), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    axes, quality = top.subplots(1, 2, width_ratios=(1.4, 1))
    dose_panel(axes, rows, "dose and response (± 1 s.e.)")
    quality_panel(quality, {"reward": metrics})
    contact_sheet(bottom.subplots(1, 1), rows, 24, "the same seeds under every scale")
    figure.savefig(output / "guidance.png", dpi=90)


def main() -> None:
    """Labels, rewards, runs, and what they say."""
    output, smoke = parse(__doc__)
    effort = SMOKE if smoke else Effort()
    bench = Bench(effort, None if smoke else Path(tempfile.gettempdir()) / "diffusers_geometry_guidance")
    request = DatasetRequest(
        seeds=range(effort.label_seeds), record_steps=LABELLED, psi_rank=RANK, batch_size=48, held_out=effort.held_out,
        delta_radius=None,
        call={"num_inference_steps": STEPS, "output_type": "np"},
    )  # fmt: skip
    dataset = generate_dataset(bench.pipe, bench.labels, request, progress=not smoke)
    (reward, metrics), (shuffled, control) = bench.reward(False), bench.reward(True)
    rows = measured_rows(bench, reward, shuffled)
    psi = rows[0].found["psi"]
    lines = [
        "# Guidance by psi",
        "",
        f"Written by `examples/reproduce/guidance.py`. {VERDICT}",
        "",
        "![guidance](guidance.png)",
        "",
    ]
    lines += marks_table(marks(rows, metrics, bench))
    lines += ["", *explained(bench, metrics, control, dataset, psi), "", *table(rows, MEASURES), ""]
    draw(rows, metrics, output)
    (output / "guidance.md").write_text("\n".join(lines))
    print(output / "guidance.md")


def explained(bench: Bench, metrics: dict, control: dict, dataset: GeometryDataset, psi: Tensor) -> list[str]:
    """How the numbers were taken."""
    effort, scatter = bench.effort, float(psi.std(dim=1).mean())
    labels = (
        f"Labels: {len(dataset):,} points of {effort.label_seeds:,} runs at {len(LABELLED)} noises, "
        f"{dataset.seconds_per_label:.3f} s each. The reward, a copy of the model's encoder, kept step {metrics['best_step']} of "
        f"{metrics['steps']} ({metrics['seconds']:.0f} s); the control of shuffled labels reached a Spearman of "
        f"{control['spearman']:.3f}. Guidance acts from {WINDOW['start']:.0%} to {WINDOW['stop']:.0%} of the run at the noises of "
        f"the labels, trust radius {WINDOW['trust_radius']:g} of the noise; scales were chosen on other seeds."
    )
    truth = (
        f"True psi is that of a dense D' over its {RANK} largest singular values at sigma {bench.sigma_ref / bench.alpha_ref:.3f}, "
        f"below every noise of the labels, mean over {effort.noises} noises common to all samples: {float(psi.mean()):.2f} nats "
        f"unguided, standard deviation {float(psi.mean(1).std()):.2f} over samples and {scatter:.2f} over the noises of one. "
        "Shifts are paired by seed, those of the best of N and of other seeds are not."
    )
    price = (
        f"Measures are means over {effort.blocks} blocks of {effort.samples // effort.blocks} samples with standard errors, in the "
        f"features of a multilayer perceptron that is right on {bench.judge.accuracy:.1%} of unseen digits. The model has no "
        "classes to be accurate about: *confident* is the share read with a confidence of at least 0.9, *same digit* the share "
        "read as the unguided sample of the same seed is. There is no classifier-free guidance whose scale could be a control. "
        "*Change of x_0* is the mean length of a shift beside that of the model's estimate; *seconds* are per sample."
    )
    return [labels, "", truth, "", price]


if __name__ == "__main__":
    main()
