"""Dimensions of the data manifold read from a Jacobian.

effective dimension   tr D': Σ l / (l + sigma²) for Gaussian data of variances l
gap dimension         position of the largest drop between neighbouring singular values of D'
normal bundle         n minus the position of the largest drop of the *score's* values (Algorithm 1 of
                      arXiv:2410.05898, after Stanczuk et al., arXiv:2212.12611): large values are normal directions there
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spectrum import Spectrum
from .estimate import Estimate


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

    The standard error is the jackknife's where the spectrum is random; a zero map has dimension 0.
    """

    def position(values: Tensor) -> float:
        return float(_drops(values, spectrum.complete).argmax() + 1) if values.max() > 0 else 0.0

    return spectrum.estimate(position)


def normal_bundle_dim(spectrum: Spectrum) -> Estimate:
    """n minus the number of singular values before the largest drop, for a score, whose large values are normal directions.

    Needs more values than normal directions: with fewer, the drop is not among them.
    """

    def tangent(values: Tensor) -> float:
        if len(values) < 2:
            raise ValueError(f"{len(values)} singular values. Expected at least 2 to find a drop.")
        return float(spectrum.shape[1] - ((values[:-1] - values[1:]).argmax() + 1))

    return spectrum.estimate(tangent)


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
