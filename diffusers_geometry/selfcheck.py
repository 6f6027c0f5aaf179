"""Known answers behind the user's own pipeline class and scheduler: does this installation measure what it should?

The pipeline's denoiser is replaced, on a private copy, by an exact linear manifold x_0 = F z with orthonormal F (d, m) and
z_i ~ N(0, v_i). Then everything is known in closed form: D' has the eigenvalues v_i / (v_i + sigma^2) and d - m zeros, psi is the
sum of their logarithms, FLIPD and the trace follow, and every sample ends on the manifold. Recording, engines, noise levels,
estimators and the sampler itself are run and compared. The user's own network is evaluated again at recorded points.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Recording, record
from .checks import Check, SelfCheck
from .descriptors import local_scaling
from .dimension import flipd, gap_dim
from .exact import LinearManifoldDenoiser
from .exact_network import CONVERSIONS, TIMESTEP_TOLERANCE, ExactNetwork, exact_network, shown_timestep
from .golub_kahan import golub_kahan_spectrum
from .precision import has_step_cache
from .recorded_step import RecordedStep
from .replay import predicted
from .schedule import noise_level
from .spectrum import dense_spectrum
from .stochastic import estimate_trace

__all__ = ["Check", "ExactNetwork", "SelfCheck", "exact_network", "selfcheck"]

DENSE = 1024  # dimensions up to which whole matrices are taken
TOLERANCE = 1e-3  # of eigenvalues in [0, 1] and of relative errors; float32 networks in epsilon form leave 1e-4


def selfcheck(pipe: Any, /, *args: Any, manifold_dim: int | None = None, **kwargs: Any) -> SelfCheck:
    """Puts a manifold of known geometry behind ``pipe``'s class and scheduler and measures it.

    Args:
        pipe: The pipeline; it is called with the arguments, as copies of it are, and left as it is.
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
    imitation = _imitate(pipe, recording, LinearManifoldDenoiser(basis, variances), args, kwargs)
    with record(imitation, 6) as recording:
        imitation(*args, **kwargs)
    checks += [*_reading(recording[0]), *_fresh(imitation, recording, args, kwargs)]
    for step in recording:
        checks += [*_noise_level(imitation.scheduler, step), _certificate("certificate", step)]
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
        check = _certificate("own network again", step)
        yield replace(check, failure=check.failure or step.note)


