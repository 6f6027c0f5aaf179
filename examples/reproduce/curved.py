"""Manifolds of known dimension with exact denoisers: linear, a sphere, a product of circles, and a digit that moves and turns.

Sphere and circles are carried into more dimensions by orthonormal columns. The digit is one image of scikit-learn's, a cubic spline
through its pixels; its place and angle vary, and its posterior mean is a quadrature over these three parameters, finer than the
posterior at every noise. The same images on a fixed grid are what a finite data set knows of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import spline_filter
from sklearn.datasets import load_digits
from torch import Tensor

from diffusers_geometry.exact import EmpiricalDenoiser, ExactDenoiser, LinearManifoldDenoiser, SphereDenoiser

AMBIENT, PIXELS = 24, 12
SPHERE_DIM, RADII = 10, (1.0, 1.0, 0.3, 0.3)
DIGIT, REACHES = 3, (1.5, 1.5, math.pi / 4)  # which image, and how far it moves (pixels) and turns each way


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Product(ExactDenoiser):
    """Independent coordinates: each denoiser takes the next of them."""

    def __init__(self, parts: Sequence[ExactDenoiser]) -> None:
        self.parts, self.dim = parts, sum(p.dim for p in parts)

    def posterior_mean(self, x_t: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        pieces = zip(self.parts, x_t.split([p.dim for p in self.parts], dim=1), strict=True)
        return torch.cat([part.posterior_mean(x, alpha_t, sigma_t) for part, x in pieces], dim=1)


class Embedded(ExactDenoiser):
    """``inner`` carried into R^d by orthonormal columns (d, k): noise outside their span says nothing of the data."""

    def __init__(self, inner: ExactDenoiser, basis: Tensor) -> None:
        self.inner, self.basis, self.dim = inner, basis, len(basis)

    def posterior_mean(self, x_t: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        return self.inner.posterior_mean(x_t @ self.basis, alpha_t, sigma_t) @ self.basis.T


@functools.cache
def spline_coefficients() -> Tensor:
    """Of the cubic B-splines through the digit's 8 x 8 pixels with two of margin, in a border of zeros, (28, 28)."""
    image = np.pad(load_digits().images[DIGIT] / 16, 2)
    return torch.from_numpy(np.pad(spline_filter(image, order=3, mode="mirror"), 8))


def digit_images(parameters: Tensor) -> Tensor:
    """Images (n, 144) of the digit moved by (x, y) pixels and turned about its middle by an angle, (n, 3)."""
    return torch.cat([_digit_images(part) for part in parameters.split(2048)])


def _digit_images(parameters: Tensor) -> Tensor:
    x, y, angle = (p[:, None] for p in parameters.unbind(1))
    coefficients = spline_coefficients()
    down, right = (c.flatten() - (PIXELS - 1) / 2 for c in torch.meshgrid(*[torch.arange(PIXELS).double()] * 2, indexing="ij"))
    column = angle.cos() * (right - x) + angle.sin() * (down - y)
    row = angle.cos() * (down - y) - angle.sin() * (right - x)
    image, shares, firsts = 0.0, [], []
    for place in (row, column):
        place = (place + (len(coefficients) - 1) / 2).clamp(2, len(coefficients) - 3)
        first = place.detach().floor()
        shares.append(_spline_shares(place - first))
        firsts.append(first.long() - 1)
    for i, down_share in enumerate(shares[0]):
        for j, right_share in enumerate(shares[1]):
            image = image + down_share * right_share * coefficients[firsts[0] + i, firsts[1] + j]
    return image


