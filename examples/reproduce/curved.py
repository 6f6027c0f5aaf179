"""Manifolds of known dimension with exact denoisers: linear, a sphere, a product of circles, and images of a bar.

Sphere and circles are carried into more dimensions by orthonormal columns. The bar has soft edges; its place and angle vary, and
its posterior mean is a quadrature over these three parameters, finer than the posterior at every noise. The same bars on a fixed
grid are what a finite data set knows of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_geometry.exact import EmpiricalDenoiser, ExactDenoiser, LinearManifoldDenoiser, SphereDenoiser

AMBIENT, PIXELS = 24, 12
SPHERE_DIM, RADII = 10, (1.0, 1.0, 0.3, 0.3)
LENGTH, WIDTH, SOFTNESS, REACH = 7.0, 2.0, 0.7, 2.0  # of the bar, in pixels; REACH: how far its middle moves each way


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


def bars(parameters: Tensor) -> Tensor:
    """Images (n, 144) of bars whose middle is at (x, y) pixels from that of the image and that point at an angle, (n, 3)."""
    x, y, angle = (p[:, None] for p in parameters.unbind(1))
    down, right = (c.flatten() - (PIXELS - 1) / 2 for c in torch.meshgrid(*[torch.arange(PIXELS).double()] * 2, indexing="ij"))
    along = angle.cos() * (right - x) + angle.sin() * (down - y)
    across = angle.cos() * (down - y) - angle.sin() * (right - x)

    def inside(place: Tensor, size: float) -> Tensor:
        return ((size / 2 - place) / SOFTNESS).sigmoid() * ((size / 2 + place) / SOFTNESS).sigmoid()

    return inside(along, LENGTH) * inside(across, WIDTH)


def bar_grid(middle: Tensor, half: Tensor, nodes: int) -> Tensor:
    """Parameters (n, 3) on a grid of ``half`` around ``middle``, cut to the domain; the angle closes after pi."""
    axes = []
    for i in range(3):
        full = half[i] >= (math.pi / 2 if i == 2 else 2 * REACH)
        if i == 2 and full:
            axes.append(torch.arange(nodes).double() * math.pi / nodes)
        elif i == 2:
            axes.append(middle[i] + half[i] * torch.linspace(-1, 1, nodes, dtype=torch.double))
        else:
            low, high = max(-REACH, (middle[i] - half[i]).item()), min(REACH, (middle[i] + half[i]).item())
            axes.append(torch.linspace(low, high, nodes, dtype=torch.double))
    return torch.cartesian_prod(*axes)


class BarDenoiser(ExactDenoiser):
    """Bars of uniform parameters, by quadrature around those of the image that was noised.

    The nodes reach 7 standard deviations of the posterior of each parameter (sigma over the length of its derivative), or the ends
    of the domain. At 21 nodes their spacing is 0.7 of one: the sum of a Gaussian over such a grid errs by exp(-2 pi² / 0.7²).
    """

    dim = PIXELS**2

    def __init__(self, parameters: Tensor, nodes: int = 21) -> None:
        self.parameters, self.nodes = parameters.double(), nodes
        self.lengths = torch.func.jacfwd(lambda p: bars(p[None])[0])(self.parameters).norm(dim=0)
        self.grid = functools.cache(self._grid)

    def _grid(self, sigma: float) -> EmpiricalDenoiser:
        return EmpiricalDenoiser(bars(bar_grid(self.parameters, 7 * sigma / self.lengths, self.nodes)), chunk_size=16384)

    def posterior_mean(self, x_t: Tensor, alpha_t: float, sigma_t: float) -> Tensor:
        return self.grid(sigma_t / alpha_t).posterior_mean(x_t, alpha_t, sigma_t)


def bar_derivatives(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """First derivatives of a bar (144, 3), and the part of the second that is normal to the manifold, (144, 3, 3)."""
    first = torch.func.jacfwd(lambda p: bars(p[None])[0])
    tangent, second = first(parameters), torch.func.jacfwd(first)(parameters)
    inside = torch.linalg.pinv(tangent)
    return tangent, second - torch.einsum("ak,kb,bij->aij", tangent, inside, second)


def bar_radii() -> tuple[float, ...]:
    """Radius of curvature |x'|² / |x''|, x'' normal to the manifold, along x, y and the angle of a tilted bar in the middle."""
    tangent, second = bar_derivatives(torch.tensor([0.0, 0.0, 0.5], dtype=torch.double))
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

    def bar(g: torch.Generator) -> tuple[ExactDenoiser, Tensor]:
        u = torch.rand(3, generator=g, dtype=torch.double)
        parameters = torch.cat([u[:2] - 0.5, u[2:] * math.pi])
        return BarDenoiser(parameters, nodes), bars(parameters[None])[0]

    @functools.cache
    def all_bars() -> EmpiricalDenoiser:
        far = torch.tensor([10.0, 10.0, 10.0], dtype=torch.double)
        return EmpiricalDenoiser(bars(bar_grid(0 * far, far, fixed)), chunk_size=16384)

    def from_grid(g: torch.Generator) -> tuple[ExactDenoiser, Tensor]:
        n = fixed
        x, y, angle = (torch.randint(n // 3, n - n // 3, (3,), generator=g)).tolist()
        return all_bars(), all_bars().data[(x * n + y) * n + angle]

    radii = bar_radii()
    return {
        "linear": Manifold("linear, variance 1", 9, linear),
        "sphere": Manifold("sphere, R = 1", SPHERE_DIM - 1, on_sphere, (1.0,)),
        "torus": Manifold("four circles, R = 1, 1, 0.3, 0.3", len(RADII), on_torus, RADII),
        "bar": Manifold("bar, place and angle", 3, bar, radii, images=True),
        "grid": Manifold(f"the same from {fixed}³ images", 3, from_grid, radii, images=True),
    }


def mean_curvature(points: int) -> float:
    """Root mean square length of the mean curvature vector Σ g^ij x''_ij of the bars, x'' normal to the manifold."""
    found = []
    for i in range(points):
        u = torch.rand(3, generator=seeded(100 + i), dtype=torch.double)
        tangent, second = bar_derivatives(torch.cat([u[:2] - 0.5, u[2:] * math.pi]))
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
        "bar": (mean_curvature(points), None),
    }


def spacings(fixed: int) -> tuple[float, ...]:
    """Distance between neighbouring images of the fixed grid along x, y and the angle, in the middle."""
    middle, steps = (
        torch.tensor([0.0, 0.0, 0.5]).double(),
        (4.0 / (fixed - 1), 4.0 / (fixed - 1), math.pi / fixed),
    )
    moved = middle + torch.diag(torch.tensor(steps).double())
    return tuple((bars(moved) - bars(middle[None])).norm(dim=1).tolist())
