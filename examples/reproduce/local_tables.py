"""The tables of the study of images: numbers to Markdown."""

from __future__ import annotations

from typing import Any

from arguments import took
from delta_stability import COMPARED_K, DRAWS, RADII, settings_of, stability
from local_probe import DESCRIPTORS, DIRECTIONS, PRODUCTS, RADIUS
from resampling import interval, spearman

LETTERS = {"psi": "ψ", "nu": "ν", "delta": "δ", "variation": "change of D'"}
SIMPLE = ("file size", "edge density", "denoising error")


def named(score: str) -> str:
    """How a score is called in tables and figures."""
    return LETTERS.get(score, {"nearest": "nearest training image"}.get(score, score))


def rows(head: list[str], body: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]


def report(measured: dict[str, Any], verdict: str) -> list[str]:
    lines = ["# Local geometry of images", "", f"Written by `examples/reproduce/local_geometry.py`. {verdict}", ""]
    lines += [*what_was_taken(), "", *complexity(measured), "", *ranking(measured), "", *steadiness(measured), ""]
    if measured.get("compared"):
        lines += [*data_sets(measured), ""]
    return [*lines, *spoiling(measured), "", took(seconds(measured)), ""]


def what_was_taken() -> list[str]:
    return [
        "Every image x is looked at as αx + σε at noise 0.144, under draws ε, directions and probes that are the same for every "
        "image. ψ sums the largest quarter of the singular values of D' (16 of 64 for the digits, 192 of 768 for the emoji), in "
        f"nats; ν is of all of them; δ is the share of knots that {DIRECTIONS} directions meet at a radius of {RADIUS:g} √d, a "
        "proxy, since the networks are of SiLU; the change of D' over that radius is its companion for smooth networks, from "
        f"{PRODUCTS} products. The file is a PNG in the grey levels of the data, edge density the mean Sobel gradient, denoising "
        "error that of D at the same points. Brackets are 95 % bootstrap intervals over images.",
    ]


def complexity(measured: dict[str, Any]) -> list[str]:
    made, reliable = measured["generated"], measured["reliability"]
    lines = [f"## {len(made.images):,} generated digits", "", "![joint distribution](local_geometry_pairs.png)", ""]
    body = []
    for name in DESCRIPTORS:
        values = made.scores[name]
        cells = [named(name), f"{values.mean():.4g}", f"{values.std(ddof=1):.2g}", f"{reliable[name]:.2f}"]
        body.append(cells + [str(interval(spearman, values, made.scores[s])) for s in SIMPLE])
    lines += rows(["digits", "mean", "s.d.", "between two draws", *SIMPLE], body)
    lines += ["", "*Columns of simple measures, and between two draws of ε: Spearman's correlation.*"]
    if "emoji" in measured:
        sets = measured["emoji"]
        body = []
        for name in DESCRIPTORS:
            own = sets["all groups"].scores
            body.append([named(name), *(str(interval(spearman, own[name], own[s])) for s in SIMPLE)])
        lines += ["", *rows([f"{len(sets['all groups'].images)} real emoji, one draw", *SIMPLE], body)]
    body = [
        [str(rank), *(str(interval(spearman, values, made.scores[s])) for s in ("psi", *SIMPLE))]
        for rank, values in measured["ranks"].items()
    ]
    return [*lines, "", *rows(["ψ of digits over the largest", "ψ above", *SIMPLE], body)]


def ranking(measured: dict[str, Any]) -> list[str]:
    scores = measured["generated"].scores
    found = {name: interval(spearman, measured["reward"], scores[name]) for name in (*DESCRIPTORS, *SIMPLE)}
    said = ", ".join(f"{named(name)} {value}" for name, value in found.items())
    return [
        "## Ranked by ψ and by the reward", "", "![contact sheet](local_geometry_sheet.png)", "",
        "The reward of the guidance study reads ψ off the noisy sample at its own smallest noise, 0.209, and was trained on other "
        f"seeds. Spearman of its ranking with: {said}.",
    ]  # fmt: skip


