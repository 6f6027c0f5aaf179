"""Known answers behind the user's own pipeline class and scheduler: does this installation measure what it should?

The pipeline's denoiser is replaced, on a private copy, by an exact linear manifold x_0 = F z with orthonormal F (d, m) and
z_i ~ N(0, v_i). Then everything is known in closed form: D' has the eigenvalues v_i / (v_i + sigma^2) and d - m zeros, psi is the
sum of their logarithms, FLIPD and the trace follow, and every sample ends on the manifold. Recording, engines, noise levels,
estimators and the sampler itself are run and compared. The user's own network is evaluated again at recorded points.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Recording, record
from .descriptors import local_scaling
from .dimension import flipd, gap_dim
from .exact import LinearManifoldDenoiser
from .exact_network import ExactNetwork, exact_network
from .golub_kahan import golub_kahan_spectrum
from .precision import has_step_cache
from .recorded_step import RecordedStep
from .schedule import noise_level
from .spectrum import dense_spectrum
from .stochastic import estimate_trace

__all__ = ["Check", "ExactNetwork", "SelfCheck", "exact_network", "selfcheck"]

DENSE = 1024  # dimensions up to which whole matrices are taken
TOLERANCE = 1e-3  # of eigenvalues in [0, 1] and of relative errors; float32 networks in epsilon form leave 1e-4


@dataclass(frozen=True)
class Check:
    """One known answer beside the measured one.

    Attributes:
        what: The quantity.
        where: Loop position and noise level, or which component.
        known: In closed form.
        measured: By this installation.
        tolerance: Largest difference that passes.
        by: The engine or estimator.
        failure: Why nothing could be measured, or None.
    """

    what: str
    where: str
    known: float
    measured: float
    tolerance: float
    by: str
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the two agree; a NaN does not."""
        return self.failure is None and abs(self.measured - self.known) <= self.tolerance


