"""Exact denoisers: data distributions whose posterior mean E[x_0 | x_t] is known, the oracles every estimator is tested on.

All work for any alpha_t >= 0 and sigma_t > 0 (also alpha_t = 0, where the answer is the prior mean), on points of any shape
(B, *dims) with prod(dims) = d. Arithmetic is in float64 where the device has it. Their canonical Jacobian D' is

    Gaussian N(mu, C)        C (C + sigma^2)^-1, eigenvalues l / (l + sigma^2)
    linear manifold x = Fz   the same with C = F diag(variances) F^T: d - m eigenvalues are 0
    mixture                  posterior average of the components' D' plus the covariance of their means over sigma^2;
                             eigenvalues exceed 1 at a saddle between modes, which is right
    sphere of radius R       tangential R A / r (d - 1 times), radial R^2 A' / sigma^2 (arXiv:2410.05898 has the flat case)
    empirical                covariance of the data under the softmax weights over sigma^2
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from .denoiser import Denoiser

DEBYE_ORDER = 200  # from which order of Bessel functions the uniform expansion is exact to rounding


def working(x: Tensor) -> Tensor:
    """``x`` in float64 where its device has that."""
    return x.float() if x.device.type == "mps" else x.double()


def _finite_data(value: Tensor, name: str) -> Tensor:
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} has {int((~torch.isfinite(value)).sum())} non-finite entries. Expected finite numbers.")
    return value


class ExactDenoiser(ABC):
    """A data distribution on R^d with a known posterior mean."""

    dim: int

    @abstractmethod
    def posterior_mean(self, x_t: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        """E[x_0 | x_t] for flat points (B, d) in working precision, (B, d)."""

    def denoised(self, x_t: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        """E[x_0 | x_t], (B, *dims) -> (B, *dims) in the dtype of ``x_t``; raises ValueError unless prod(dims) = d."""
        if x_t[0].numel() != self.dim:
            raise ValueError(f"x_t has {x_t[0].numel()} numbers per point. Expected {self.dim}, the dimension of the data.")
        mean = self.posterior_mean(working(x_t).flatten(1), alpha_t, sigma_t)
        return mean.reshape(x_t.shape).to(x_t.dtype)

    def at(self, alpha_t: float, sigma_t: float) -> Denoiser:
        """The :class:`Denoiser` at one noise level."""
        return Denoiser(lambda x_t: self.denoised(x_t, alpha_t, sigma_t), alpha_t=alpha_t, sigma_t=sigma_t)


class GaussianDenoiser(ExactDenoiser):
    """x_0 ~ N(mean, covariance).

    Args:
        covariance: Symmetric, positive semi-definite (may be singular), shape (d, d).
        mean: Shape (d,), default zero.

    Attributes:
        variances: Eigenvalues of the covariance along the columns of ``directions``, shape (m,), descending.
        directions: Orthonormal, shape (d, m).
    """

    def __init__(self, covariance: Tensor, mean: Tensor | None = None) -> None:
        self.variances, self.directions = _eigenbasis(covariance)
        self.dim = len(covariance)
        self.mean = _vector(mean, self.dim, "mean", covariance)

    def posterior_mean(self, x_t: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        """Mean + U diag(alpha l / (alpha^2 l + sigma_t^2)) U^T (x_t - alpha mean)."""
        mean, directions, variances = (v.to(x_t) for v in (self.mean, self.directions, self.variances))
        shrink = alpha_t * variances / (alpha_t**2 * variances + sigma_t**2)
        return mean + ((x_t - alpha_t * mean) @ directions * shrink) @ directions.T


class LinearManifoldDenoiser(GaussianDenoiser):
    """x_0 = F diag(variances)^(1/2) z with z ~ N(0, I_m): Gaussian data on an m-dimensional linear subspace of R^d.

    Args:
        basis: F, shape (d, m), of full column rank; or orthonormal columns together with ``variances``.
        variances: Per column of the basis, positive, shape (m,); default ones.
    """

    def __init__(self, basis: Tensor, variances: Tensor | None = None) -> None:
        if basis.ndim != 2:
            raise ValueError(f"basis has shape {tuple(basis.shape)}. Expected (d, m).")
        scaled = working(_finite_data(basis, "basis"))
        if variances is not None:
            if variances.shape != (basis.shape[1],) or not (variances > 0).all():
                raise ValueError(f"variances={variances}. Expected {basis.shape[1]} positive numbers, one a column.")
            scaled = scaled * working(variances).sqrt()
        directions, scales, _ = torch.linalg.svd(scaled, full_matrices=False)
        self.dim = basis.shape[0]
        self.variances, self.directions = scales**2, directions
        self.mean = torch.zeros(self.dim, dtype=scaled.dtype, device=basis.device)


class MixtureDenoiser(ExactDenoiser):
    """x_0 ~ Σ_k weights_k N(means_k, covariances_k).

    Args:
        means: Shape (K, d).
        covariances: Shape (K, d, d), positive semi-definite, may be singular.
        weights: Positive, shape (K,); default equal. Normalised to sum 1.
    """

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor | None = None) -> None:
        count, self.dim = means.shape
        if covariances.shape != (count, self.dim, self.dim):
            raise ValueError(f"covariances has shape {tuple(covariances.shape)}. Expected {(count, self.dim, self.dim)}.")
        weights = torch.ones(count) if weights is None else weights
        if weights.shape != (count,) or not (weights > 0).all():
            raise ValueError(f"weights={weights}. Expected {count} positive numbers, one a component.")
        self.components = [GaussianDenoiser(c, m) for c, m in zip(covariances, means, strict=True)]
        self.log_weights = (working(weights) / working(weights).sum()).log()

    def posterior_mean(self, x_t: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        """Σ_k p(k | x_t) E[x_0 | x_t, k], the responsibilities taken in log space."""
        logits = torch.stack([self._log_density(c, x_t, alpha_t, sigma_t) for c in self.components], dim=1)
        responsibilities = (logits + self.log_weights.to(x_t)).softmax(dim=1)  # (B, K)
        means = torch.stack([c.posterior_mean(x_t, alpha_t, sigma_t) for c in self.components], dim=1)  # (B, K, d)
        return (responsibilities[..., None] * means).sum(dim=1)

    @staticmethod
    def _log_density(component: GaussianDenoiser, x_t: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        mean, directions, variances = (v.to(x_t) for v in (component.mean, component.directions, component.variances))
        total = alpha_t**2 * variances + sigma_t**2
        centred = (x_t - alpha_t * mean) @ directions
        return -0.5 * (centred**2 / total + total.log()).sum(dim=1)


class SphereDenoiser(ExactDenoiser):
    """x_0 uniform on the sphere of radius R in R^d.

    With kappa = alpha R |x_t| / sigma_t^2 the posterior mean is R A(kappa) x_t / |x_t|, A = I_{d/2} / I_{d/2-1}.
    """

    def __init__(self, dim: int, radius: float = 1.0) -> None:
        if dim < 2 or not radius > 0:
            raise ValueError(f"dim={dim}, radius={radius}. Expected dim >= 2 and radius > 0.")
        self.dim, self.radius = dim, float(radius)

    def posterior_mean(self, x_t: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        """R A(kappa) x_t / |x_t|."""
        norm = x_t.square().sum(dim=1, keepdim=True).clamp_min(torch.finfo(x_t.dtype).tiny).sqrt()
        ratio = _BesselRatio.apply(alpha_t * self.radius / sigma_t**2 * norm, self.dim)
        return self.radius * ratio * x_t / norm


class EmpiricalDenoiser(ExactDenoiser):
    """x_0 uniform on a finite data set: the softmax average that a network reaches when it has memorised everything.

    Args:
        data: Shape (n, *dims).
        chunk_size: Data points compared at once; memory is B x chunk_size weights and chunk_size x d data.
    """

    def __init__(self, data: Tensor, chunk_size: int = 4096) -> None:
        if data.ndim < 2 or len(data) == 0 or chunk_size < 1:
            raise ValueError(
                f"data has shape {tuple(data.shape)}, chunk_size={chunk_size}. Expected (n, *dims) with n >= 1 and chunk_size >= 1."
            )
        self.data, self.chunk_size = _finite_data(data.flatten(1), "data"), chunk_size
        self.dim = self.data.shape[1]
        self._centre = working(self.data.mean(dim=0) if self.data.is_floating_point() else self.data.float().mean(dim=0))

    def posterior_mean(self, x_t: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        """Σ_i w_i x_i, w = softmax(-|x_t - alpha x_i|^2 / (2 sigma_t^2)), merged over chunks by their log weights."""
        means, log_masses = [], []
        for data in self.data.split(self.chunk_size):
            data = working(data).to(x_t)
            logits = self._logits(x_t, data, alpha_t, sigma_t)
            means.append(logits.softmax(dim=1) @ data)
            log_masses.append(logits.logsumexp(dim=1))
        shares = torch.stack(log_masses, dim=1).softmax(dim=1)  # (B, chunks)
        return (shares[..., None] * torch.stack(means, dim=1)).sum(dim=1)

    def weights(self, x_t: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        """Posterior probability of every data point, (B, *dims) -> (B, n)."""
        x_t = working(x_t).flatten(1)
        logits = [self._logits(x_t, working(d).to(x_t), alpha_t, sigma_t) for d in self.data.split(self.chunk_size)]
        return torch.cat(logits, dim=1).softmax(dim=1)

    def _logits(self, x_t: Tensor, data: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        """-|x_t - alpha x_i|^2 / (2 sigma_t^2) without the term that all data points share, (B, n).

        Relative to the mean of the data, so that close points far from the origin keep their digits.
        """
        centre = self._centre.to(x_t)
        data, x_t = data - centre, x_t - alpha_t * centre
        return (alpha_t * (x_t @ data.T) - 0.5 * alpha_t**2 * data.square().sum(dim=1)) / sigma_t**2


class _BesselRatio(torch.autograd.Function):
    """A(kappa) = I_{d/2}(kappa) / I_{d/2-1}(kappa), element by element; A' = 1 - A^2 - (d - 1) A / kappa (A'(0) = 1/d)."""

    generate_vmap_rule = False

    @staticmethod
    def forward(kappa: Tensor, dim: int) -> Tensor:
        return torch.from_numpy(_bessel_ratio(kappa.detach().cpu().double().numpy(), dim)).to(kappa)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        kappa, ctx.dim = inputs
        ctx.save_for_backward(kappa, output)
        ctx.save_for_forward(kappa, output)

    @staticmethod
    def _slope(ctx: Any) -> Tensor:
        kappa, ratio = ctx.saved_tensors
        slope = 1 - ratio**2 - (ctx.dim - 1) * ratio / kappa.clamp_min(1e-300 if kappa.dtype == torch.float64 else 1e-30)
        return torch.where(kappa < 1e-6 * ctx.dim, torch.full_like(kappa, 1 / ctx.dim), slope)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * _BesselRatio._slope(ctx), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent * _BesselRatio._slope(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, kappa: Tensor, dim: int) -> tuple[Tensor, int | None]:
        return _BesselRatio.apply(kappa, dim), in_dims[0]


def _bessel_ratio(kappa: np.ndarray, dim: int) -> np.ndarray:
    """I_v(kappa) / I_(v-1)(kappa), v = d/2, to about 1e-12 for every kappa >= 0.

    Perron's continued fraction for kappa <= v; beyond, scaled Bessel functions, or where these underflow Debye's uniform
    expansion (large v) and Hankel's (large kappa).
    """
    order = dim / 2
    fraction = np.zeros_like(kappa)
    for k in range(int(2 * math.sqrt(order)) + 60, -1, -1):
        fraction = kappa / (2 * (order + k) + kappa * fraction)
    above = np.maximum(kappa, order)
    if order >= DEBYE_ORDER:
        beyond = _debye_ratio(above, order)
    else:
        near = np.minimum(above, 1e8)
        hankel = 1 - (dim - 1) / (2 * above) + (dim - 1) * (dim - 3) / (8 * above**2)
        beyond = np.where(above > 1e8, hankel, special.ive(order, near) / special.ive(order - 1, near))
    return np.where(kappa <= order, fraction, beyond)


def _debye_ratio(kappa: np.ndarray, order: float) -> np.ndarray:
    """The ratio by Debye's expansion, DLMF 10.41.3; its exponents differ by the integral of asinh(v / kappa) over v."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    between = order - 0.5 + 0.5 * nodes
    exponent = -0.5 * (weights * np.arcsinh(between / kappa[..., None])).sum(axis=-1)
    root = -0.25 * np.log1p((2 * order - 1) / ((order - 1) ** 2 + kappa**2))
    return np.exp(exponent + root) * _debye_sum(kappa, order) / _debye_sum(kappa, order - 1)