def _spline_shares(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four cubic B-splines that are not zero at a place t in [0, 1) of its cell."""
    square, cube = t**2, t**3
    return (1 - t) ** 3 / 6, (3 * cube - 6 * square + 4) / 6, (-3 * cube + 3 * square + 3 * t + 1) / 6, cube / 6


def digit_grid(middle: Tensor, half: Tensor, nodes: int) -> Tensor:
    """Parameters (n, 3) on a grid of ``half`` around ``middle``, cut to the domain."""
    axes = []
    for place, width, reach in zip(middle.tolist(), half.tolist(), REACHES, strict=True):
        axes.append(torch.linspace(max(-reach, place - width), min(reach, place + width), nodes, dtype=torch.double))
    return torch.cartesian_prod(*axes)


class DigitDenoiser(ExactDenoiser):
    """The digit with uniform parameters, by quadrature around those of the image that was noised.

    The nodes reach 7 standard deviations of the posterior of each parameter (sigma times the root of the inverse metric's
    diagonal), or the ends of the domain. At 21 nodes their spacing is 0.7 of one: the sum of a Gaussian over such a grid errs by
    exp(-2 pi² / 0.7²).
    """

    dim = PIXELS**2

    def __init__(self, parameters: Tensor, nodes: int = 21) -> None:
        self.parameters, self.nodes = parameters.double(), nodes
        tangent = torch.func.jacfwd(lambda p: digit_images(p[None])[0])(self.parameters)
        self.spread = torch.linalg.inv(tangent.T @ tangent).diagonal().sqrt()
        self.grid = functools.cache(self._grid)

    def _grid(self, sigma: float) -> EmpiricalDenoiser:
        return EmpiricalDenoiser(digit_images(digit_grid(self.parameters, 7 * sigma * self.spread, self.nodes)), chunk_size=16384)

    def posterior_mean(self, x_t: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        return self.grid(sigma_t / alpha_t).posterior_mean(x_t, alpha_t, sigma_t)


def digit_parameters(generator: torch.Generator) -> Tensor:
    """Uniform in the middle of the domain, a third of it each way, (3,)."""
    return (2 * torch.rand(3, generator=generator, dtype=torch.double) - 1) * torch.tensor(REACHES, dtype=torch.double) / 3


def digit_derivatives(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """First derivatives of an image (144, 3), and the part of the second that is normal to the manifold, (144, 3, 3)."""
    first = torch.func.jacfwd(lambda p: digit_images(p[None])[0])
    tangent, second = first(parameters), torch.func.jacfwd(first)(parameters)
    inside = torch.linalg.pinv(tangent)
    return tangent, second - torch.einsum("ak,kb,bij->aij", tangent, inside, second)


def digit_radii() -> tuple[float, ...]:
    """Radius of curvature |x'|² / |x''|, x'' normal to the manifold, along x, y and the angle of a tilted digit in the middle."""
    tangent, second = digit_derivatives(torch.tensor([0.0, 0.0, 0.5], dtype=torch.double))
    return tuple((tangent[:, i].square().sum() / second[:, i, i].norm()).item() for i in range(3))


@dataclass(frozen=True)
class Manifold:
    """A manifold: its dimension, a draw of (denoiser, clean point), and what is known of its radii of curvature."""

    title: str
    dim: int
    draw: Callable[[torch.Generator], tuple[ExactDenoiser, Tensor]]
    radii: tuple[float, ...] = ()
    images: bool = False


def _orthonormal(columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(AMBIENT, columns, generator=seeded(1), dtype=torch.double))[0]


def manifolds(nodes: int, fixed: int) -> dict[str, Manifold]:
    sphere, circles = _orthonormal(SPHERE_DIM), _orthonormal(2 * len(RADII))

    def linear(g: torch.Generator) -> tuple[ExactDenoiser, Tensor]:
        basis = _orthonormal(9)
        return LinearManifoldDenoiser(basis, torch.ones(9)), basis @ torch.randn(9, generator=g, dtype=torch.double)

    def on_sphere(g: torch.Generator) -> tuple[ExactDenoiser, Tensor]:
        z = torch.randn(SPHERE_DIM, generator=g, dtype=torch.double)
        return Embedded(SphereDenoiser(SPHERE_DIM), sphere), sphere @ (z / z.norm())

    def on_torus(g: torch.Generator) -> tuple[ExactDenoiser, Tensor]:
        angles = 2 * math.pi * torch.rand(len(RADII), generator=g, dtype=torch.double)
        z = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor(RADII, dtype=torch.double)[:, None]
        return Embedded(Product([SphereDenoiser(2, r) for r in RADII]), circles), circles @ z.flatten()

    def digit(g: torch.Generator) -> tuple[ExactDenoiser, Tensor]:
        parameters = digit_parameters(g)
        return DigitDenoiser(parameters, nodes), digit_images(parameters[None])[0]

    @functools.cache
    def all_images() -> EmpiricalDenoiser:
        far = torch.tensor([10.0, 10.0, 10.0], dtype=torch.double)
        return EmpiricalDenoiser(digit_images(digit_grid(0 * far, far, fixed)), chunk_size=16384)

    def from_grid(g: torch.Generator) -> tuple[ExactDenoiser, Tensor]:
        n = fixed
        x, y, angle = (torch.randint(n // 3, n - n // 3, (3,), generator=g)).tolist()
        return all_images(), all_images().data[(x * n + y) * n + angle]

    radii = digit_radii()
    return {
        "linear": Manifold("linear, variance 1", 9, linear),
        "sphere": Manifold("sphere, R = 1", SPHERE_DIM - 1, on_sphere, (1.0,)),
        "torus": Manifold("four circles, R = 1, 1, 0.3, 0.3", len(RADII), on_torus, RADII),
        "digit": Manifold("digit, place and angle", 3, digit, radii, images=True),
        "grid": Manifold(f"the same from {fixed}³ images", 3, from_grid, radii, images=True),
    }


def mean_curvature(points: int) -> float:
    """Root mean square length of the mean curvature vector Σ g^ij x''_ij of the digits, x'' normal to the manifold."""
    found = []
    for i in range(points):
        tangent, second = digit_derivatives(digit_parameters(seeded(100 + i)))
        found.append(torch.einsum("aij,ij->a", second, torch.linalg.inv(tangent.T @ tangent)).square().sum())
    return torch.stack(found).mean().sqrt().item()


def laws(points: int) -> dict[str, tuple[float, float | None]]:
    """(a, b): tr D' of a noised point errs by a σ (root mean square), FLIPD of a clean one by b σ²; None where it is not known.

    A noised point lies σ ξ off the manifold, where D' is (1 - σ ξ · II)^-1 along it: the trace errs by σ times the mean curvature
    vector, of length (d - 1)/R on a sphere. FLIPD is that of exact.SphereDenoiser, -(d - 1)(d - 3)/(4 R²).
    """
    sphere = SPHERE_DIM - 1
    return {
        "sphere": (float(sphere), -sphere * (SPHERE_DIM - 3) / 4),
        "torus": (math.sqrt(sum(r**-2 for r in RADII)), sum(r**-2 for r in RADII) / 4),
        "digit": (mean_curvature(points), None),
    }


def spacings(fixed: int) -> tuple[float, ...]:
    """Distance between neighbouring images of the fixed grid along x, y and the angle, in the middle."""
    middle = torch.tensor([0.0, 0.0, 0.5]).double()
    moved = middle + torch.diag(torch.tensor([2 * reach / (fixed - 1) for reach in REACHES]).double())
    return tuple((digit_images(moved) - digit_images(middle[None])).norm(dim=1).tolist())
