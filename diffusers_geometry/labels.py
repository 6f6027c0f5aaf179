"""Labels of what a pipeline visits: for a batch of (conditioning, seed) pairs, x_t at chosen steps with psi, nu and delta there.

psi is a sum of logarithms: over all singular values it is ruled by the many small ones, and those next to zero scatter most, by
what the network never learnt and by rounding. Its label is therefore psi at a fixed rank, the same for every sample, so that labels
compare (psi(cA) = psi(A) + R log c holds at equal R only). nu is that of the values in hand: all of a dense spectrum, else the R
largest.

delta counts the knots of the denoising network in a neighbourhood whose radius is a share of the noise, so that one network has one
delta behind every scheduler. Its directions are drawn, several times, which gives each label a standard error; psi and nu have
none, where a spectrum is exact, and psi has the bias of an iterative one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .batch_complexity import batch_complexity
from .budget import NUM_SINGULAR_VALUES, SpectrumMethod
from .capture import Recording, record
from .complexity import LEAST_DRAWS, local_complexity
from .denoiser import Denoiser, Map
from .descriptors import local_rank, local_scaling
from .estimate import Estimate
from .jacobian import Jacobian
from .precision import to_float32
from .probe import Probe, probe_generator
from .recorded_step import Branch, RecordedStep
from .spectrum import Spectrum, matrix_spectrum
from .stochastic import mean_estimate

FIELDS = ("x_t", "position", "alpha_t", "sigma_t", "conditioning", "seed", "psi", "psi_sem", "psi_bias", "nu", "nu_sem")
DELTA_FIELDS = ("delta", "delta_sem")
BATCHED_ROWS = 2**14  # rows of the Jacobians of a step that are in memory together
CERTIFYING_ROWS = 16  # of the Jacobian of a sample taken alone, spread over all
BATCH_AGREEMENT = 1e-3  # of the knots met: units that rounding moves across their knots
_METHODS = ("auto", "dense", "golub_kahan", "randomized")  # whose psi at a fixed rank has a known error


@dataclass(frozen=True)
class DatasetRequest:
    """What a dataset is of; a folder holds one.

    Attributes:
        prompts: Text prompts, or None; ``class_labels`` likewise; with neither the pipeline takes ``batch_size``.
        seeds: Of the generations; every conditioning is run with every seed.
        record_steps: Loop positions to label: a number of them, or which.
        psi_rank: Singular values that psi sums; None counts those above ``relative_threshold`` of the largest instead.
        spectrum: Method, as in ``analyze_geometry``; with ``max_products`` per label.
        delta_radius: Neighbourhood of delta, in units of the noise sigma_t per coordinate; None leaves delta out.
        delta_directions: k of delta, or as many as a sample has numbers.
        delta_draws: Draws of the directions, at least 4 for a standard error; a label takes 2 k evaluations of the network a draw.
        batch_size: Runs in one unit, made in one call of the pipeline.
        held_out: Share of the seeds that is kept from training.
        call: Other arguments of the pipeline's call.
    """

    prompts: tuple[str, ...] | None = None
    class_labels: tuple[int, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    record_steps: int | tuple[int, ...] = 8
    psi_rank: int | None = NUM_SINGULAR_VALUES
    relative_threshold: float = 1e-3
    spectrum: SpectrumMethod = "auto"
    max_products: int | None = None
    of: Map = "denoised"
    branch: Branch = "guided"
    delta_radius: float | None = 0.1
    delta_directions: int = 4
    delta_draws: int = LEAST_DRAWS
    batch_size: int = 16
    held_out: float = 0.1
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompts is not None and self.class_labels is not None:
            raise ValueError("prompts and class_labels are both given. Expected one of them, or neither.")
        for name in ("prompts", "class_labels", "seeds", "record_steps"):
            value = getattr(self, name)
            if isinstance(value, (Sequence, range)) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
            if isinstance(value, str) or value == () or (name == "seeds" and len(set(self.seeds)) != len(self.seeds)):
                raise ValueError(f"{name}={value!r}. Expected a non-empty sequence without repeats.")
        if self.spectrum not in _METHODS:
            raise ValueError(
                f"spectrum={self.spectrum!r}. Expected one of {_METHODS}, whose psi at a fixed rank has a known error."
            )
        if not 0 < self.held_out < 1 or self.batch_size < 1:
            raise ValueError(f"held_out={self.held_out}, batch_size={self.batch_size}. Expected 0 < held_out < 1, batch_size >= 1.")
        if self.delta_radius is not None and not 0 < self.delta_radius < math.inf:
            raise ValueError(f"delta_radius={self.delta_radius}. Expected a finite radius > 0, or None to leave delta out.")
        if self.delta_directions < 1 or self.delta_draws < LEAST_DRAWS:
            raise ValueError(
                f"delta_directions={self.delta_directions}, delta_draws={self.delta_draws}. Expected at least 1, and at least "
                f"{LEAST_DRAWS} draws for a standard error."
            )
        taken = sorted({"generator", "prompt", "class_labels", "batch_size"} & set(self.call))
        if taken:
            raise ValueError(f"call has {taken}. Expected prompts=, class_labels=, seeds= and batch_size= of the request instead.")

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the tensors of a shard."""
        return FIELDS if self.delta_radius is None else (*FIELDS, *DELTA_FIELDS)

    def delta_evaluations(self, size: int) -> int:
        """Evaluations of the network for the delta of one sample of so many numbers."""
        if self.delta_radius is None:
            return 0
        return 2 * self.delta_directions * self.delta_draws if self.delta_directions < size else 2 * size

    @property
    def conditionings(self) -> tuple[Any, ...]:
        """Prompts, class labels, or (None,)."""
        return self.prompts or self.class_labels or (None,)

    @property
    def units(self) -> list[list[tuple[int, int]]]:
        """Per unit its (conditioning's index, seed) pairs."""
        pairs = [(c, s) for s in self.seeds for c in range(len(self.conditionings))]
        return [pairs[i : i + self.batch_size] for i in range(0, len(pairs), self.batch_size)]

    def is_held_out(self, seed: int) -> bool:
        """Whether a seed belongs to the held-out split: evenly spread over the list, so that a part of it has its share too."""
        i = self.seeds.index(seed)
        return int((i + 1) * self.held_out) > int(i * self.held_out)

    def arguments(self, pairs: list[tuple[int, int]]) -> dict[str, Any]:
        """The pipeline call of a unit."""
        chosen = [self.conditionings[c] for c, _ in pairs]
        kind = "prompt" if self.prompts else "class_labels" if self.class_labels else None
        given = {"batch_size": len(pairs)} if kind is None else {kind: chosen}
        return given | self.call | {"generator": [torch.Generator().manual_seed(s) for _, s in pairs]}


