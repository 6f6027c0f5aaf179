"""Which prompts recite: memorisation scores on planted captions, beside the published formulas, and what mitigation does.

python examples/reproduce/memorization.py            # about 25 minutes on one core; continues after a stop from a cache folder
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import parse
from matplotlib.figure import Figure
from memorization_bench import CHEAP, GUIDANCE, RECORDED, STEPS, Bench, Effort, Prompts, prompts
from memorization_mitigation import METHODS, SHOWN, Mitigation, Outcome
from memorization_published import sharpness
from memorization_rows import (
    Row,
    asymmetry,
    combined,
    marks,
    mitigation_table,
    published_rows,
    published_table,
    rows_of,
    score_table,
    separation,
    spectra_table,
    split,
    unlabelled,
)
from torch import Tensor

from diffusers_geometry import record
from diffusers_geometry.memorization import RunPoint, score_batch
from diffusers_geometry.schedule import noise_level

VERDICT = """\
Both marks are met by the values; fifteen held-out planted captions are too few for intervals that end above the marks. Among
the held-out captions the guidance norm at the first step of one seed, two network evaluations, separates every planted one
from every control and ordinary one, and so do the reverse product's sharpness, FLIPD and its gap, the contraction tr D'_u - tr
D'_c and the agreement of seeds. What differs is the margin. The contraction and the gap of FLIPD, which take products,
separate by nine standard deviations, the guidance norm over the run by 3.5 and at its first step by 1.7; the logistic
regression of all adds nothing to the best of them. Without labels the planted captions are ranked first and they alone are
flagged. The cosine is weak along the run. As its authors coded it, of pure noise shown at a low timestep, it has the wrong
sign on this model, and added with its weight set by hand it spoils the norm beside it (AUROC 0.79, the norm alone 1.00). FLIPD
of pure noise with one probe orders captions no better than chance or the wrong way, with its whole Jacobian too; taken at the
finished sample it separates them all. The coded score of a v-prediction is off by 1 / s² exactly, which no ranking at one step
shows. The set is easy: thirty captions that recite always, none that recites in part, one small model. Flagged prompts are
best mitigated by releasing the guidance early: the full weight for a fifth of the run and none from there leaves 2 % of the
planted samples reciting and 90 % readable (97 % before), and 93 % of captions flagged by mistake still show their digit; what
is left still resembles the planted image, from which it lies about as far as a training digit from its nearest neighbour. The
pipeline's guidance_scale cannot do it, as the conditional branch recites too; a constant weight that stops recitation leaves
half of the samples unreadable; the gradient of the guidance norm does nothing until it breaks a third of the digits, at five
times the time."""
SMOKE = Effort(planted=4, controls=2, ordinary=2, seeds=1, costly=1, spectra=(1, 1, 0), draws=20, batch=8)
COLOURS = {"planted": "#d62728", "control": "#7f7f7f", "ordinary": "#1f77b4"}
NOTES = """\
Prompts: {planted} planted captions against {control} controls and {ordinary} ordinary captions (270 that training has, the rest
with their words reordered), {seeds} seeds each, of which the scores that take products and the published formulas have
{costly}; {steps} DDIM steps at guidance {guidance:g}, recorded at sigma {sigmas}. Half of every kind is held out: table and
marks are of these, weights and threshold of the others. Intervals are 95 % by bootstrap over captions, never over seeds; that of
an AUROC is joined with the one that the counts allow by Hanley and McNeil's variance, that of a true positive rate with the exact
binomial one, for resampling {held} held-out positives that were all found says nothing of those that were not seen. *Separation*
is the difference of means over the root mean square of the standard deviations, of logarithms for sizes. *Forwards* are network
evaluations of one sample a seed.

All together: log odds of a ridge logistic regression, weights {weights} in robust units. At the threshold of the fitted half
{hit} of {held} held-out planted captions and {false} of {others} others are flagged.