def steadiness(measured: dict[str, Any]) -> list[str]:
    lines = ["## δ against radius and directions", "", "![delta](local_geometry_delta.png)", ""]
    head = ["model", "radius / √d", "share of knots met", f"Spearman with radius {RADIUS:g}", "between halves of the draws"]
    body = []
    for name, sweep in measured["radii"].items():
        settings = settings_of(sweep)
        for radius, own, (value, half) in zip(RADII, settings, stability(settings, RADII.index(RADIUS)), strict=True):
            body.append([f"{name}, {len(own)} images", f"{radius:g}", f"{own.mean():.4f}", str(value), f"{half:.2f}"])
    lines += [*rows(head, body), ""]
    settings = {k: settings_of(sweep)[0] for k, sweep in measured["directions"].items()}
    axes = max(settings)
    found = stability(list(settings.values()), list(settings).index(COMPARED_K))
    body = [
        [f"{k}" + (" (axes)" if k == axes else ""), f"{own.mean():.4f}", str(value), "" if k == axes else f"{half:.2f}"]
        for (k, own), (value, half) in zip(settings.items(), found, strict=True)
    ]
    lines += rows(
        ["directions k, digits", "share of knots met", f"Spearman with k = {COMPARED_K}", "between halves of the draws"], body
    )
    note = (
        f"*{DRAWS} draws of directions, common to all images, at one draw of ε; over radii k = {COMPARED_K}, over k the radius is "
        f"{RADIUS:g} √d.*"
    )
    return [*lines, "", note]


def data_sets(measured: dict[str, Any]) -> list[str]:
    sets, found = measured["emoji"], measured["compared"]
    count = len(sets["all groups"].images)
    lines = [f"## One group of emoji against all: {count} images each, 16x16, noise 0.144", ""]
    head, body = ["score"], []
    for name in found:
        head += [f"{name}: mean less that of all, s.d.", "spread over that of all"]
    for score in next(iter(found.values())):
        cells = [named(score)]
        for name in found:
            difference, ratio = found[name][score]
            cells += [str(difference), ratio.unsigned]
        body.append(cells)
    lines += rows(head, body)
    variances = ", ".join(f"{name} {own.images.flatten(1).var(0).mean():.3f}" for name, own in sets.items())
    note = (
        f"*Groups: the two that vary least; variance per pixel of the images here: {variances}. Differences are in standard "
        "deviations of the set of all groups; the spread is the standard deviation over that of all groups.*"
    )
    return [*lines, "", note]


def spoiling(measured: dict[str, Any]) -> list[str]:
    found, (whole, _) = measured["separation"], measured["spoiled"]
    scores = list(next(iter(found.values())).areas)
    lines = [f"## {len(whole.images)} unseen digits against spoiled copies", "", "![separation](local_geometry_separation.png)", ""]
    body = [[kind, *(result.areas[s].unsigned for s in scores)] for kind, result in found.items()]
    lines += [*rows(["area under ROC", *(named(s) for s in scores)], body), ""]
    body = [[kind, named(r.descriptor), named(r.baseline), str(r.gain), verdict_on(r.gain)] for kind, r in found.items()]
    lines += rows(["best on the first half", "descriptor", "baseline", "its gain on the other half", "so the descriptor is"], body)
    note = (
        "*The direction of every score, and which is best, are chosen on one half of the images and tested on the other; below 0.5 "
        "the direction did not hold. The mean distance of a spoiled copy from its original, per pixel: "
        + ", ".join(f"{kind} {size:.2f}" for kind, size in lengths(measured).items()) + ".*"
    )  # fmt: skip
    return [*lines, "", note]


def verdict_on(gain: Any) -> str:
    """What an interval of a difference allows to say."""
    if not gain.is_nonzero:
        return "no better, no worse"
    return "better" if gain.low > 0 else "worse"


def lengths(measured: dict[str, Any]) -> dict[str, float]:
    """Root mean square change per pixel."""
    whole, copies = measured["spoiled"]
    return {kind: float((copy.images - whole.images).square().mean().sqrt()) for kind, copy in copies.items()}


def seconds(measured: dict[str, Any]) -> float:
    """Processor time of all that was looked at, whenever that was."""
    seen = [measured["generated"], *measured.get("emoji", {}).values(), measured["spoiled"][0], *measured["spoiled"][1].values()]
    sweeps = [*measured["radii"].values(), *measured["directions"].values()]
    return float(sum(found["seconds"].sum() for found in [*(own.found for own in seen), *sweeps]))
