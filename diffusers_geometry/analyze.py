"""The one module that walks the whole street: record a run, take a spectrum at every recorded step, return the trace."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import __version__
from .capture import record
from .denoiser import MAPS, Denoiser, Map
from .precision import to_float32
from .recorded_step import Branch, Engine, RecordedStep
from .spectrum import (
    Spectrum,
    central_difference_columns,
    central_difference_spectrum,
    choose_step,
    matrix_spectrum,
    orthonormal_directions,
    perturbation_columns,
    perturbation_spectrum,
)
from .trajectory import GeometryTrace, StepGeometry

SpectrumMethod = Literal["auto", "dense", "perturbation", "central_difference"]
METHODS = ("auto", "dense", "perturbation", "central_difference")
MAX_DENSE = 4096  # inputs; a float32 matrix of 64 MiB


def analyze_geometry(
    pipe: Any,
    /,
    *args: Any,
    record_steps: int | Sequence[int] | Literal["all"] = 10,
    spectrum: SpectrumMethod = "auto",
    num_singular_values: int | None = None,
    of: Map = "denoised",
    branch: Branch = "guided",
    max_products: int | None = None,
    relative_threshold: float = 1e-3,
    psi_rank: int | None = None,
    phase_resolution: float = 0.1,
    centred: bool = True,
    probe_engine: Engine = "auto",
    probe_chunk_size: int = 32,
    probe_seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> GeometryTrace:
    """Runs ``pipe(*args, **kwargs)`` and takes the Jacobian of its denoiser at the points it visits.

    Args:
        pipe: A diffusers pipeline; it generates as always, with every argument passed through.
        *args: Arguments of the pipeline's call.
        record_steps: How many loop positions (spread over the run), which ones, or "all".
        spectrum: "dense" (exact), "perturbation" (Algorithm 1 of arXiv:2410.05898, at the final sample) or
            "central_difference" (Algorithm 2, at x_t); "auto" is dense, or says why it cannot be.
        num_singular_values: Keep only the largest ones in the trace; the descriptors see all that were computed.
        of: The map: "denoised" (D'), "score" ((D' - I) / sigma^2) or "epsilon" ((I - D') / sigma).
        branch: "guided" (what the sampler follows), "conditional" or "unconditional".
        max_products: Budget per recorded step and sample. Dense needs the dimension d; Algorithm 1 takes this many samples
            (default 4 d), Algorithm 2 this many directions (default d).
        relative_threshold: psi counts singular values above this share of the largest.
        psi_rank: psi counts this many instead, for comparing samples.
        phase_resolution: Delta of the phase rules.
        centred: Centre Algorithm 1's columns.
        probe_engine: "auto", "replay" or "drive", see :func:`~diffusers_geometry.capture.record`.
        probe_chunk_size: Products taken at once.
        probe_seed: Seed of every random probe.
        progress: Show a bar over the recorded steps.
        **kwargs: Arguments of the pipeline's call.

    Returns:
        The trace; phases and dimensions are read from D' whatever the map.

    Raises:
        ValueError: an argument out of range, an unknown scheduler, a budget that the method cannot meet.
        RuntimeError: a step that cannot be evaluated again.
        FloatingPointError: the network returned NaN or infinity.
    """
    _check(spectrum, of, num_singular_values, max_products, relative_threshold, psi_rank, phase_resolution)
    settings = {
        "record_steps": record_steps if isinstance(record_steps, (int, str)) else list(record_steps),
        "spectrum": spectrum, "num_singular_values": num_singular_values, "of": of, "branch": branch,
        "max_products": max_products, "relative_threshold": relative_threshold, "psi_rank": psi_rank,
        "phase_resolution": phase_resolution, "centred": centred, "probe_engine": probe_engine,
        "probe_chunk_size": probe_chunk_size, "probe_seed": probe_seed, **_provenance(pipe),
    }  # fmt: skip
    with record(pipe, record_steps, engine=probe_engine) as recording:
        output = pipe(*args, **kwargs)
    sizes = {len(step.sample) for step in recording}
    if len(sizes) != 1:
        raise ValueError(f"the recorded steps carry {sorted(sizes)} samples. Expected one batch size throughout the run.")
    probe = _Probe(spectrum, of, max_products, centred, probe_chunk_size)
    steps = []
    for step in tqdm(recording, desc="geometry", unit="step", disable=not progress):
        denoiser, pairs = step.branch(branch), []
        for sample in range(len(step.sample)):
            point = recording.final_sample[sample] if spectrum == "perturbation" else step.sample[sample]
            seed = np.random.SeedSequence([probe_seed, step.index, sample]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(seed))
            pairs.append(probe.spectra(denoiser.select(sample), point, generator))
        steps.append(_step_geometry(step, pairs, probe.backend, relative_threshold, psi_rank, num_singular_values))
    return GeometryTrace(tuple(steps), settings, _images(output))


class _Probe:
    """Takes the spectra of the chosen map and of D' at one point, by one method."""

    def __init__(self, method: str, of: Map, max_products: int | None, centred: bool, chunk_size: int) -> None:
        self.method, self.of, self.max_products = method, of, max_products
        self.centred, self.chunk_size = centred, chunk_size
        self.backend = "function_values"

    def spectra(self, denoiser: Denoiser, point: Tensor, generator: torch.Generator) -> tuple[Spectrum, Spectrum]:
        """(spectrum of the map, spectrum of D') from the same products."""
        point = to_float32(point)
        take = {"perturbation": self._perturbation, "central_difference": self._central_difference}.get(self.method, self._dense)
        return take(denoiser, point, generator)

    def _dense(self, denoiser: Denoiser, point: Tensor, generator: torch.Generator) -> tuple[Spectrum, Spectrum]:
        size = point.numel()
        budget = size if self.max_products is None else self.max_products
        if budget < size or (self.method == "auto" and size > MAX_DENSE):
            raise ValueError(
                f"a dense Jacobian of d={size} takes {size} products, more than "
                f"{f'max_products={budget}' if budget < size else f'the {MAX_DENSE} that auto allows'}. Expected a larger budget "
                "(spectrum='dense' to insist), or spectrum='central_difference' with max_products directions, at least twice "
                "the dimension you look for."
            )
        jacobian = denoiser.jacobian(point, self.of, chunk_size=self.chunk_size)
        matrix = jacobian.dense()
        self.backend = jacobian.backend
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        spectrum = matrix_spectrum(matrix, method="dense", products=size)
        if self.of == "denoised":
            return spectrum, spectrum
        return spectrum, matrix_spectrum(denoiser.as_denoised(matrix, identity, self.of), method="dense", products=size)

    def _central_difference(self, denoiser: Denoiser, point: Tensor, generator: torch.Generator) -> tuple[Spectrum, Spectrum]:
        fn = denoiser.canonical_map(self.of)
        count = min(self.max_products or point.numel(), point.numel())
        step, error = choose_step(fn, point, scale=denoiser.sigma_t, generator=generator)
        wanted = orthonormal_directions(point.shape, count, point, generator)
        columns, directions = central_difference_columns(fn, point, wanted, step, chunk_size=self.chunk_size)
        spectrum = central_difference_spectrum(columns, directions, step=step, error=error)
        columns, error = denoiser.as_denoised(columns, directions, self.of), error * denoiser.error_scale(self.of)
        return spectrum, central_difference_spectrum(columns, directions, step=step, error=error)

    def _perturbation(self, denoiser: Denoiser, clean: Tensor, generator: torch.Generator) -> tuple[Spectrum, Spectrum]:
        fn, x, sigma_t = denoiser.canonical_map(self.of), denoiser.alpha_t * clean, denoiser.sigma_t
        count = self.max_products or 4 * clean.numel()
        columns, xi = perturbation_columns(fn, x, sigma_t, num_samples=count, generator=generator, chunk_size=self.chunk_size)
        spectrum = perturbation_spectrum(columns, xi, centred=self.centred)
        points = x.flatten() / sigma_t + xi
        return spectrum, perturbation_spectrum(denoiser.as_denoised(columns, points, self.of), xi, centred=self.centred)


def _step_geometry(
    step: RecordedStep, pairs: list[tuple[Spectrum, Spectrum]], backend: str, threshold: float, rank: int | None, kept: int | None
) -> StepGeometry:
    return StepGeometry.from_spectra(
        [spectrum for spectrum, _ in pairs],
        [denoised for _, denoised in pairs],
        relative_threshold=threshold,
        rank=rank,
        num_singular_values=kept,
        index=step.index,
        timestep=step.timestep,
        alpha_t=step.alpha_t,
        sigma_t=step.sigma_t,
        engine=step.engine,
        certificate_error=step.certificate_error,
        refusal=step.refusal,
        backend=backend,
    )


def _images(output: Any) -> Any:
    """What the pipeline made: images, frames or audio, or the first item of a tuple."""
    for name in ("images", "frames", "audios"):
        if hasattr(output, name):
            return getattr(output, name)
    return output[0] if isinstance(output, (tuple, list)) else output


def _provenance(pipe: Any) -> dict[str, Any]:
    return {
        "pipeline": next((c.__name__ for c in type(pipe).__mro__ if c.__module__.startswith("diffusers.")), type(pipe).__name__),
        "model": str(getattr(pipe, "name_or_path", None) or "") or None,
        "scheduler": type(pipe.scheduler).__name__,
        "diffusers_geometry": __version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _check(
    method: str, of: str, kept: int | None, budget: int | None, threshold: float, rank: int | None, resolution: float
) -> None:
    """Refuses arguments before the pipeline runs."""
    if method not in METHODS:
        raise ValueError(f"spectrum={method!r}. Expected one of {METHODS}.")
    if of not in MAPS:
        raise ValueError(f"of={of!r}. Expected one of {MAPS}.")
    for name, value in (("num_singular_values", kept), ("max_products", budget), ("psi_rank", rank)):
        if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
            raise ValueError(f"{name}={value!r}. Expected a positive integer or None.")
    if budget is not None and method == "perturbation" and budget < 2:
        raise ValueError(f"max_products={budget} with spectrum='perturbation'. Expected at least 2 samples.")
    if not 0 <= threshold < 1:
        raise ValueError(f"relative_threshold={threshold}. Expected 0 <= relative_threshold < 1.")
    if not 0 < resolution < 0.5:
        raise ValueError(f"phase_resolution={resolution}. Expected 0 < phase_resolution < 0.5.")