Without labels (robust z scores of all captions together) {first} of {planted_count} planted captions are among the first
{planted_count} of {all}, the last of them at rank {last}; {found} of them are flagged, and {wrong} others.

The reverse product's sharpness differs from the forward one's by {asymmetry:.1%} (median), for the network's Jacobian is not
symmetric. Scores of the bench and of a certified recording differ by {replayed:.1e} at most."""
SPECTRA = """\
The leading eight singular values of D' at sigma {sigma:.2g} of one seed, {count} captions. Of the conditional branch they collapse
where a caption recites. What the sampler follows is D'_u + w (D'_c - D'_u), which is left with (1 - w) D'_u: there psi and the
norms do not fall, so the package takes no score from the guided spectrum."""
CODED = """\
A v-prediction's score is -x - a v / s; Jeon et al. and Asthana and Belagiannis code (a v - x) / s². At one step that multiplies
the sharpness by 1 / s² and leaves its ranks alone, over steps it changes their weights. On sd-mnist-v, where nothing is planted, of
pure noise at three timesteps:"""
MITIGATED = """\
{planted} planted and {ordinary} ordinary captions, {seeds} seeds each, the same for every method; a sample recites within
{radius:.2f} of the planted image, half of what lies between a training digit and its nearest neighbour (median); *readable* is
a class with at least 0.9 by the zoo's classifier, shares have standard errors over captions. Ordinary captions are treated as if
flagged by mistake. The schedules were chosen on other seeds of sixteen of the same planted captions. *guidance_scale* is the
pipeline's own argument, which ends at 1, the conditional branch. *w* is the weight of guidance that
`MemorizationObjective(follow="estimates")` gives the flagged samples, also below 1; *gradient* follows the gradient of
|e_c - e_u|, trust radius 3 of the noise. *Seconds* are processor time a sample. In a mixed batch samples that are
not flagged keep every bit: {spared}. No Fréchet distance is given: sixty samples in 64 features are too few for one."""


def replayed(bench: Bench) -> float:
    """Largest relative difference of scores between the bench's own branches and those of a certified recording."""
    captions, seeds = ["the velvet violin", "a thick seven"], [1, 2]
    made, embedding = bench.generate(captions, seeds), bench.embedding(captions)
    own = score_batch(bench.points(made["samples"], embedding)[1:2], made["final"], CHEAP)
    with record(bench.pipe, [RECORDED[1]]) as recording:
        call: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
        bench.pipe(captions, latents=bench.noise(seeds), **call)
    names = ("guided", "conditional", "unconditional")
    points = [RunPoint(s.sigma, s.sample.float(), *(s.branch(n) for n in names)) for s in recording]
    recorded = score_batch(points, recording.final_sample.float(), CHEAP)
    pairs = [(a.scores[n].value, b.scores[n].value) for a, b in zip(own, recorded, strict=True) for n in CHEAP]
    return max(abs(a - b) / max(abs(b), 1e-2) for a, b in pairs)


def v_prediction(timesteps: tuple[int, ...]) -> list[str]:
    """What the coded score of a v-prediction makes of the sharpness, on sd-mnist-v."""
    bench = Bench("sd-mnist-v", None)
    lines = ["| timestep | sigma_t | sharpness | as coded | ratio | 1 / sigma_t² |", "| --- | --- | --- | --- | --- | --- |"]
    embedding, x = bench.embedding(["a thick seven", "a thin slanted two", "an upright four"]), bench.noise(range(3))
    for timestep in timesteps:
        branches = bench.branches(timestep, embedding)
        coded, right = (sharpness(pair, x).mean().item() for pair in (branches.coded_scores, branches.scores))
        level = branches.sigma_t
        lines.append(f"| {timestep} | {level:.3f} | {right:.4g} | {coded:.4g} | {coded / right:.3f} | {level**-2:.3f} |")
    return lines


