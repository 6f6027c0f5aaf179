"""Dimensions of the data manifold read from a Jacobian.

effective dimension   tr D': Σ l / (l + sigma²) for Gaussian data of variances l
gap dimension         position of the largest drop between neighbouring singular values of D'
FLIPD                 tr D' + |D(x_0) - x_0|² / sigma² at the clean point: d + d log p_sigma / d log sigma (Kamkari et al.,
                      arXiv:2406.03537). At a noised point x_t it averages to d for every distribution, so it is never taken there
normal bundle         n minus the position of the largest drop of the *score's* values (Algorithm 1 of
                      arXiv:2410.05898, after Stanczuk et al., arXiv:2212.12611): large values are normal directions there
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .denoiser import Denoiser
from .difference import require_finite
from .estimate import Estimate
from .jacobian import Derivative
from .spectrum import Spectrum
from .stochastic import TraceMethod, estimate_trace


def spectral_gaps(spectrum: Spectrum) -> Tensor:
    """Drops between neighbouring singular values, on the linear scale, shape (k,).

    ``gaps[i]`` is the drop after the i+1 largest values; the last is the drop to zero for a complete spectrum, and zero for
    an incomplete one, where nothing is known of what follows.
    """
    return _drops(spectrum.singular_values, spectrum.complete)


def _drops(values: Tensor, complete: bool) -> Tensor:
    return values - torch.cat([values[1:], values.new_zeros(1) if complete else values[-1:]])


def gap_dim(spectrum: Spectrum) -> Estimate:
    """Number of singular values before the largest drop, for a map whose large values are kept directions (D', a decoder).

    The standard error is the jackknife's where the spectrum is random. A zero map has dimension 0; NaN says that no drop is in
    hand. Of an incomplete spectrum it is converged when no drop among the values not in hand can be larger: they all lie below the
    last one in hand.
    """

    def position(values: Tensor) -> float:
        drops = _drops(values, spectrum.complete)
        if not values.max() > 0:
            return 0.0
        return float(drops.argmax() + 1) if drops.max() > 0 else math.nan

    found = spectrum.estimate(position)
    largest = _drops(spectrum.singular_values, spectrum.complete).max()
    certain = spectrum.complete or bool(largest >= spectrum.singular_values[-1])
    return replace(found, converged=found.converged and certain)


def normal_bundle_dim(spectrum: Spectrum) -> Estimate:
    """n minus the number of singular values before the largest drop, for a score, whose large values are normal directions.

    Needs more values than normal directions: with fewer, the drop is not among them, and the number has not converged.
    """

    def tangent(values: Tensor) -> float:
        if len(values) < 2:
            raise ValueError(f"{len(values)} singular values. Expected at least 2 to find a drop.")
        return float(spectrum.shape[1] - ((values[:-1] - values[1:]).argmax() + 1))

    found, values = spectrum.estimate(tangent), spectrum.singular_values
    certain = spectrum.complete or bool((values[:-1] - values[1:]).max() >= values[-1])
    return replace(found, converged=found.converged and certain)


def effective_dimension(spectrum: Spectrum) -> Estimate:
    """tr D' of a spectrum of the denoiser's Jacobian D' that knows its trace (dense, complete differences, perturbation).

    Raises:
        ValueError: the spectrum has no trace (a map that is not square, or a restriction to fewer directions).
    """
    if spectrum.trace is None:
        raise ValueError(
            f"a {spectrum.method} spectrum of shape {spectrum.shape} with {len(spectrum.singular_values)} values has no "
            "trace. Expected a dense one, all directions, or the perturbation method."
        )
    return spectrum.trace


def flipd(
    denoiser: Denoiser,
    x_0: Tensor,
    *,
    num_products: int | None = None,
    method: TraceMethod = "auto",
    generator: torch.Generator | None = None,
    chunk_size: int = 32,
    derivative: Derivative = "autograd",
) -> Estimate:
    """Local intrinsic dimension at a clean point, tr D' + |D(x_0) - x_0|² / sigma², in directions.

    Args:
        denoiser: At the noise level sigma that sets the scale of the question; of one sample.
        x_0: The clean point, shape (*dims), in the scheduler's scale of x_0 (a latent for a latent model).
        num_products: Budget of the trace; by default d, which is exact.
        method: How the trace is estimated, see :func:`~diffusers_geometry.stochastic.estimate_trace`.
        generator: Its probes; a fixed seed by default.
        chunk_size: Products taken at once.
        derivative: "autograd", or "difference" for a black box.

    Returns:
        The estimate; 0 at alpha_t = 0 (sigma = infinity), where every direction looks flat.

    References:
        A Geometric View of Data Complexity (Kamkari et al., 2024), https://arxiv.org/abs/2406.03537
    """
    if denoiser.alpha_t == 0:
        return Estimate(0.0)
    point = denoiser.alpha_t * x_0
    jacobian = denoiser.jacobian(point, chunk_size=chunk_size, derivative=derivative)
    trace = estimate_trace(jacobian, num_products=num_products or x_0.numel(), method=method, generator=generator)
    with torch.no_grad():
        moved = require_finite(denoiser.denoised(point[None])[0] - x_0, "the denoised clean point")
    return replace(trace, value=trace.value + (moved.cpu().double().norm() / denoiser.sigma).item() ** 2)
