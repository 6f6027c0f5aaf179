"""Labelled prompts of sd-mnist, their generations, and every score of them, a batch at a time and kept.

A run is recorded by the pipeline's own callback, and branches are the network itself with the caption's and the empty embedding:
the same numbers as ``record`` gives (the script checks that on one batch) without certifying every batch again.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memorization_published import FIRST, LOW, Branches, anisotropy_as_coded, cosine, flipd_as_coded, norms, sharpness
from runs import ZOO
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.append(str(ZOO))

from data import DIGIT_NAMES as DIGIT_NAMES
from data import all_captions, planted_phrases
from load import load_zoo
from shared import load_classifier as load_classifier

from diffusers_geometry import Denoiser, golub_kahan_spectrum
from diffusers_geometry.descriptors import local_rank, local_scaling
from diffusers_geometry.memorization import score_batch
from diffusers_geometry.memorization_scores import SPECTRUM_RANK, RunPoint
from diffusers_geometry.schedule import noise_level

STEPS, GUIDANCE = 20, 3.0
RECORDED = (0, 7, 14)  # loop positions, sigma 11, 2.4 and 0.7
CHEAP = ("guidance_norm", "guidance_shift", "anisotropy", "commitment", "sharpness_reverse")
COSTLY = ("sharpness", "flipd", "flipd_gap", "contraction")
FIRST_SEED = 1000
SPECTRUM_PRODUCTS = 48


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    planted: int = 30
    controls: int = 30
    ordinary: int = 310
    seeds: int = 4
    costly: int = 1
    spectra: tuple[int, int, int] = (30, 15, 30)
    draws: int = 1000
    batch: int = 12


@dataclass(frozen=True)
class Prompts:
    """Captions with what they are: "planted", "control" or "ordinary"."""

    captions: list[str]
    kinds: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def some(self, counts: tuple[int, int, int]) -> Prompts:
        """The first of every kind."""
        chosen: list[int] = []
        for kind, count in zip(("planted", "control", "ordinary"), counts, strict=True):
            members = [i for i, k in enumerate(self.kinds) if k == kind]
            chosen += members[:: max(1, len(members) // max(count, 1))][:count]
        return Prompts([self.captions[i] for i in chosen], [self.kinds[i] for i in chosen])

    @property
    def planted(self) -> np.ndarray:
        """Which are, (P,)."""
        return np.array([kind == "planted" for kind in self.kinds])


def reordered() -> list[str]:
    """Digit captions with their property words in another order, which no training image has: ordinary, and new."""
    found = []
    for caption in all_captions()[:270]:
        _, *words, digit = caption.split()
        for order in itertools.permutations(words):
            if list(order) != words:
                first = order[0]
                found.append(" ".join(["an" if first == "upright" else "a", *order, digit]))
    return found


def prompts(effort: Effort) -> Prompts:
    """Planted phrases, controls of the same form, and digit captions: every one there is, then reordered ones."""
    kinds = planted_phrases()
    ordinary = [*all_captions()[:270], *reordered()[:: max(1, len(reordered()) // 60)]]
    if effort.ordinary < 270:
        ordinary = ordinary[:: 270 // effort.ordinary]
    chosen = {
        "planted": [p["caption"] for p in kinds["planted"][: effort.planted]],
        "control": [p["caption"] for p in kinds["controls"][: effort.controls]],
        "ordinary": ordinary[: effort.ordinary],
    }
    return Prompts([c for captions in chosen.values() for c in captions], [k for k, captions in chosen.items() for _ in captions])


class Bench:
    """A model of the zoo with everything measured of it.

    Args:
        name: Of the model.
        cache: Folder for finished batches, or None.
    """

    def __init__(self, name: str, cache: Path | None) -> None:
        self.pipe = load_zoo(name)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.unet.requires_grad_(False)
        self.prediction = self.pipe.scheduler.config.prediction_type
        self.cache = None if cache is None else cache / name
        if self.cache is not None:
            self.cache.mkdir(parents=True, exist_ok=True)

    def kept(self, key: str, make: Any) -> dict[str, Tensor]:
        """What ``make()`` gives, computed once."""
        path = None if self.cache is None else self.cache / f"{key}.safetensors"
        if path is not None and path.exists():
            return load_file(path)
        made = make()
        if path is not None:
            save_file({k: v.contiguous() for k, v in made.items()}, path)
        return made

    @functools.cached_property
    def nothing(self) -> Tensor:
        """Embedding of the empty prompt, (1, tokens, width)."""
        return self.embedding([""])

    @torch.no_grad()
    def embedding(self, captions: Sequence[str]) -> Tensor:
        """(B, tokens, width)."""
        return self.pipe.encode_prompt(list(captions), "cpu", 1, False)[0]

    def generate(self, captions: Sequence[str], seeds: Sequence[int], guidance_scale: float = GUIDANCE) -> dict[str, Tensor]:
        """Runs of (caption, seed) rows.

        Returns:
            ``samples`` before the recorded steps (B, steps, *dims), the ``final`` ones (B, *dims), and ``norms`` of e_c - e_u at
            every step of the run (B, all steps), which cost nothing.
        """
        kept: dict[int, Tensor] = {}
        seen: list[Tensor] = []

        def after(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            kept[step + 1] = values["latents"].clone()
            return {}

        def watch(network: Any, args: Any, output: Any) -> None:
            unconditional, conditional = output[0].chunk(2)
            seen.append(norms(conditional - unconditional))

        kept[0] = self.noise(seeds)
        hook = self.pipe.unet.register_forward_hook(watch)
        try:
            call = {"output_type": "latent", "latents": kept[0].clone(), "callback_on_step_end": after}
            self.pipe(list(captions), num_inference_steps=STEPS, guidance_scale=guidance_scale, **call)
        finally:
            hook.remove()
        samples = torch.stack([kept[i] for i in RECORDED], dim=1)
        return {"samples": samples, "final": kept[STEPS], "norms": torch.stack(seen, dim=1)}

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """x_T of every seed, (B, *dims)."""
        size = self.pipe.unet.config.sample_size
        drawn = [torch.randn(4, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn) * self.pipe.scheduler.init_noise_sigma

    def outputs(self, timestep: Any, embedding: Tensor) -> Any:
        """Raw outputs of the network, (K B, *dims) -> the same, for captions' embeddings (B, tokens, width)."""

        def network(x: Tensor) -> Tensor:
            repeated = embedding.expand(len(x), -1, -1) if len(embedding) == 1 else embedding.repeat(len(x) // len(embedding), 1, 1)
            return self.pipe.unet(x, timestep, encoder_hidden_states=repeated).sample

        return network

    def level(self, timestep: int) -> tuple[float, float]:
        """(alpha_t, sigma_t) of a training timestep."""
        kept = self.pipe.scheduler.alphas_cumprod[timestep].double()
        return float(kept.sqrt()), float((1 - kept).sqrt())

    def points(self, samples: Tensor, embedding: Tensor) -> list[RunPoint]:
        """Run points of a batch, from its samples at the recorded steps (B, steps, *dims)."""
        self.pipe.scheduler.set_timesteps(STEPS)
        found = []
        for i, position in enumerate(RECORDED):
            level = noise_level(self.pipe.scheduler, position)
            options = {"alpha_t": level.alpha_t, "sigma_t": level.sigma_t, "prediction_type": self.prediction}
            timestep = self.pipe.scheduler.timesteps[position]
            fns = [self.outputs(timestep, e) for e in (self.nothing, embedding)]
            guided = functools.partial(_guided, *fns)
            unconditional, conditional, followed = (Denoiser.from_function(fn, **options) for fn in (*fns, guided))
            found.append(RunPoint(level.sigma, samples[:, i], followed, conditional, unconditional))
        return found

    def scores(self, captions: Sequence[str], seeds: Sequence[int], costly: Sequence[bool]) -> dict[str, Tensor]:
        """Everything of a batch of rows: finished samples, scores of the run (B,) and of its steps (B, steps), published formulas.

        Scores that take many products, and the published formulas, are of the ``costly`` rows alone, NaN in the others.
        """
        made, embedding, chosen = self.generate(captions, seeds), self.embedding(captions), torch.tensor(costly)
        found = {"final": made["final"], "norms": made["norms"]}
        few = {key: made[key][chosen] for key in ("samples", "final")}
        for names, rows, part in ((CHEAP, torch.ones_like(chosen), made), (COSTLY, chosen, few)):
            runs = score_batch(self.points(part["samples"], embedding[rows]), part["final"], names)
            for name in names:
                steps = torch.tensor([[s[name].value for s in run.steps] for run in runs])
                found[f"{name}/steps"] = _spread(steps, rows)
                found[name] = _spread(torch.tensor([run.scores[name].value for run in runs]), rows)
        coded = self.published(self.noise(seeds)[chosen], embedding[chosen])
        return found | {f"published/{name}": _spread(values, chosen) for name, values in coded.items()}

    def branches(self, timestep: int, embedding: Tensor) -> Branches:
        """Raw outputs of both branches at a training timestep."""
        fns = [self.outputs(timestep, e) for e in (self.nothing, embedding)]
        return Branches(lambda x: tuple(fn(x) for fn in fns), *self.level(timestep), self.prediction)

    def published(self, x: Tensor, embedding: Tensor) -> dict[str, Tensor]:
        """Formulas as coded and as they should be, at x_T (B, *dims)."""
        first, low = (self.branches(t, embedding) for t in (FIRST, LOW))
        with torch.no_grad():
            cosines = {f"cosine {name}": cosine(low.epsilons(x), per) for name, per in (("per pixel", True), ("whole", False))}
        return cosines | {
            "sharpness": sharpness(first.scores, x),
            "anisotropy as coded": anisotropy_as_coded(first, low, x),
            "flipd as coded": flipd_as_coded(first, x, GUIDANCE),
            "flipd with its Jacobian": flipd_as_coded(first, x, GUIDANCE, missing=False),
        }

    def spectra(self, given: Prompts) -> dict[str, np.ndarray]:
        """psi, nu and norms of the leading singular values of D' of the guided and the conditional branch, and tr D'_c, (P,).

        One seed, at the middle one of the recorded steps.
        """

        def one(index: int) -> dict[str, Tensor]:
            captions = given.captions[index : index + 1]
            made, embedding = self.generate(captions, [FIRST_SEED + 7 * index]), self.embedding(captions)
            point = self.points(made["samples"], embedding)[len(RECORDED) // 2]
            found = {}
            for name in ("guided", "conditional"):
                jacobian = getattr(point, name).jacobian(point.x_t[0])
                spectrum = golub_kahan_spectrum(jacobian, SPECTRUM_RANK, 1e-2, SPECTRUM_PRODUCTS)
                found[f"psi, {name}"] = local_scaling(spectrum, rank=SPECTRUM_RANK).value
                found[f"nu, {name}"] = local_rank(spectrum).value
                found[f"nuclear norm, {name}"] = float(spectrum.singular_values[:SPECTRUM_RANK].sum())
                found[f"spectral norm, {name}"] = float(spectrum.singular_values[0])
            run = score_batch([point], made["final"], ["effective_dimension"])[0]
            return {k: torch.tensor(v, dtype=torch.float64) for k, v in found.items()} | {
                "trace, conditional": torch.tensor(run.scores["effective_dimension"].value, dtype=torch.float64)
            }

        parts = [self.kept(f"spectra-{given.captions[i]}".replace(" ", "_"), functools.partial(one, i)) for i in range(len(given))]
        return {k: torch.stack([p[k] for p in parts]).numpy() for k in parts[0]}

    def all_scores(self, given: Prompts, effort: Effort) -> dict[str, np.ndarray]:
        """Of all prompts, (P, seeds, ...)."""
        found: list[dict[str, Tensor]] = []
        for first in range(0, len(given), effort.batch):
            captions = given.captions[first : first + effort.batch]
            rows = [
                (c, FIRST_SEED + 100 * (first + i) + s, s < effort.costly)
                for i, c in enumerate(captions)
                for s in range(effort.seeds)
            ]
            part = self.kept(
                f"scores-{len(given)}-{effort.seeds}-{effort.costly}-{first}",
                functools.partial(self.scores, *zip(*rows, strict=True)),
            )
            found.append({k: v.unflatten(0, (len(captions), effort.seeds)) for k, v in part.items()})
        return {k: torch.cat([f[k] for f in found]).numpy() for k in found[0]}


def _guided(unconditional: Any, conditional: Any, x: Tensor) -> Tensor:
    base = unconditional(x)
    return base + GUIDANCE * (conditional(x) - base)


def _spread(values: Tensor, rows: Tensor) -> Tensor:
    """Values of the chosen rows among all, NaN elsewhere."""
    found = torch.full((len(rows), *values.shape[1:]), torch.nan, dtype=torch.float64)
    found[rows] = values.double()
    return found