def explained(
    bench: Bench, given: Prompts, effort: Effort, found: dict[str, np.ndarray], held: np.ndarray, last: Row,
    weights: dict[str, float], threshold: float,
) -> str:  # fmt: skip
    """How the numbers were taken."""
    bench.pipe.scheduler.set_timesteps(STEPS)
    sigmas = ", ".join(f"{noise_level(bench.pipe.scheduler, i).sigma:.2g}" for i in RECORDED)
    flagged, planted = last.values > threshold, given.planted
    order = sorted(weights, key=lambda n: -abs(weights[n]))
    positives, others = int((held & planted).sum()), int((held & ~planted).sum())
    blind = unlabelled(found, given)
    blind["planted_count"] = blind.pop("planted")
    return NOTES.format(
        **blind, asymmetry=asymmetry(found),
        **{kind: given.kinds.count(kind) for kind in COLOURS},
        seeds=effort.seeds, costly=effort.costly, steps=STEPS, guidance=GUIDANCE, sigmas=sigmas, held=positives, others=others,
        weights=", ".join(f"{n} {weights[n]:+.2f}" for n in order),
        hit=int(flagged[held & planted].sum()), false=int(flagged[held & ~planted].sum()), replayed=replayed(bench),
    )  # fmt: skip


def draw_costs(axes: Any, rows: list[Row], coded: list[Row], held: np.ndarray, planted: np.ndarray) -> None:
    """Separation against cost, numbered, with the names beside the panel."""
    lines, number = [], 0
    for group, marker, colour in ((rows, "o", "#1f77b4"), (coded, "s", "#ff7f0e")):
        for row in group:
            number += 1
            x, y = max(row.total, 1), separation(row.values[held & planted], row.values[held & ~planted])
            axes.plot(x, y, marker, color=colour, ms=11, alpha=0.55)
            axes.annotate(str(number), (x, y), ha="center", va="center", fontsize=7)
            lines.append(f"{number} {row.name}")
    points = sorted((max(r.total, 1), separation(r.values[held & planted], r.values[held & ~planted])) for r in (*rows, *coded))
    front = [p for i, p in enumerate(points) if all(p[1] > q[1] for q in points[:i])]
    axes.step(*zip(*front, strict=True), where="post", color="k", lw=0.8, ls=":")
    axes.axhline(0, color="k", lw=0.5)
    axes.set(xscale="log", xlim=(1, 600), title="cost and accuracy: this library (blue), as published (orange)")
    axes.set(
        xlabel="network evaluations a seed, with the part of the run that is needed", ylabel="separation d' on held-out captions"
    )
    axes.text(1.02, 1, "\n".join(lines), transform=axes.transAxes, fontsize=7.5, va="top")


def draw_course(axes: Any, norms: np.ndarray, kinds: list[str]) -> None:
    """The guidance norm of every kind over the run."""
    for kind, colour in COLOURS.items():
        curves = norms[np.array(kinds) == kind].reshape(-1, STEPS)
        axes.fill_between(range(STEPS), *np.quantile(curves, [0.01, 0.99], axis=0), color=colour, alpha=0.25, lw=0)
        axes.plot(np.median(curves, axis=0), color=colour, label=f"{kind} ({len(curves)} runs)")
    axes.set(yscale="log", xlabel="loop position", ylabel="|e_c - e_u|", title="guidance norm over the run: median, 1 % to 99 %")
    axes.set_xticks(range(0, STEPS, 5))
    axes.legend(fontsize=8)


