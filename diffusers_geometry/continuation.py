"""What follows a step of a generation: the remaining steps to x_0, and the decoder that makes the image of it.

Between y and the image stand three maps whose Jacobians answer different questions. The denoiser's D' tells which directions of
the latent the model keeps. The decoder's dz -> d image tells what these directions look like (psi of a generator z -> x in
arXiv:2408.08307 is taken of this one). The sampler's x_t -> x_0, through all remaining steps, tells which noise still decides.
By the chain rule d image / dy = (d image / dx_0) D'.

A pipeline's own continuation is made by :mod:`.ending`; any decoder or one-step generator can be given by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor


def _missing(x: Tensor) -> NoReturn:
    raise ValueError("this continuation has no such map. Expected a Continuation that was given it.")


@dataclass(frozen=True)
class Continuation:
    """The maps that follow a denoiser; all batched and differentiable, rows must not influence one another.

    Attributes:
        decode: A final sample x_0 (K, *dims) -> what the decoder makes of it (K, *out), before any clamp to pixels.
        decoder_input: x_0 (K, *dims) -> the latent the decoder is given (K, *latent): unpacked, unscaled.
        decoder: That latent (K, *latent) -> (K, *out).
        sample: x_t (K, *dims) -> x_0 (K, *dims), through the remaining steps of a deterministic sampler.
        select_fn: For a batch whose samples are conditioned differently, maps a sample's index to its own continuation.
    """

    decode: Callable[[Tensor], Tensor] = _missing
    decoder_input: Callable[[Tensor], Tensor] = _missing
    decoder: Callable[[Tensor], Tensor] = _missing
    sample: Callable[[Tensor], Tensor] = _missing
    select_fn: Callable[[int], Continuation] | None = None

    @classmethod
    def from_decoder(cls, decoder: Callable[[Tensor], Tensor]) -> Continuation:
        """Of a plain decoder or generator z -> x, (K, *latent) -> (K, *out), that is given x_0 as it is."""
        return cls(decode=decoder, decoder_input=lambda x_0: x_0, decoder=decoder)

    def select(self, index: int) -> Continuation:
        """The continuation of one sample of a batch."""
        return self if self.select_fn is None else self.select_fn(index)