@dataclass(frozen=True)
class SelfCheck:
    """All checks of one pipeline class with one scheduler; true when every one passed.

    Attributes:
        pipeline: Name of the class.
        scheduler: Name of the class.
        dimension: d of the manifold's space.
        manifold_dim: m.
        checks: In order.
    """

    pipeline: str
    scheduler: str
    dimension: int
    manifold_dim: int
    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        """What did not pass."""
        return [check for check in self.checks if not check.passed]

    def rows(self) -> list[dict[str, Any]]:
        """Every check as plain values; what could not be measured is None."""
        rows = [vars(check) | {"passed": check.passed} for check in self.checks]
        return [row | {"measured": None if math.isnan(row["measured"]) else row["measured"]} for row in rows]

    def table(self) -> str:
        """One line a check, and the verdict."""
        widths = [max(len(str(value)) for value in column) for column in zip(*self._cells(), strict=True)]
        lines = ["  ".join(str(v).ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in self._cells()]
        failures = [f"  {check.what}, {check.where}: {check.failure}" for check in self.checks if check.failure]
        verdict = "every answer is the known one" if self else f"{len(self.failed)} of {len(self.checks)} answers are wrong"
        about = f"a {self.manifold_dim}-dimensional manifold in {self.dimension} dimensions"
        return "\n".join([*lines, *failures, f"{self.pipeline} with {self.scheduler}, {about}: {verdict}."])

    def _cells(self) -> list[tuple[str, ...]]:
        head = ("check", "where", "known", "measured", "tolerance", "by", "verdict")
        rows = [
            (c.what, c.where, f"{c.known:.5g}", f"{c.measured:.5g}", f"{c.tolerance:.2g}", c.by, "pass" if c.passed else "FAIL")
            for c in self.checks
        ]
        return [head, *rows]


def selfcheck(pipe: Any, /, *args: Any, manifold_dim: int | None = None, **kwargs: Any) -> SelfCheck:
    """Puts a manifold of known geometry behind ``pipe``'s class and scheduler and measures it.

    Args:
        pipe: The pipeline; it is called three times with the arguments and left as it is.
        *args: Arguments of its call.
        manifold_dim: m, by default 8, or a quarter of d where that is less.
        **kwargs: Arguments of its call.

    Raises:
        ValueError: a pipeline that cannot be recorded, or whose network cannot be found.
    """
    with record(pipe, [0, -1]) as recording:
        pipe(*args, **kwargs)
    checks = [*_caches(pipe), *_evaluated_again(recording)]
    sample = recording[0].sample
    dim = sample[0].numel()
    manifold_dim = manifold_dim or max(1, min(8, dim // 4))
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, manifold_dim, generator=generator, dtype=torch.float64))[0]
    variances = torch.linspace(2.0, 0.5, manifold_dim, dtype=torch.float64)
    imitation = _imitate(pipe, recording[0], LinearManifoldDenoiser(basis, variances), args, kwargs)
    with record(imitation, 6) as recording:
        imitation(*args, **kwargs)
    checks += _reading(recording[0])
    for step in recording:
        checks += [*_noise_level(imitation.scheduler, step), *_engines(step)]
        if step.alpha_t > 0:
            checks += _geometry(step, variances, generator)
    checks += [_generation(recording, basis), *_dimension(recording[-1], recording, basis, variances)]
    names = {"pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__}
    return SelfCheck(**names, dimension=dim, manifold_dim=manifold_dim, checks=tuple(checks))


def _caches(pipe: Any) -> Iterator[Check]:
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module) and has_step_cache(module):
            why = "a step cache is on, so that what the sampler follows is not a function of the sample: call disable_cache()"
            yield Check("no step cache", name, 0, 1, 0, "hooks", why)


def _evaluated_again(recording: Recording) -> Iterator[Check]:
    """The user's own network gives its recorded output again."""
    for step in recording:
        try:
            engine, error, why = step.engine, step.certificate_error, step.note
        except (RuntimeError, ValueError) as refused:
            engine, error, why = "-", float("nan"), str(refused)
        yield Check("own network again", _where(step), 0.0, error, TOLERANCE, engine, why)


def _imitate(pipe: Any, step: RecordedStep, exact: LinearManifoldDenoiser, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A copy of the pipeline whose denoisers answer with ``exact``, in the sign that reaches the scheduler right."""
    scheduler, calls = copy.deepcopy(pipe.scheduler), step.network_calls
    outputs = {id(call.module): type(call.output) for call in calls}
    slots = [name for name, module in pipe.components.items() if id(module) in outputs]
    if not slots:
        raise ValueError(
            f"no network of {type(pipe).__name__} was called with its sample. Expected a denoiser among its components."
        )
    for sign in (1.0, -1.0):
        imitation = copy.copy(pipe)
        imitation.__dict__["scheduler"] = scheduler
        for name in slots:
            like = getattr(pipe, name)
            network = exact_network(exact, scheduler, like, sign=sign, output_type=outputs[id(like)])
            imitation.__dict__[name] = network
        with record(imitation, [0]) as recording:
            imitation(*args, **kwargs)
        first = recording[0]
        x_t = first.sample.double()
        wanted = (exact.denoised(x_t, first.alpha_t, first.sigma_t) - first.level.a * x_t) / first.level.b
        if (first.model_output.double() - wanted).norm() <= 0.5 * wanted.norm():
            return imitation
    raise ValueError(
        f"{type(pipe).__name__} changes what its network predicts by more than a sign before its scheduler sees it. Expected "
        "guidance of equal branches to leave a prediction as it is."
    )


def _where(step: RecordedStep) -> str:
    return f"step {step.index}, sigma {step.sigma:.3g}"


def _noise_level(scheduler: Any, step: RecordedStep) -> Iterator[Check]:
    """alpha x_0 + sigma epsilon as the scheduler itself adds noise."""
    add = getattr(scheduler, "add_noise", None) or getattr(scheduler, "scale_noise", None)
    if add is None or getattr(scheduler.config, "invert_sigmas", False):  # Mochi's scheduler adds noise as if they were not
        return
    generator = torch.Generator().manual_seed(1)
    x_0, noise = (torch.randn(4, 3, generator=generator) for _ in range(2))
    state = dict(scheduler.__dict__)
    scheduler.__dict__.update(_begin_index=step.index, _step_index=step.index)
    timestep = scheduler.timesteps[step.index : step.index + 1].repeat(4)
    with suppress(NotImplementedError):
        noisy = scheduler.scale_noise(x_0, timestep, noise) if not hasattr(scheduler, "add_noise") else add(x_0, noise, timestep)
        error = (noisy - step.alpha_t * x_0 - step.sigma_t * noise).norm() / noisy.norm()
        yield Check("alpha x_0 + sigma noise", _where(step), 0.0, error.item(), 1e-4, "scheduler")
    scheduler.__dict__.clear()
    scheduler.__dict__.update(state)


def _reading(step: RecordedStep) -> Iterator[Check]:
    """What the scheduler takes the prediction of a known x_0 for, in its first step: x_0 itself, or where the step must lead."""
    scheduler = copy.deepcopy(step.drive.scheduler)
    step.drive.restore(scheduler)
    generator = torch.Generator().manual_seed(2)
    x_0 = torch.rand(step.sample.shape, generator=generator, dtype=torch.float64) - 0.5  # within every clamp
    noise = torch.randn(step.sample.shape, generator=generator, dtype=torch.float64)
    x_t = step.alpha_t * x_0 + step.sigma_t * noise
    prediction = ((x_0 - step.level.a * x_t) / step.level.b).to(step.sample)
    before = torch.get_rng_state()
    output = scheduler.step(prediction, step.drive.timestep, x_t.to(step.sample))
    drew = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    read, wanted = getattr(output, "pred_original_sample", None), x_0
    if read is None and (drew or len(scheduler.timesteps) < step.index + 2):
        return
    if read is None:
        after = noise_level(scheduler, step.index + 1)
        read, wanted = output.prev_sample, after.alpha_t * x_0 + after.sigma_t * noise
    error = ((read.cpu().double() - wanted).norm() / wanted.norm()).item()
    tolerance = TOLERANCE * max(1.0, step.sigma_t / max(step.alpha_t, TOLERANCE) / 10)  # where float32 reads x_0 out of noise
    yield Check("scheduler reads x_0", _where(step), 0.0, error, tolerance, "scheduler")


def _engines(step: RecordedStep) -> Iterator[Check]:
    try:
        yield Check("certificate", _where(step), 0.0, step.certificate_error, TOLERANCE, step.engine, None)
    except (RuntimeError, ValueError) as refused:
        yield Check("certificate", _where(step), 0.0, float("nan"), TOLERANCE, "-", str(refused))


def _geometry(step: RecordedStep, variances: Tensor, generator: torch.Generator) -> Iterator[Check]:
    """The spectrum of D' and what is read from it, at one step."""
    kept = variances / (variances + step.sigma**2)
    where, m = _where(step), len(variances)
    try:
        jacobian = step.denoiser.select(0).jacobian(step.sample[0].float())
        by = step.engine
    except (RuntimeError, ValueError) as refused:
        yield Check("eigenvalues of D'", where, 0.0, float("nan"), TOLERANCE, "-", str(refused))
        return
    if jacobian.x.numel() <= DENSE:
        spectrum = dense_spectrum(jacobian)
        error = (spectrum.eigenvalues[:m] - kept).abs().max().item()
        rest = spectrum.eigenvalues[m:].abs().max().item() if spectrum.shape[0] > m else 0.0
        yield Check("eigenvalues of D'", where, 0.0, max(error, rest), TOLERANCE, f"{by}, dense")
        yield Check("asymmetry", where, 0.0, spectrum.asymmetry, TOLERANCE / kept.max().item(), f"{by}, dense")
        if kept.min() > 50 * TOLERANCE:
            psi = local_scaling(spectrum, rank=m)
            yield Check("psi", where, kept.log().sum().item(), psi.value, 0.02 * m, f"{by}, dense")
        if kept.min() > 0.5:
            yield Check("dimension by gap", where, m, gap_dim(spectrum).value, 0.0, f"{by}, dense")
    found = golub_kahan_spectrum(jacobian, m, tol=1e-3, generator=generator)
    error = (found.singular_values - kept).abs().max().item()
    yield Check("largest of D'", where, 0.0, error, 2 * TOLERANCE, f"{by}, golub_kahan")
    trace = estimate_trace(jacobian, num_products=min(4 * m + 8, jacobian.x.numel()), generator=generator)
    allowed = 5 * (trace.sem or 0.0) + TOLERANCE * max(1.0, kept.sum().item())
    yield Check("trace of D'", where, kept.sum().item(), trace.value, allowed, f"{by}, random")


def _generation(recording: Recording, basis: Tensor) -> Check:
    """The share of the final sample that left the manifold; schedulers that stop at sigma > 0 leave that much noise."""
    final, last = recording.final_sample.double(), recording[-1]
    rows = final.flatten(1)[: len(last.sample)]
    away = (rows - rows @ basis @ basis.T).norm() / rows.norm()
    left = last.sigma_t * rows[0].numel() ** 0.5 / (rows.norm() / len(rows) ** 0.5)
    tolerance = 1e-3 + (0.0 if left > 1 else min(0.1, left.item()))
    return Check("sample off the manifold", "final sample", 0.0, away.item(), tolerance, "the pipeline's loop")


def _dimension(step: RecordedStep, recording: Recording, basis: Tensor, variances: Tensor) -> Iterator[Check]:
    """FLIPD at the final sample, projected to the manifold, at the last recorded step."""
    if step.alpha_t == 0 or step.sample[0].numel() > DENSE:
        return
    coordinates = recording.final_sample[0].double().flatten() @ basis
    x_0 = (basis @ coordinates).reshape(step.sample[0].shape).float()
    power = variances + step.sigma**2
    known = (variances / power).sum() + (coordinates * step.sigma / power).square().sum()
    try:
        measured = flipd(step.denoiser.select(0), x_0)
        yield Check("FLIPD", _where(step), known.item(), measured.value, 0.01 * known.item() + 0.01, step.engine)
    except (RuntimeError, ValueError) as refused:
        yield Check("FLIPD", _where(step), known.item(), float("nan"), 0.0, "-", str(refused))