def label_unit(pipe: Any, request: DatasetRequest, pairs: list, probe: Probe) -> tuple[dict[str, Tensor], float]:
    """The tensors of one unit, and the seconds its probes took."""
    steps = request.record_steps
    with record(pipe, steps) as recording:
        recording.run(steps if isinstance(steps, int) else len(set(steps)), **request.arguments(pairs))
    start = time.perf_counter()
    rows = list(_rows(recording, request, pairs, probe))
    seconds = time.perf_counter() - start
    tensors = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in request.fields}
    return tensors, seconds


def _rows(recording: Recording, request: DatasetRequest, pairs: list, probe: Probe) -> Iterator[dict[str, Any]]:
    """One labelled sample after another."""
    for step in recording:
        if len(step.sample) != len(pairs):
            raise ValueError(f"{len(step.sample)} samples for {len(pairs)} runs. Expected one per run, num_images_per_prompt=1.")
        denoiser = step.branch(request.branch)
        spectra = _batch_spectra(denoiser, step, request, probe) if probe.plan.method == "dense" else None
        deltas = _deltas(denoiser, step, request, pairs)
        for i, (conditioning, seed) in enumerate(pairs):
            x_t, generator = to_float32(step.sample[i]), probe_generator(step.index, conditioning, seed)
            spectrum = spectra[i] if spectra else probe(denoiser.select(i), x_t, x_t, generator).spectrum
            psi = local_scaling(spectrum, request.relative_threshold, request.psi_rank)
            nu = local_rank(spectrum)
            values = {"psi": psi.value, "psi_sem": psi.sem, "psi_bias": psi.bias, "nu": nu.value, "nu_sem": nu.sem}
            values |= {"delta": deltas[i].value, "delta_sem": deltas[i].sem} if deltas else {}
            level = {"alpha_t": step.alpha_t, "sigma_t": step.sigma_t}
            labels = {name: torch.tensor(value, dtype=torch.float64) for name, value in (values | level).items()}
            yield labels | {"x_t": x_t.cpu(), "position": step.index, "conditioning": conditioning, "seed": seed}


