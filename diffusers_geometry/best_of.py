"""Best of N by the true psi, under a budget of Jacobian products.

    found = best_of(pipe, range(16), prompt="a thin seven", max_products=20_000, num_inference_steps=50)
    found.seeds[found.kept[0]], found.confirmed[0]

Every candidate's final sample x_0 is noised by the same K draws, x_t = alpha_ref x_0 + sigma_ref epsilon_k, and scored by its mean
psi at a fixed rank over them, with its standard error; D' is that of the candidate's own conditioning at the loop position whose
sigma is nearest to ``sigma_ref``.

The largest of N noisy scores is too large on average (the winner's curse). So the kept candidates are measured again with K fresh
noises, and that is the number to report. It is the control that any guidance has to beat: it needs no reward, and its price is
N - 1 generations thrown away.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .analyze import made_by
from .budget import NUM_SINGULAR_VALUES, PRODUCTS_PER_VALUE
from .capture import Recording, record
from .denoiser import Denoiser
from .descriptors import local_scaling
from .estimate import Estimate
from .golub_kahan import golub_kahan_spectrum
from .labels import DatasetRequest
from .precision import to_float32
from .recorded_step import Branch
from .spectrum import dense_spectrum
from .step_geometry import BatchEstimate

NUM_NOISES = 4
Method = Literal["auto", "dense", "golub_kahan"]


@dataclass(frozen=True, eq=False)
class BestOf:
    """Candidates, their scores and what they cost.

    Attributes:
        seeds: Of the candidates, (N,): each can be made again from its own.
        scores: psi of every candidate in nats, (N,), with the standard error over the noises.
        kept: Indices of the kept candidates, best first.
        confirmed: psi of the kept ones under fresh noises, free of the choice.
        samples: Final samples of the kept ones before any decoding, (keep, *dims).
        outputs: What the pipeline made of the kept ones (images, frames, ...).
        sigma: Noise at which psi was taken.
        psi_rank: Singular values it sums.
        num_noises: K.
        products: Jacobian products spent.
        seconds: Of generating and of scoring.
    """

    seeds: tuple[int, ...]
    scores: BatchEstimate
    kept: tuple[int, ...]
    confirmed: tuple[Estimate, ...]
    samples: Tensor
    outputs: list[Any]
    sigma: float
    psi_rank: int
    num_noises: int
    products: int
    seconds: tuple[float, float]

    def table(self) -> str:
        """One line per candidate, best first, then the cost."""
        best = sorted(range(len(self.seeds)), key=lambda i: self.kept.index(i) if i in self.kept else len(self.kept))
        lines = [f"{'seed':>10}  {f'psi at rank {self.psi_rank}, sigma {self.sigma:.3g}':>28}  fresh noises"]
        for i in best:
            again = str(self.confirmed[self.kept.index(i)]) if i in self.kept else ""
            lines.append(f"{self.seeds[i]:>10}  {f'{self.scores.value[i]:.4f} ± {self.scores.sem[i]:.2g}':>28}  {again}".rstrip())
        spent = f"{self.products} products; {self.seconds[0]:.3g} s of generating, {self.seconds[1]:.3g} s of scoring"
        return "\n".join([*lines, spent])


def best_of(
    pipe: Any,
    seeds: Sequence[int],
    *,
    prompt: str | None = None,
    class_label: int | None = None,
    keep: int = 1,
    lowest: bool = False,
    sigma_ref: float = 0.2,
    psi_rank: int = NUM_SINGULAR_VALUES,
    num_noises: int | None = None,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
    spectrum: Method = "auto",
    branch: Branch = "guided",
    batch_size: int = 4,
    **call: Any,
) -> BestOf:
    """Generates one candidate a seed and keeps those of largest (or lowest) true psi.

    Args:
        pipe: A diffusers pipeline that takes a list of generators.
        seeds: Of the candidates.
        prompt: Of a pipeline that takes one.
        class_label: Of a pipeline that takes one.
        keep: How many to return.
        lowest: Keep the lowest psi instead.
        sigma_ref: Noise sigma_t / alpha_t at which psi is taken; the nearest of the run's is used.
        psi_rank: Singular values that psi sums, the same for every candidate.
        num_noises: K, at least 2; by default 4, or as many as the budget pays for.
        max_products: Budget of all scoring, that of the fresh noises included.
        generator: Of the noises; a fixed seed by default.
        spectrum: "dense", "golub_kahan", or "auto" by dimension.
        branch: Of classifier-free guidance.
        batch_size: Candidates generated at once.
        **call: Other arguments of the pipeline's call.

    Raises:
        ValueError: an argument out of range, or a budget that does not pay for two noises; it says what would.
    """
    labels = None if class_label is None else (class_label,)
    prompts = None if prompt is None else (prompt,)
    request = DatasetRequest(prompts, labels, seeds, batch_size=batch_size, call=call)
    count = len(request.seeds)
    if not 1 <= keep <= count or not 0 < sigma_ref < math.inf or (num_noises is not None and num_noises < 2):
        raise ValueError(
            f"keep={keep}, sigma_ref={sigma_ref}, num_noises={num_noises}. Expected 1 <= keep <= {count} candidates, a positive "
            "noise and at least 2 draws, without which there is no standard error."
        )
    if spectrum not in get_args(Method):
        raise ValueError(f"spectrum={spectrum!r}. Expected one of {get_args(Method)}.")
    judge = _Judge(spectrum, psi_rank, count + keep, num_noises, max_products, generator or torch.Generator().manual_seed(0))
    sign, scores, best, start = -1.0 if lowest else 1.0, [], [], time.perf_counter()
    for unit in request.units:
        with record(pipe, "all") as recording:
            output = made_by(pipe(**request.arguments(unit)))
        with torch.inference_mode(False):
            found = _candidates(recording, output, len(unit), sigma_ref, branch)
            scores += [judge(c.denoiser, c.sample, first=True) for c in found]
        best += [(len(scores) - len(found) + i, c) for i, c in enumerate(found)]
        best = sorted(best, key=lambda pair: -sign * scores[pair[0]].value)[:keep]  # the others' networks and samples are let go
    with torch.inference_mode(False):
        confirmed = tuple(judge(c.denoiser, c.sample, first=False) for _, c in best)
    return BestOf(
        request.seeds, BatchEstimate.stack(scores), tuple(i for i, _ in best), confirmed,
        torch.stack([c.sample for _, c in best]), [c.output for _, c in best], best[0][1].denoiser.sigma, psi_rank,
        judge.num_noises, judge.products, (time.perf_counter() - start - judge.seconds, judge.seconds),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Candidate:
    sample: Tensor
    output: Any
    denoiser: Denoiser


def _candidates(recording: Recording, output: Any, count: int, sigma_ref: float, branch: Branch) -> list[_Candidate]:
    """The samples of a unit, each with its denoiser at the recorded noise nearest to ``sigma_ref``."""
    final = to_float32(recording.final_sample)
    step = min(recording, key=lambda s: abs(math.log(s.sigma / sigma_ref)) if s.alpha_t > 0 else math.inf)
    if len(step.sample) != count:
        raise ValueError(f"{len(step.sample)} samples for {count} runs. Expected one per run, num_images_per_prompt=1.")
    denoiser = step.branch(branch)
    return [_Candidate(final[i], output[i], denoiser.select(i)) for i in range(count)]


class _Judge:
    """psi of samples, over one set of noises for all candidates and another for those that are measured again."""

    def __init__(
        self,
        spectrum: str,
        psi_rank: int,
        measurements: int,
        num_noises: int | None,
        max_products: int | None,
        generator: torch.Generator,
    ) -> None:
        self.spectrum, self.psi_rank, self.measurements = spectrum, psi_rank, measurements
        self.num_noises, self.max_products, self.generator = num_noises, max_products, generator
        self.products, self.seconds = 0, 0.0
        self._noises: dict[bool, Tensor] = {}
        self._per_point = 0

    def __call__(self, denoiser: Denoiser, sample: Tensor, first: bool) -> Estimate:
        """Mean psi with its standard error over the noises; ``first`` says which set."""
        start = time.perf_counter()
        if not self._noises:
            self._prepare(sample)
        points = denoiser.alpha_t * sample + denoiser.sigma_t * self._noises[first]
        found = [self._psi(denoiser, x_t) for x_t in points]
        values, products = np.array([e.value for e in found]), sum(e.products for e in found)
        self.products += products
        self.seconds += time.perf_counter() - start
        sem, bias = values.std(ddof=1) / math.sqrt(len(values)), max(abs(e.bias) for e in found)
        return Estimate(float(values.mean()), float(sem), bias, all(e.converged for e in found), products)

    def _prepare(self, sample: Tensor) -> None:
        """The method, the number of noises that the budget pays for, and the noises."""
        size = sample.numel()
        if not 1 <= self.psi_rank <= size:
            raise ValueError(f"psi_rank={self.psi_rank}. Expected 1 <= psi_rank <= {size}, the numbers of one sample.")
        if self.spectrum == "auto":
            self.spectrum = "dense" if size <= PRODUCTS_PER_VALUE * self.psi_rank else "golub_kahan"
        self._per_point = size if self.spectrum == "dense" else min(PRODUCTS_PER_VALUE * self.psi_rank, 2 * size)
        cost, wanted = self._per_point * self.measurements, self.num_noises
        paid = math.inf if self.max_products is None else self.max_products // cost
        if paid < (wanted or 2):
            raise ValueError(
                f"max_products={self.max_products}. Expected at least {cost * (wanted or 2)}: {wanted or 2} noises for "
                f"{self.measurements} measurements of up to {self._per_point} products ({self.spectrum}). Take fewer seeds or a "
                "smaller psi_rank."
            )
        self.num_noises = wanted or min(paid, NUM_NOISES)
        for first in (True, False):
            drawn = torch.randn(self.num_noises, *sample.shape, generator=self.generator)
            self._noises[first] = drawn.to(sample)

    def _psi(self, denoiser: Denoiser, x_t: Tensor) -> Estimate:
        jacobian = denoiser.jacobian(x_t)
        if self.spectrum == "dense":
            return local_scaling(dense_spectrum(jacobian), rank=self.psi_rank)
        spectrum = golub_kahan_spectrum(
            jacobian, self.psi_rank, max_products=self._per_point, generator=torch.Generator().manual_seed(0)
        )
        return local_scaling(spectrum, rank=self.psi_rank)