def _imitate(pipe: Any, recording: Recording, exact: LinearManifoldDenoiser, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A copy of the pipeline whose denoisers answer with ``exact``, in the sign that reaches the scheduler right."""
    scheduler, size = copy.deepcopy(pipe.scheduler), recording[0].sample[0].numel()
    made = [(step, call, predicted(call.output)) for step in recording for call in step.network_calls]
    made = [(step, call, output) for step, call, output in made if output is not None and output[0].numel() in (size, 2 * size)]
    found = {id(call.module): (type(call.output), output[0].numel() == 2 * size) for _, call, output in made}
    slots = [name for name, module in pipe.components.items() if id(module) in found]
    if not slots:
        raise ValueError(
            f"no network of {type(pipe).__name__} is given the scheduler's sample alone, so none can be replaced by a known one "
            "(a picture or a mask may stand in further channels). Expected a network that sees c_in x, as in text to image."
        )
    total = getattr(scheduler.config, "num_train_timesteps", 1000)
    shown = [(shown_timestep(call.args, call.kwargs), step.timestep) for step, call, _ in made]
    fitting = [c for c in CONVERSIONS if all(abs(c(t, total) - wanted) <= TIMESTEP_TOLERANCE * total for t, wanted in shown)]
    for sign in (1.0, -1.0):
        imitation = copy.copy(pipe)
        imitation.__dict__["scheduler"] = scheduler
        for name in slots:
            like = getattr(pipe, name)
            output_type, doubled = found[id(like)]
            options = {"output_type": output_type, "doubled": doubled, "conversion": fitting[0] if fitting else None}
            imitation.__dict__[name] = exact_network(exact, scheduler, like, sign=sign, **options)
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
    if getattr(scheduler.config, "invert_sigmas", False):  # Mochi's scheduler adds noise as if they were not
        return
    scheduler = copy.deepcopy(scheduler)
    scheduler.__dict__.update(_begin_index=step.index, _step_index=step.index)
    generator, timestep = torch.Generator().manual_seed(1), scheduler.timesteps[step.index : step.index + 1].repeat(4)
    x_0, noise = (torch.randn(4, 3, generator=generator) for _ in range(2))
    with suppress(NotImplementedError):
        add_noise = hasattr(scheduler, "add_noise")
        noisy = scheduler.add_noise(x_0, noise, timestep) if add_noise else scheduler.scale_noise(x_0, timestep, noise)
        error = (noisy - step.alpha_t * x_0 - step.sigma_t * noise).norm() / noisy.norm()
        yield Check("alpha x_0 + sigma noise", _where(step), 0.0, error.item(), 1e-4, "scheduler")


def _reading(step: RecordedStep) -> Iterator[Check]:
    """What the scheduler takes the prediction of a known x_0 for, in its first step: x_0 itself, or where the step must lead."""
    scheduler = copy.deepcopy(step.drive.scheduler)
    step.drive.restore(scheduler)
    generator = torch.Generator().manual_seed(2)
    x_0 = torch.rand(step.sample.shape, generator=generator, dtype=torch.float64) - 0.5  # within every clamp
    noise = torch.randn(step.sample.shape, generator=generator, dtype=torch.float64)
    x_t = step.alpha_t * x_0 + step.sigma_t * noise
    prediction = ((x_0 - step.level.a * x_t) / step.level.b).float()
    if str(getattr(scheduler.config, "variance_type", "")).startswith("learned"):
        prediction = torch.cat([prediction, torch.zeros_like(prediction)], dim=1)
    before = torch.get_rng_state()
    names = {"model_output": prediction, "timestep": step.drive.timestep, "sample": x_t.float()}
    if "old_pred_original_sample" in inspect.signature(scheduler.step).parameters:
        names |= {"old_pred_original_sample": None, "timestep_back": None}
    output = scheduler.step(**names)
    if isinstance(output, tuple):
        output = SimpleNamespace(prev_sample=output[0], pred_original_sample=output[1])
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


def _fresh(pipe: Any, recording: Recording, args: tuple, kwargs: dict[str, Any]) -> Iterator[Check]:
    """The noise levels are those of a new scheduler of diffusers' own class with the same configuration."""
    own = next(c for c in type(pipe.scheduler).__mro__ if c.__module__.startswith("diffusers."))
    twin = copy.copy(pipe)
    twin.__dict__["scheduler"] = own.from_config(pipe.scheduler.config)
    for name, component in pipe.components.items():
        if isinstance(component, ExactNetwork):
            network = copy.copy(component)
            network.scheduler, network._levels = twin.scheduler, {}
            twin.__dict__[name] = network
    first = recording[0].index - recording[0].drive.iteration
    with record(twin, [step.index - first for step in recording]) as fresh:
        twin(*args, **kwargs)
    for step, new in zip(recording, fresh, strict=True):
        error = math.hypot(step.alpha_t - new.alpha_t, step.sigma_t - new.sigma_t) / math.hypot(new.alpha_t, new.sigma_t)
        yield Check("noise level", _where(step), 0.0, error, 1e-4, f"new {own.__name__}")


def _end_sigma(scheduler: Any) -> float:
    """Noise that a run of the scheduler leaves in its final sample."""
    last = getattr(scheduler, "final_alpha_cumprod", None)
    if last is not None:
        return math.sqrt(max(0.0, 1 - float(last)) / float(last))
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and not getattr(scheduler.config, "invert_sigmas", False):
        return float(sigmas[-1])
    return 0.02 if type(scheduler).__name__ == "DDPMWuerstchenScheduler" else 0.0


def _certificate(what: str, step: RecordedStep) -> Check:
    """What the step's engine is certified to, or why it is refused."""
    try:
        return Check(what, _where(step), 0.0, step.certificate_error, TOLERANCE, step.engine)
    except (RuntimeError, ValueError) as refused:
        return Check(what, _where(step), 0.0, float("nan"), TOLERANCE, "-", str(refused))


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
    left = _end_sigma(recording.pipe.scheduler) * rows[0].numel() ** 0.5 / (rows.norm() / len(rows) ** 0.5)
    tolerance = 2e-3 + 1.5 * left.item()
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