def _debye_sum(kappa: np.ndarray, order: float) -> np.ndarray:
    """1 + Σ_k U_k(p) / v^k to k = 4, p = (1 + (kappa/v)²)^(-1/2), DLMF 10.41.10."""
    p = 1 / np.sqrt(1 + (kappa / order) ** 2)
    p2 = p * p
    u1 = p * (3 - 5 * p2) / 24
    u2 = p2 * (81 - 462 * p2 + 385 * p2**2) / 1152
    u3 = p * p2 * (30375 - 369603 * p2 + 765765 * p2**2 - 425425 * p2**3) / 414720
    u4 = p2**2 * (4465125 - 94121676 * p2 + 349922430 * p2**2 - 446185740 * p2**3 + 185910725 * p2**4) / 39813120
    return 1 + u1 / order + u2 / order**2 + u3 / order**3 + u4 / order**4


def _eigenbasis(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d,) descending and eigenvectors (d, d) of a covariance; refuses what is not one."""
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"covariance has shape {tuple(covariance.shape)}. Expected (d, d).")
    matrix = working(_finite_data(covariance, "covariance"))
    scale = matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny)
    if (matrix - matrix.T).abs().max() > 1e-5 * scale:
        raise ValueError("covariance is not symmetric. Expected a symmetric positive semi-definite matrix.")
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    if values.min() < -1e-5 * scale:
        raise ValueError(f"covariance has the eigenvalue {values.min():.3g}. Expected none below zero.")
    return values.clamp_min(0).flip(0), vectors.flip(1)


def _vector(value: Tensor | None, dim: int, name: str, like: Tensor) -> Tensor:
    if value is None:
        return working(torch.zeros(dim, device=like.device))
    if value.shape != (dim,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}. Expected ({dim},).")
    return working(_finite_data(value, name))
