"""How much a Jacobian changes over a small distance: the companion of local complexity for smooth networks.

A network of SiLU or GELU units has no knots that could be counted. What a knot does, it does everywhere and a little: it changes
the Jacobian. With v uniform on the unit sphere and r = neighborhood_radius sqrt(d), the radius of :mod:`.complexity`,

    variation = sqrt( E_v |J(x + r v) - J(x)|_F² / |J(x)|_F² )

is a measure of second order. For a quadratic map with second derivative H it is neighborhood_radius |H|_F / |J(x)|_F in any
dimension, since E_v |H v|_F² = |H|_F² / d.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .difference import BatchedMap
from .estimate import Estimate, jackknife_sem
from .jacobian import Jacobian
from .stochastic import RELATIVE_SEM, rademacher, small_sample

LEAST_PAIRS = 4  # of products: fewer give no standard error that can be used


def jacobian_variation(
    fn: BatchedMap,
    x: Tensor,
    neighborhood_radius: float,
    *,
    num_products: int = 64,
    generator: torch.Generator | None = None,
    chunk_size: int = 32,
) -> Estimate:
    """Relative change of the Jacobian over the radius of delta, root mean square over directions; see the module docstring.

    Each of n random directions has its own Rademacher probe w of the outputs: the mean of |(J(x + r v) - J(x))ᵀw|² over that of
    |J(x)ᵀw|² estimates the square.

    Args:
        fn: (K, *dims) -> (K, *out); samples must not influence one another.
        x: One point, shape (*dims), float32 or float64.
        neighborhood_radius: Distance per coordinate, in the unit of x.
        num_products: Reverse products, an even number from 8: one at x and one at the displaced point for each direction.
        generator: Directions and probes; a fixed seed by default.
        chunk_size: Products taken at once at x.

    Returns:
        The ratio, with jackknife standard error and bias (of a ratio and of a square root). Below about the square root of the
        rounding unit over the radius there is rounding.

    Raises:
        ValueError: budget or radius out of range, or a Jacobian that vanishes at x.
    """
    pairs = num_products // 2
    if pairs < LEAST_PAIRS or num_products % 2 or not 0 < neighborhood_radius < math.inf:
        raise ValueError(
            f"num_products={num_products}, neighborhood_radius={neighborhood_radius}. Expected an even number of at least "
            f"{2 * LEAST_PAIRS} products and a finite radius > 0."
        )
    generator = generator or torch.Generator().manual_seed(0)

    def point(p: Tensor) -> Tensor:
        return fn(p[None])[0]

    here = Jacobian(point, x, batched_fn=fn, chunk_size=chunk_size)
    probes = rademacher(pairs, here.value.shape, here.x, generator)
    steps = torch.randn(pairs, *x.shape, generator=generator, dtype=torch.float64, device=generator.device).cpu()
    steps *= neighborhood_radius * math.sqrt(x.numel()) / steps.flatten(1).norm(dim=1).reshape(-1, *[1] * x.ndim)
    pulled = here.vjp(probes)
    moved = torch.stack(
        [Jacobian(point, here.x + step, batched_fn=fn).vjp(w) for step, w in zip(steps.to(here.x), probes, strict=True)]
    )
    change, size = (v.flatten(1).cpu().double().square().sum(dim=1) for v in (moved - pulled, pulled))
    if not size.any():
        raise ValueError("the Jacobian vanishes at x. Expected a function that changes there: a relative variation needs one.")
    value = math.sqrt((change.sum() / size.sum()).item())
    left_out = ((change.sum() - change) / (size.sum() - size)).sqrt()
    sem = jackknife_sem(left_out.tolist()) * small_sample(pairs)
    bias = (pairs - 1) * (left_out.mean().item() - value)
    return Estimate(value, sem, bias, sem <= RELATIVE_SEM * value, 2 * pairs)