def _batch_spectra(denoiser: Denoiser, step: RecordedStep, request: DatasetRequest, probe: Probe) -> list[Spectrum] | None:
    """The dense spectra of all samples of a step from one backward pass for row k of all their Jacobians; None to take each alone.

    Taking the samples together is right where rows do not influence one another, which the first sample taken alone certifies, by
    some rows of its Jacobian. It is 1.6 times as fast for a network as small as the bundled one.
    """
    x_t, size = to_float32(step.sample), probe.plan.size
    if len(x_t) == 1 or step.engine != "replay" or len(x_t) * size > BATCHED_ROWS:
        return None
    canonical = denoiser.canonical_map(request.of)
    stacked = Jacobian(canonical, x_t, chunk_size=max(1, probe.chunk_size // len(x_t)), cancellation=denoiser.cancellation)
    basis = torch.eye(size, dtype=x_t.dtype, device=x_t.device).reshape(size, 1, *x_t.shape[1:]).expand(size, *x_t.shape)
    matrices = stacked.vjp(basis).flatten(2).transpose(0, 1)
    alone = denoiser.select(0).jacobian(x_t[0], request.of, chunk_size=probe.chunk_size)
    some = torch.linspace(0, size - 1, min(size, CERTIFYING_ROWS)).round().long()
    rows = alone.vjp(basis[some, 0]).flatten(1)
    if not (matrices[0][some] - rows).norm() <= 1e-4 * rows.norm():
        return None
    return [matrix_spectrum(m, method="dense", products=size, bound=alone.rounding) for m in matrices]


def _deltas(denoiser: Denoiser, step: RecordedStep, request: DatasetRequest, pairs: list) -> list[Estimate] | None:
    """delta of every sample of a step, None where it is not asked for.

    The samples are taken together where that gives the first one the knots that it has alone, draw by draw.
    """
    if request.delta_radius is None:
        return None
    x_t, radius = to_float32(step.sample), request.delta_radius * step.sigma_t
    options = {"num_directions": min(request.delta_directions, x_t[0].numel()), "num_draws": request.delta_draws}

    def drawn(i: int) -> torch.Generator:
        return probe_generator(step.index, *pairs[i], 1)  # psi's probes have the place without the 1

    def alone(i: int) -> Tensor:
        try:
            fn = denoiser.select(i).canonical_map("denoised")
            return local_complexity(fn, x_t[i : i + 1], radius, generator=drawn(i), **options).counts[:, 0, 0].sum(dim=-1)
        except RuntimeError as error:
            raise RuntimeError(f"delta of the labels: {error} Or leave delta out: delta_radius=None.") from error

    first, together = alone(0), None
    if len(x_t) > 1 and step.engine == "replay":
        generators = [drawn(i) for i in range(len(x_t))]
        together = batch_complexity(denoiser.canonical_map("denoised"), x_t, radius, generators=generators, **options)
    if together is None or ((together[:, 0] - first).abs() > 1 + BATCH_AGREEMENT * first).any():
        together = torch.stack([first, *(alone(i) for i in range(1, len(x_t)))], dim=1)
    products = request.delta_evaluations(x_t[0].numel())
    return [mean_estimate(own, products) if len(own) > 1 else Estimate(own.item(), products=products) for own in together.T]