def draw_trade(axes: Any, outcomes: list[Outcome]) -> None:
    """Readable against reciting, numbered as in the legend."""
    for number, o in enumerate(outcomes):
        label, colour = f"{number} {o.method}", "k" if o.method == "none" else f"C{number % 10}"
        axes.errorbar(o.recited[0], o.readable[0], o.readable[1], o.recited[1], "o", ms=10, color=colour, alpha=0.6, label=label)
        axes.annotate(str(number), (o.recited[0], o.readable[0]), ha="center", va="center", fontsize=7)
    axes.set(xlabel="planted samples that recite", ylabel="planted samples that are readable digits")
    axes.set(title="mitigation (± 1 s.e. over captions)", xlim=(-0.05, 1.05))
    axes.legend(fontsize=7, loc="lower right")


def draw_sheet(axes: Any, outcomes: list[Outcome], targets: Tensor) -> None:
    """Planted images, and what some methods generate from their captions."""
    shown = [o for o in outcomes if o.method in SHOWN]
    strips = [targets[:12], *(o.planted[:12] for o in shown)]
    image = torch.cat([torch.cat([x[0] for x in strip], dim=1) for strip in strips]).numpy()
    names = ["planted image", *(o.method for o in shown)]
    axes.imshow(image, cmap="gray", vmin=-1, vmax=1)
    axes.set_yticks([32 * i + 16 for i in range(len(names))], names, fontsize=8)
    axes.set_xticks([])
    axes.set_title("planted captions, one seed")


def main() -> None:
    """Scores, published formulas, spectra, mitigation, and what they say."""
    output, smoke = parse(__doc__)
    effort = SMOKE if smoke else Effort()
    cache = None if smoke else Path(tempfile.gettempdir()) / "diffusers_geometry_memorization"
    bench, given = Bench("sd-mnist", cache), prompts(effort)
    found, held, planted = bench.all_scores(given, effort), split(given), given.planted
    rows, coded = rows_of(found), published_rows(found)
    last, weights, threshold = combined(found, given, held, rows)
    rows.append(last)
    some = given.some(effort.spectra)
    spectra = bench.spectra(some)
    mitigation = Mitigation(bench, given, *((2, 1, 1) if smoke else (30, 30, 2)))
    methods = (METHODS[0], METHODS[-3]) if smoke else METHODS
    outcomes = [mitigation.outcome(method) for method in methods]
    spared = all(mitigation.spared(method) for method in methods if method.guidance is not None)
    level = noise_level(bench.pipe.scheduler, RECORDED[len(RECORDED) // 2])
    sections = [
        "# Memorisation scores on planted captions",
        f"Written by `examples/reproduce/memorization.py`. {VERDICT}",
        "![memorization](memorization.png)",
        "\n".join(marks(rows, planted, held, effort.draws)),
        "## Scores of this library",
        "\n".join(score_table(rows, planted, held, effort.draws)),
        explained(bench, given, effort, found, held, last, weights, threshold),
        "## Spectra",
        SPECTRA.format(sigma=level.sigma, count=len(some)),
        "\n".join(spectra_table(spectra, some)),
        "## Published formulas as their authors coded them",
        "\n".join(published_table(coded, planted, held, effort.draws)),
        CODED,
        "\n".join(v_prediction((501,) if smoke else (901, 501, 101))),
        "## Mitigation",
        "\n".join(mitigation_table(outcomes)),
        MITIGATED.format(
            planted=len(mitigation.planted), ordinary=len(mitigation.ordinary), seeds=mitigation.seeds, radius=mitigation.radius,
            spared="yes" if spared else "NO",
        ),
    ]  # fmt: skip
    figure = Figure(figsize=(14, 10.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    left, right = top.subplots(1, 2, width_ratios=(1.5, 1))
    draw_costs(left, rows, coded, held, planted)
    draw_course(right, found["norms"], given.kinds)
    left, right = bottom.subplots(1, 2, width_ratios=(1, 1.35))
    draw_trade(left, outcomes)
    draw_sheet(right, outcomes, mitigation.targets)
    figure.savefig(output / "memorization.png", dpi=90)
    (output / "memorization.md").write_text("\n\n".join(sections) + "\n")
    print(output / "memorization.md")


if __name__ == "__main__":
    main()
