"""psi, nu and delta of a generator: any network from a latent to a sample (arXiv:2408.08307).

A VAE's decoder, a GAN, a normalising flow and a one-step generator are the same to the three descriptors: a map z -> x and a point.
Its Jacobian's singular values give psi, the log volume that a cell of latent space is given in x, and nu, the number of directions
that survive; the units of the network give delta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .complexity import LocalComplexity, local_complexity
from .descriptors import LocalScaling, local_rank, local_scaling
from .difference import BatchedMap
from .estimate import Estimate
from .golub_kahan import golub_kahan_spectrum
from .jacobian import Jacobian
from .spectrum import Spectrum, dense_spectrum


@dataclass(frozen=True)
class Descriptors:
    """The three descriptors of a map at a point, and what they were computed from.

    Attributes:
        local_scaling: psi in nats, with the number of singular values it sums.
        local_rank: nu.
        local_complexity: delta at every radius, for a batch of one.
        spectrum: The singular values, shape (m, n) of the Jacobian, and the products they took.
    """

    local_scaling: LocalScaling
    local_rank: Estimate
    local_complexity: LocalComplexity
    spectrum: Spectrum

    def __str__(self) -> str:
        return "\n".join(
            [
                f"local scaling psi {self.local_scaling} nats over {self.local_scaling.rank} singular values",
                f"local rank nu {self.local_rank}",
                f"local complexity delta, {self.local_complexity}",
                f"from a {self.spectrum.method} spectrum of shape {self.spectrum.shape} in {self.spectrum.products} products and "
                f"{self.local_complexity.forwards} evaluations",
            ]
        )


def generator_geometry(
    fn: BatchedMap,
    z: Tensor,
    neighborhood_radius: float | tuple[float, ...],
    *,
    num_singular_values: int | None = None,
    relative_threshold: float = 1e-3,
    rank: int | None = None,
    max_products: int | None = None,
    num_directions: int = 8,
    num_draws: int = 4,
    generator: torch.Generator | None = None,
    chunk_size: int = 32,
) -> Descriptors:
    """psi, nu and delta of a generator at one latent.

    References:
        What Secrets Do Your Manifolds Hold? (Humayun et al., 2025), https://arxiv.org/abs/2408.08307, Definitions 1 to 3

    Args:
        fn: The generator, (K, *dims) -> (K, *out); samples must not influence one another. ``lambda z: vae.decode(z).sample``.
        z: One latent, shape (*dims), float32 or float64.
        neighborhood_radius: Of delta, per coordinate, in the unit of z; several at once are allowed.
        num_singular_values: The k largest by block Golub-Kahan; by default all of them from the dense Jacobian. psi and nu are
            then those of the k values in hand, and not converged when there may be more.
        relative_threshold: psi counts s_i > relative_threshold s_1.
        rank: psi counts this many instead, for comparing latents.
        max_products: Budget of Golub-Kahan.
        num_directions: k of delta, at most the dimension of z.
        num_draws: Draws of delta's directions, 1 or at least 4.
        generator: All random directions; a fixed seed by default.
        chunk_size: Products, and vertices, taken at once.
    """
    generator = generator or torch.Generator().manual_seed(0)
    jacobian = Jacobian(lambda p: fn(p[None])[0], z, batched_fn=fn, chunk_size=chunk_size)
    if num_singular_values is None:
        spectrum = dense_spectrum(jacobian)
    else:
        spectrum = golub_kahan_spectrum(jacobian, num_singular_values, max_products=max_products, generator=generator)
    delta = local_complexity(
        fn,
        z[None],
        neighborhood_radius,
        num_directions=num_directions,
        num_draws=num_draws,
        generator=generator,
        chunk_size=chunk_size,
    )
    return Descriptors(local_scaling(spectrum, relative_threshold, rank), local_rank(spectrum), delta, spectrum)
