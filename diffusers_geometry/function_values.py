"""Spectra from function values: the two algorithms of arXiv:2410.05898.

Algorithm 1 (perturbation): columns f(x + sigma xi_i), xi_i ~ N(0, I), i = 1..N, centred and divided by sigma sqrt(N). For an
affine f with matrix J the columns are J xi_i / sqrt(N), so values compare with the dense ones, with a Marchenko-Pastur spread:
a k-fold value s becomes the range s (1 ± sqrt(k/N)). Uncentred columns contain the mean of f as a spurious extra direction.

Algorithm 2 (central differences): columns (f(x + h v_i) - f(x - h v_i)) / 2h along orthonormal v_i, see :mod:`.difference`. With
fewer than n directions these are the values of J V, which interlace those of J from below.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .difference import BatchedMap, evaluate
from .estimate import Estimate
from .spectrum import Spectrum, matrix_spectrum

JACKKNIFE_GROUPS = 10
RELATIVE_TOLERANCE = 2e-3  # of the largest value, within which central differences count as converged


def perturbation_columns(
    fn: BatchedMap,
    x: Tensor,
    sigma: float,
    *,
    num_samples: int,
    generator: torch.Generator,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1's columns as rows, f(x + sigma xi_i) / sigma (N, out), and the xi_i, (N, n)."""
    if num_samples < 2 or not sigma > 0:
        raise ValueError(f"num_samples={num_samples}, sigma={sigma}. Expected num_samples >= 2 and sigma > 0.")
    xi = torch.randn(num_samples, *x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
    return evaluate(fn, x + sigma * xi, chunk_size) / sigma, xi.flatten(1)


def perturbation_spectrum(columns: Tensor, xi: Tensor, *, centred: bool = True) -> Spectrum:
    """Algorithm 1: singular values of [f(x + sigma xi_i) / sigma]_i / sqrt(N).

    Args:
        columns: f(x + sigma xi_i) / sigma, one a row, shape (N, m), from :func:`perturbation_columns`.
        xi: The perturbations, shape (N, n).
        centred: Subtract the mean column (the published algorithm does not; see the module docstring).

    Returns:
        Values with jackknife replicates over groups of samples; the trace, for a square map, by Stein's identity
        E[xi · f(x + sigma xi)] / sigma = E[tr J].
    """
    columns, xi = columns.cpu().double(), xi.cpu().double()
    count, outputs = columns.shape
    groups = torch.arange(count) % min(JACKKNIFE_GROUPS, count)
    kept = min(count - int((groups == 0).sum()) - int(centred), outputs, xi.shape[1])
    replicates = torch.stack([_column_values(columns[groups != g], centred)[:kept] for g in groups.unique()])
    trace = None
    if outputs == xi.shape[1]:
        products = (xi * (columns - columns.mean(dim=0))).sum(dim=1) * count / (count - 1)
        trace = Estimate(products.mean().item(), (products.std() / math.sqrt(count)).item(), 0.0, products=count)
    return Spectrum(
        _column_values(columns, centred)[:kept],
        (outputs, xi.shape[1]),
        "perturbation",
        count,
        complete=kept == min(outputs, xi.shape[1]),
        restricted=kept < min(outputs, xi.shape[1]),
        trace=trace,
        replicates=replicates,
        samples=count,
    )


def _column_values(columns: Tensor, centred: bool) -> Tensor:
    """Singular values of the rows' matrix over sqrt(N), by its smaller Gram matrix where N is much the larger side."""
    if centred:
        columns = columns - columns.mean(dim=0)
    columns = columns / math.sqrt(len(columns))
    if len(columns) < 2 * columns.shape[1]:
        return torch.linalg.svdvals(columns)
    return torch.linalg.eigvalsh(columns.T @ columns).flip(0).clamp_min(0).sqrt()


def central_difference_spectrum(columns: Tensor, directions: Tensor, *, step: float, error: float = 0.0) -> Spectrum:
    """Algorithm 2: singular values of J V from columns J v_i.

    Args:
        columns: J v_i, one a row, shape (K, m), from :func:`central_difference_columns`.
        directions: The v_i, shape (K, n), orthonormal up to rounding.
        step: The step h.
        error: Estimated error of one column, from :func:`choose_step`.
    """
    columns, directions = columns.cpu().double(), directions.cpu().double()
    count, size = directions.shape
    bound = error * math.sqrt(count)
    if count == size:
        matrix = torch.linalg.solve(directions, columns).T
        found = matrix_spectrum(matrix, method="central_difference", products=count, bound=bound, step=step)
        accurate = (
            found.singular_values >= 0 if bound <= RELATIVE_TOLERANCE * found.singular_values[0] else found.singular_values < 0
        )
        return replace(found, converged=accurate)
    values, shape = torch.linalg.svdvals(columns), (columns.shape[1], size)
    bounds = torch.full_like(values, bound)
    return Spectrum(values, shape, "central_difference", count, complete=False, restricted=True, bounds=bounds, step=step)
