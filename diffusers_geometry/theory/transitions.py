"""Speciation and collapse: when a generation decides its class, and when a training example (George et al., arXiv:2502.04339).

Time here is that of the Ornstein-Uhlenbeck process x_t = e^-t x_0 + sqrt(1 - e^-2t) epsilon, sigma^2 = e^2t - 1 its
variance-exploding noise and snr = 1 / sigma^2. Generation runs from large to small t.

**Collapse** on n = e^(alpha d) examples happens where the mutual information I(x_0; x_t) reaches log n. For Gaussian data
I = 1/2 sum_i log(1 + l_i snr) over the eigenvalues of the covariance; for x_0 = phi(W z) see :mod:`.glm`.

**Speciation** of two classes at +-mu with variance v inside each is ruled by a(t) = |mu|^2 e^-2t / (e^-2t v + 1 - e^-2t): two
backward runs from one x_t end in the same class with probability phi(a) = (1 + E tanh(a + sqrt(a) g)) / 2. D' becomes unstable at
the midpoint at a = 1, the reverse drift x + 2 score at a = 1/2, and clones agree to a chosen degree where phi(a) reaches it.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from .glm import SHORTEST, Activation, activation_moments, check_positive, gaussian_nodes, glm_information


def sigma_of_time(t: ArrayLike) -> np.ndarray:
    """Variance-exploding noise sigma = sqrt(e^2t - 1) of an OU time; ``t >= 0``, any shape."""
    return np.sqrt(np.expm1(2 * _non_negative(t=t)))


def time_of_sigma(sigma: ArrayLike) -> np.ndarray:
    """OU time 1/2 log(1 + sigma^2) of a variance-exploding noise; ``sigma >= 0``, any shape."""
    return 0.5 * np.log1p(_non_negative(sigma=sigma) ** 2)


# -- Collapse ---------------------------------------------------------------------------------------


def collapse_time_linear(log_n_per_dim: float, dim_ratio: float) -> float:
    """t_C = 1/2 log(1 + 1 / (e^(2 alpha / beta) - 1)) of a linear manifold with unit variances (orthonormal W).

    Args:
        log_n_per_dim: alpha = log(n) / d, positive.
        dim_ratio: beta = p / d, positive.
    """
    check_positive(log_n_per_dim=log_n_per_dim, dim_ratio=dim_ratio)
    return -0.5 * math.log1p(-math.exp(-2 * log_n_per_dim / dim_ratio))


def gaussian_information(eigenvalues: ArrayLike, t: float) -> float:
    """I(x_0; x_t) in nats for Gaussian data with these covariance eigenvalues; an upper bound for any data that has them."""
    check_positive(t=t)
    return 0.5 * float(np.log1p(_eigenvalues(eigenvalues) / np.expm1(2 * t)).sum())


def collapse_time_gaussian(eigenvalues: ArrayLike, log_n: float) -> float:
    """t_C of Gaussian data: where 1/2 sum log(1 + l snr) = log n. On the covariance of any data, an upper bound.

    Args:
        eigenvalues: Of the covariance, not negative, at least one positive.
        log_n: Logarithm of the number of examples, positive.
    """
    values = _eigenvalues(eigenvalues)
    check_positive(log_n=log_n)
    logarithms = np.log(values[values > 0])

    def excess(log_snr: float) -> float:
        return 0.5 * float(np.logaddexp(0, logarithms + log_snr).sum()) - log_n

    # log(1 + x) <= x gives the least snr; the top eigenvalue alone would need the most.
    low = math.log(2 * log_n / values.sum())
    high = 2 * log_n + math.log(-math.expm1(-2 * log_n)) - math.log(values.max())
    return 0.5 * float(np.logaddexp(0, -brentq(excess, low - 1e-9, high + 1e-9, xtol=1e-14)))


def collapse_time_glm(
    log_n_per_dim: float,
    dim_ratio: float,
    activation: Activation = "tanh",
    weight_variance: float = 1.0,
    mean_overlap: float = 0.0,
) -> float:
    """t_C where :func:`glm_information` falls to alpha = log(n) / d; arguments as there.

    Raises:
        ValueError: an argument out of range, or more examples than the data have information for (a phi with few values).
    """
    check_positive(log_n_per_dim=log_n_per_dim)

    def excess(log_t: float) -> float:
        information = glm_information(max(math.exp(log_t), SHORTEST), dim_ratio, activation, weight_variance, mean_overlap).value
        return information - log_n_per_dim

    low = high = math.log(max(collapse_time_linear(log_n_per_dim, dim_ratio), SHORTEST))
    while excess(high) > 0:
        high += 0.5
    step = 0.5
    while (beyond := excess(low)) < 0:
        if low <= math.log(SHORTEST):
            raise ValueError(
                f"log_n_per_dim={log_n_per_dim}. Expected less than {beyond + log_n_per_dim:.4g}, the information per dimension of "
                f"this data at t = {SHORTEST:g}."
            )
        low, step = max(low - step, math.log(SHORTEST)), 2 * step
    return math.exp(brentq(excess, low, high, xtol=1e-9))


# -- Speciation -------------------------------------------------------------------------------------


def clone_agreement(snr: ArrayLike) -> np.ndarray:
    """phi(a) = (1 + E tanh(a + sqrt(a) g)) / 2: chance that two backward runs from one point end in the same of two classes.

    Args:
        snr: a, between-class signal to noise, not negative, any shape.
    """
    values = _non_negative(snr=snr)
    nodes = gaussian_nodes(0.005)
    weights = np.exp(-0.5 * nodes**2)
    values = np.minimum(values, 1e6)  # beyond, the agreement is 1 to the last digit
    expected = np.tanh(values[..., None] + np.sqrt(values)[..., None] * nodes) @ (weights / weights.sum())
    return (1 + expected) / 2


def clone_snr(agreement: float) -> float:
    """a with phi(a) = agreement, between 1/2 and 1 exclusive."""
    if not 0.5 < agreement < 1:
        raise ValueError(f"agreement={agreement}. Expected 0.5 < agreement < 1.")
    high = 1.0
    while clone_agreement(high) < agreement:
        high *= 2
    return brentq(lambda a: float(clone_agreement(a)) - agreement, 0.0, high, xtol=1e-13)


def speciation_time(
    mean_norm_squared: float,
    within_variance: float,
    criterion: Literal["saddle", "drift", "clones"] = "saddle",
    agreement: float = 0.8,
) -> float:
    """OU time at which a(t) reaches 1 ("saddle"), 1/2 ("drift") or the snr of an agreement of clones ("clones").

    Args:
        mean_norm_squared: |mu|^2, the square of half the distance between the class means, positive.
        within_variance: v, of each class along mu, not negative.
        criterion: Which definition.
        agreement: Of the clones.

    Raises:
        ValueError: an argument out of range, or classes that overlap so much that the criterion is never met.
    """
    check_positive(mean_norm_squared=mean_norm_squared)
    if not within_variance >= 0:
        raise ValueError(f"within_variance={within_variance}. Expected a number >= 0.")
    if criterion not in ("saddle", "drift", "clones"):
        raise ValueError(f"criterion={criterion!r}. Expected 'saddle', 'drift' or 'clones'.")
    snr = {"saddle": 1.0, "drift": 0.5}.get(criterion) or clone_snr(agreement)
    if mean_norm_squared <= snr * within_variance:
        raise ValueError(
            f"mean_norm_squared={mean_norm_squared}. Expected more than {snr * within_variance:.6g}, or a(t) never reaches "
            f"{snr:.6g}: the classes overlap."
        )
    return 0.5 * math.log((mean_norm_squared + snr * (1 - within_variance)) / snr)


def top_eigenvalue_glm(dim: int, dim_ratio: float, mean_norm_squared_per_latent: float, activation: Activation = "tanh") -> float:
    """Largest covariance eigenvalue of phi(W z), z = +-mu + xi, W_ij ~ N(0, 1/d): rho1^2 beta d |mu~|^2 + rho*^2, up to O(1).

    Half its logarithm is the speciation time at the saddle; with the paper's factor 2 under it, that of the drift.

    Args:
        dim: d.
        dim_ratio: beta = p / d.
        mean_norm_squared_per_latent: |mu~|^2 = |mu|^2 / p.
        activation: phi, odd.
    """
    check_positive(dim=dim, dim_ratio=dim_ratio, mean_norm_squared_per_latent=mean_norm_squared_per_latent)
    moments = activation_moments(activation, dim_ratio * (1 + mean_norm_squared_per_latent))
    if abs(moments.constant) > 1e-9:
        raise ValueError(f"activation={activation!r} has the mean {moments.constant:.3g}. Expected an odd function.")
    return moments.linear**2 * dim_ratio * dim * mean_norm_squared_per_latent + moments.rest


# -- The area law -----------------------------------------------------------------------------------


def information_from_dimension(sigmas: ArrayLike, dimensions: ArrayLike) -> np.ndarray:
    """I(x_0; x_sigma) at every noise level from effective dimensions: the area of E tr D' over log sigma above it, in nats.

    The trapezoid rule; what lies above the largest sigma is not in it (a Gaussian tail of 1/2 sum log(1 + l / sigma_max^2)).

    Args:
        sigmas: Positive, ascending, shape (n,).
        dimensions: E tr D' there, or the held-out error E |x_0 - D|^2 / sigma^2, shape (n,).

    Returns:
        Shape (n,), zero at the last.
    """
    sigmas, dimensions = np.asarray(sigmas, float), np.asarray(dimensions, float)
    matching = sigmas.ndim == 1 and sigmas.shape == dimensions.shape and len(sigmas) >= 2
    if not matching or not (np.diff(sigmas) > 0).all() or sigmas[0] <= 0 or not np.isfinite(sigmas).all():
        raise ValueError(
            f"sigmas and dimensions have the shapes {sigmas.shape} and {dimensions.shape}. Expected equal lengths of at least 2, "
            "and positive, ascending sigmas."
        )
    if not (dimensions >= 0).all() or not np.isfinite(dimensions).all():
        raise ValueError("dimensions has negative numbers or some that are not finite. Expected finite numbers >= 0.")
    areas = np.diff(np.log(sigmas)) * (dimensions[1:] + dimensions[:-1]) / 2
    return np.append(areas[::-1].cumsum()[::-1], 0.0)


def _non_negative(**value: ArrayLike) -> np.ndarray:
    """The one named argument as an array, none of it negative or NaN."""
    ((name, given),) = value.items()
    array = np.asarray(given, float)
    if not (array >= 0).all():
        raise ValueError(f"{name}={given}. Expected numbers >= 0.")
    return array


def _eigenvalues(eigenvalues: ArrayLike) -> np.ndarray:
    values = np.asarray(eigenvalues, float).ravel()
    if not len(values) or not (values >= 0).all() or not values.max() > 0 or not np.isfinite(values).all():
        raise ValueError(f"eigenvalues={eigenvalues}. Expected finite numbers >= 0, at least one of them positive.")
    return values
