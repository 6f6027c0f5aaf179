"""Trace and Frobenius norm of a Jacobian from random products.

Trace. Rademacher probes w give tr J = E wᵀJw with variance 2 (|S|_F² - Σ S_ii²), S the symmetric part (Hutchinson; a Gaussian w
does not spare the diagonal). XTrace (Epperly, Tropp and Webber, 2024) projects J on the range of all other images JΩ and takes
the trace there exactly, leaving one probe out in turn: m probes cost 2m products and are nearly exact once m exceeds the rank.
D' has a rank near the manifold's dimension; epsilon and the score, D' with the identity mixed in, have none, so it is used on D'.

Where the budget reaches the dimension both are exact, with sem = 0. Other functions of the spectrum: :mod:`.quadrature`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from .estimate import Estimate
from .jacobian import Jacobian

TraceMethod = Literal["rademacher", "xtrace", "auto"]
XTRACE_CORRECTION = 1.4  # leave-one-out estimates overlap; benchmarks/trace.py prints the ratio of true to raw error
XTRACE_BUDGET = 3  # auto takes XTrace for a budget of more than this times the estimated trace (DESIGN section 4)
XTRACE_LEAST = 16  # products below which auto does not take it
RELATIVE_SEM = 0.05  # of the value, or of 1 where it is smaller: the standard error at which a trace has converged
PILOT_PROBES = 8


def rademacher(count: int, shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    """``count`` probes of independent signs, (count, *shape), on the device and in the dtype of ``like``."""
    signs = torch.randint(0, 2, (count, *shape), generator=generator, device=generator.device) * 2 - 1
    return signs.to(like)


def estimate_trace(
    jacobian: Jacobian,
    *,
    num_products: int,
    method: TraceMethod = "auto",
    generator: torch.Generator | None = None,
) -> Estimate:
    """tr J of a square Jacobian.

    Args:
        jacobian: Reverse products are taken where there are any (they are the cheaper), else forward products.
        num_products: Budget, at least 4 ("xtrace": 8, an odd one is left). From the dimension on the trace is exact.
        method: "rademacher"; "xtrace" for a J of low effective rank such as D'; "auto" starts with 8 Rademacher probes and
            goes on with XTrace when the budget exceeds 3 x the trace they estimate (for D', its effective dimension).
        generator: The probes; a fixed seed by default.

    Raises:
        ValueError: J is not square, or the budget is too small.

    References:
        XTrace: Making the Most of Every Sample in Stochastic Trace Estimation (Epperly, Tropp, Webber, 2024), Algorithm 1.1
    """
    rows, columns = jacobian.shape
    if rows != columns:
        raise ValueError(f"a Jacobian of shape {(rows, columns)} has no trace. Expected a square one.")
    least = 8 if method == "xtrace" else 4
    if method not in get_args(TraceMethod) or num_products < min(least, rows):
        raise ValueError(
            f"method={method!r}, num_products={num_products}. Expected one of {get_args(TraceMethod)}, at least {least} products."
        )
    generator = generator or torch.Generator().manual_seed(0)
    if num_products >= rows:
        matrix = jacobian.dense()
        bias = math.sqrt(rows) * jacobian.rounding(0.0)
        return Estimate(matrix.diagonal().cpu().double().sum().item(), bias=bias, products=rows)
    pilot = num_products if method == "rademacher" else max(2, min(PILOT_PROBES, num_products // 2))
    probes = rademacher(pilot, jacobian.x.shape, jacobian.x, generator)
    images = _apply(jacobian, probes)
    quadratic = (probes.flatten(1).cpu().double().T * images).sum(dim=0)
    dimension = quadratic.mean().item()
    if method == "rademacher" or (method == "auto" and num_products <= max(XTRACE_LEAST, XTRACE_BUDGET * abs(dimension))):
        if pilot < num_products:
            more = rademacher(num_products - pilot, jacobian.x.shape, jacobian.x, generator)
            quadratic = torch.cat([quadratic, (more.flatten(1).cpu().double().T * _apply(jacobian, more)).sum(dim=0)])
        return mean_estimate(quadratic, len(quadratic), jacobian.step_error * rows**0.5)
    count = num_products // 2
    more = rademacher(count - pilot, jacobian.x.shape, jacobian.x, generator)
    images = torch.cat([images, _apply(jacobian, more)], dim=1)
    return _xtrace(jacobian, torch.cat([probes, more]).flatten(1).cpu().double().T, images)


def _apply(jacobian: Jacobian, probes: Tensor) -> Tensor:
    """J or Jᵀ (which have one trace) of a stack of probes, as columns in float64."""
    product = jacobian.vjp if jacobian.has_reverse else jacobian.jvp
    return product(probes).flatten(1).cpu().double().T


def mean_estimate(samples: Tensor, products: int, bias: float = 0.0, correction: float = 1.0) -> Estimate:
    """The mean of independent samples; it has converged when its standard error is below 5 % of it, or of 1."""
    value = samples.mean().item()
    sem = correction * samples.std().item() / math.sqrt(len(samples)) * small_sample(len(samples))
    return Estimate(value, sem, bias, sem <= RELATIVE_SEM * max(abs(value), 1.0), products)


def small_sample(count: int) -> float:
    """Standard deviation of Student's t with ``count`` - 1 degrees of freedom: an error estimated from few samples is unsure."""
    return math.sqrt((count - 1) / (count - 3))


def _xtrace(jacobian: Jacobian, probes: Tensor, images: Tensor) -> Estimate:
    """The exchangeable estimate from m probes Ω and their images JΩ, both (n, m); takes m more products.

    Estimate i is tr(Q_iᵀ J Q_i) + w_iᵀ(I - Q_i Q_iᵀ) J (I - Q_i Q_iᵀ) w_i with Q_i = orth(JΩ without column i), and
    Q_i Q_iᵀ = Q (I - t_i t_iᵀ) Qᵀ for t_i the normalised columns of R^-T, JΩ = QR.
    """
    count, bias = probes.shape[1], jacobian.step_error * math.sqrt(probes.shape[1])
    if torch.linalg.matrix_rank(probes) < count:  # few dimensions: signs repeat, and there is nothing to leave out
        return mean_estimate((probes * images).sum(dim=0), count, bias)
    q, r = torch.linalg.qr(images)
    diagonal = r.diagonal().abs()
    is_exhausted = not (diagonal > 1e-12 * diagonal.max()).all() or not diagonal.any()
    if is_exhausted:  # J has lower rank than there are probes, and tr QᵀJQ is exact
        u, s, _ = torch.linalg.svd(images, full_matrices=False)
        q = u[:, s > 10 * torch.finfo(jacobian.x.dtype).eps * s[0]]
        if not q.shape[1]:
            return Estimate(0.0, 0.0, bias, products=count)
    mapped = _apply(jacobian, q.T.reshape(-1, *jacobian.x.shape).to(jacobian.x))
    core = q.T @ mapped
    if is_exhausted:
        return Estimate(core.trace().item(), 0.0, bias, products=count + q.shape[1])
    left = torch.linalg.inv(r).T
    left = left / left.norm(dim=0)
    inside = q.T @ probes  # Qᵀω
    kept_part = inside - left * (left * inside).sum(dim=0)  # Q_iᵀω_i in the basis Q
    trace = core.trace() - (left * (core @ left)).sum(dim=0)
    # (I - P)ᵀ J (I - P) with P ω_i = Q kept_part_i
    quadratic = (probes * images).sum(dim=0)
    cross = ((mapped.T @ probes) * kept_part).sum(dim=0) + (kept_part * (q.T @ images)).sum(dim=0)
    samples = trace + quadratic - cross + (kept_part * (core @ kept_part)).sum(dim=0)
    return mean_estimate(samples, 2 * count, bias, XTRACE_CORRECTION)


def estimate_frobenius_norm(jacobian: Jacobian, *, num_products: int, generator: torch.Generator | None = None) -> Estimate:
    """|J|_F from E|Jw|² over Rademacher w; exact when the budget reaches the smaller side of J.

    Raises:
        ValueError: fewer than 4 products.
    """
    if num_products < min(4, *jacobian.shape):
        raise ValueError(f"num_products={num_products}. Expected at least 4.")
    if num_products >= jacobian.dense_products:
        matrix = jacobian.dense().cpu().double()
        return Estimate(
            matrix.norm().item(), bias=jacobian.step_error * math.sqrt(matrix.shape[1]), products=jacobian.dense_products
        )
    generator = generator or torch.Generator().manual_seed(0)
    product, shape = (jacobian.vjp, jacobian.value.shape) if jacobian.has_reverse else (jacobian.jvp, jacobian.x.shape)
    samples = product(rademacher(num_products, shape, jacobian.x, generator)).flatten(1).cpu().double().square().sum(dim=1)
    squared = mean_estimate(samples, num_products)
    value = math.sqrt(squared.value)
    sem = squared.sem / (2 * value) if value else 0.0
    # The square root of a mean lies below the mean of the root by variance / 8 value³.
    bias = -(sem**2) / (2 * value) if value else 0.0
    return Estimate(value, sem, bias, squared.converged, num_products)
