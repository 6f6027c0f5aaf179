"""The largest singular values of a Jacobian of any size, by block Golub-Kahan with full reorthogonalisation.

The method (Golub, Luk and Overton, 1981, "A block Lanczos method for computing the singular values"): orthonormal bases U, V of
the block Krylov space of JᵀJ, fully reorthogonalised, so that J V = U B, and the largest singular values theta of the small B with
u = U p, v = V q approach those of J. J v = theta u holds by construction; what is left of Jᵀu - theta v is the residual r:

    some singular value of J lies within r of theta          (always; the bound)
    |s - theta| <= r² / (theta - largest unwanted value)     (when the wanted values are found; the estimate)

The estimate is believed only from values that moved by no more than the tolerance in each of the last two steps, and with the
unwanted value at the upper end of its own bound: inside a plateau of close values Ritz values are no one's in particular. What is
left is chance: a direction that the random start nearly misses shows late, less likely so for larger blocks.

A value that occurs more often than there were starting directions cannot show all its copies in a Krylov space: as soon as all
copies in sight are as many as the starting directions, or the space closes, fresh directions are added, and given as many steps as
the ones before them took.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .jacobian import Jacobian
from .spectrum import Spectrum


def golub_kahan_memory(shape: tuple[int, int], products: int, block_size: int = 4) -> int:
    """Bytes that the two bases of :func:`golub_kahan_spectrum` take (float64, on the CPU)."""
    columns = min(products // 2 + 2 * block_size, min(shape))
    return 12 * columns * (sum(shape) + 2 * columns)  # while a basis grows, it is there twice


def golub_kahan_spectrum(
    jacobian: Jacobian,
    num_singular_values: int,
    tol: float = 1e-3,
    max_products: int | None = None,
    *,
    block_size: int = 4,
    generator: torch.Generator | None = None,
    vectors: bool = False,
) -> Spectrum:
    """The largest singular values, by block Golub-Kahan with full reorthogonalisation.

    Args:
        jacobian: Products with J and Jᵀ.
        num_singular_values: k, at most min(m, n).
        tol: A value has converged when min(r, r² / gap to the unwanted values) <= tol theta, or at the level of rounding.
        max_products: Budget; by default as many as it takes (2 min(m, n) give everything).
        block_size: Directions advanced together. Small blocks take fewer products, large ones share forward passes.
        generator: Starting directions; a fixed seed by default.
        vectors: Keep the singular vectors.

    Returns:
        k values with bounds, estimated errors, converged flags; ``details["stopped"]`` is "converged", "budget" or
        "exhausted" (the Krylov space and fresh directions have nothing more: the remaining values are zero). The bound of a value
        that has not converged reaches up to the largest value, since Ritz values only grow.

    Raises:
        ValueError: k, tol, block size or budget out of range.
        TypeError: a black box that was not stated to be symmetric.

    References:
        A block Lanczos method for computing the singular values (Golub, Luk, Overton, 1981), ACM TOMS 7
    """
    limit = min(jacobian.shape)
    if not 1 <= num_singular_values <= limit:
        raise ValueError(f"num_singular_values={num_singular_values}. Expected 1 <= num_singular_values <= {limit}.")
    if not 0 < tol < 1 or not block_size >= 1:
        raise ValueError(f"tol={tol}, block_size={block_size}. Expected 0 < tol < 1 and block_size >= 1.")
    block_size = min(block_size, limit)
    budget = 4 * limit if max_products is None else max_products
    least = 2 * max(block_size, num_singular_values)
    if budget < least:
        raise ValueError(
            f"max_products={budget}. Expected at least {least}: two for each of {num_singular_values} singular values and for each "
            f"direction of a block of {block_size}."
        )
    krylov = _Krylov(jacobian, generator or torch.Generator().manual_seed(0))
    krylov.add_fresh(block_size)
    ritz, steps, due = None, 0, 0
    while True:
        krylov.advance()
        ritz, steps = krylov.ritz(num_singular_values, ritz, tol), steps + 1
        settled = len(ritz.values) >= num_singular_values and bool(ritz.converged[:num_singular_values].all())
        # Fresh directions must have had as many steps as those before them, or have shown all that they can.
        explored = steps >= due or not krylov.next_width
        hides = explored and _may_hide_copies(ritz, num_singular_values, krylov.starts, tol)
        stopped = None
        if krylov.is_full or krylov.is_exhausted:
            stopped = "exhausted"
        elif settled and explored and not hides:
            stopped = "converged"
        else:
            if (settled and hides) or not krylov.next_width:
                krylov.add_fresh(block_size)
                steps, due = 0, steps
            if krylov.products + 2 * krylov.next_width > budget:
                stopped = "budget"
        if stopped:
            trusted = stopped != "budget" or (explored and not hides)
            return krylov.spectrum(ritz, num_singular_values, stopped, trusted, vectors=vectors, block_size=block_size)


class _Krylov:
    """Bases U, V with J V = U B and Jᵀ U = V D + next; everything in float64 on the CPU, one column a direction."""

    def __init__(self, jacobian: Jacobian, generator: torch.Generator) -> None:
        self.jacobian, self.generator = jacobian, generator
        rows, columns = jacobian.shape
        double = {"dtype": torch.float64}
        self.left, self.right = torch.empty(rows, 0, **double), torch.empty(columns, 0, **double)
        self.forward, self.reverse = torch.empty(0, 0, **double), torch.empty(0, 0, **double)  # B, D
        self._next, self._remainder = torch.empty(columns, 0, **double), torch.empty(0, 0, **double)
        self._spent_before = jacobian.products
        self.scale, self.starts, self.is_exhausted, self._next_is_fresh = 0.0, 0, False, False

    @property
    def products(self) -> int:
        return self.jacobian.products - self._spent_before

    @property
    def next_width(self) -> int:
        return self._next.shape[1]

    @property
    def is_full(self) -> bool:
        left_full = self.left.shape[1] == len(self.left) and not self.next_width
        return left_full or self.right.shape[1] == len(self.right)

    @property
    def noise(self) -> float:
        """Error of a product of norm ``scale``, below which a direction is rounding."""
        return 10 * torch.finfo(self.jacobian.x.dtype).eps * (self.scale + self.jacobian.cancellation) + self.jacobian.step_error

    def add_fresh(self, count: int) -> None:
        """Adds random directions, orthogonal to all others, to the next block."""
        known = torch.cat([self.right, self._next], dim=1)
        count = min(count, len(self.right) - known.shape[1])
        gaussian = torch.randn(len(self.right), count, generator=self.generator, dtype=torch.float64)
        fresh = _orthogonal(gaussian, known, 0.0)[0]
        self._next_is_fresh = not self.next_width
        self._next, self.starts = torch.cat([self._next, fresh], dim=1), self.starts + fresh.shape[1]

    def advance(self) -> None:
        """One forward product with every direction of the next block, one reverse product with every new left direction."""
        before, only_fresh = self.left.shape[1], self._next_is_fresh
        remainder, found = self._remainder, self._next.shape[1]
        self.right, self._next_is_fresh = torch.cat([self.right, self._next], dim=1), False
        images = self._product(self.jacobian.jvp, self._next, self.jacobian.x.shape)
        self.scale = max(self.scale, images.norm(dim=0).max().item())
        new, coefficients, rest = _orthogonal(images, self.left, self.noise)
        # Directions that came from the last reverse products are now part of V: the rows of D that were their remainder.
        rows = torch.zeros(found, before, dtype=torch.float64)
        rows[: len(remainder), before - remainder.shape[1] :] = remainder
        self.reverse = torch.cat([self.reverse, rows])
        self.forward = _extended(self.forward, torch.cat([coefficients, rest]))
        self.left = torch.cat([self.left, new], dim=1)
        self.is_exhausted = only_fresh and not new.shape[1]
        pulled = self._product(self.jacobian.vjp, new, self.jacobian.value.shape)
        self._next, coefficients, self._remainder = _orthogonal(pulled, self.right, self.noise)
        self.reverse = torch.cat([self.reverse, coefficients], dim=1)

    def _product(self, product: Callable[[Tensor], Tensor], columns: Tensor, shape: torch.Size) -> Tensor:
        stack = columns.T.reshape(columns.shape[1], *shape).to(self.jacobian.x)
        return product(stack).flatten(1).cpu().double().T

    def ritz(self, wanted: int, previous: _Ritz | None, tol: float) -> _Ritz:
        """Singular values of B with their residuals, errors and whether they have converged."""
        p, values, q = torch.linalg.svd(self.forward, full_matrices=False)
        inside = self.reverse @ p - q.T * values
        outside = self._remainder @ p[p.shape[0] - self._remainder.shape[1] :]
        residuals = (inside.square().sum(dim=0) + outside.square().sum(dim=0)).sqrt() + self.noise
        still, steady = torch.zeros(2, len(values), dtype=torch.bool)
        if previous is not None:
            known = min(len(values), len(previous.values))
            still[:known] = (values[:known] - previous.values[:known]).abs() <= tol * values[:known]
            steady[:known] = still[:known] & previous.still[:known]
        unwanted = (values + residuals)[wanted].item() if len(values) > wanted else 0.0
        gaps = (values - unwanted).clamp_min(torch.finfo(torch.float64).tiny)
        errors = torch.where(steady, torch.minimum(residuals, residuals.square() / gaps + self.noise), residuals)
        converged = errors <= torch.clamp(tol * values, min=2 * self.noise)
        return _Ritz(values, residuals, errors, converged, still, p, q.T)

    def spectrum(self, ritz: _Ritz, wanted: int, stopped: str, trusted: bool, *, vectors: bool, block_size: int) -> Spectrum:
        """The result. Values that the bases do not show are zero: exactly so when exhausted, else up to the largest one."""
        missing = max(0, wanted - len(ritz.values))
        ceiling = (ritz.values + ritz.residuals)[:1].sum().item() or self.scale
        padding = torch.zeros(missing, dtype=torch.float64)
        values = torch.cat([ritz.values[:wanted], padding])
        converged = torch.cat([ritz.converged[:wanted], torch.full((missing,), stopped == "exhausted")])
        converged = converged if trusted else torch.zeros_like(converged)
        bounds = torch.cat([ritz.residuals[:wanted], padding + self.noise])
        errors = torch.cat([ritz.errors[:wanted], padding + self.noise])
        reach = torch.maximum(bounds, ceiling - values)
        bounds, errors = torch.where(converged, bounds, reach), torch.where(converged, errors, reach)
        return Spectrum(
            values, self.jacobian.shape, "golub_kahan", self.products, complete=len(values) == min(self.jacobian.shape),
            bounds=bounds, errors=errors, converged=converged, floor=self.noise,
            left=self.left @ ritz.left[:, :wanted] if vectors else None,
            right=self.right @ ritz.right[:, :wanted] if vectors else None,
            details={"block_size": block_size, "starts": self.starts, "stopped": stopped},
        )  # fmt: skip


@dataclass(frozen=True)
class _Ritz:
    """Singular values of the projected map, with what is known of their errors and coefficients of their vectors as columns."""

    values: Tensor
    residuals: Tensor
    errors: Tensor
    converged: Tensor
    still: Tensor
    left: Tensor
    right: Tensor


def _may_hide_copies(ritz: _Ritz, wanted: int, starts: int, tol: float) -> bool:
    """Whether some wanted values agree, within their errors, and are as many as the starting directions can show."""
    values, errors = ritz.values[: wanted + 1].tolist(), ritz.errors[: wanted + 1].tolist()
    for first in range(len(values)):
        last = first
        while last + 1 < len(values):
            apart = values[first] - values[last + 1]
            if apart > 0.1 * tol * values[first] + errors[first] + errors[last + 1]:
                break
            last += 1
        if last - first + 1 >= starts and last + 1 < min(wanted, len(values)):
            return True
    return False


def _orthogonal(columns: Tensor, basis: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Splits columns = basis C + new R: (new with orthonormal columns, C, R); directions below ``noise`` are left out."""
    coefficients = basis.T @ columns
    rest = columns - basis @ coefficients
    again = basis.T @ rest
    rest, coefficients = rest - basis @ again, coefficients + again
    if not rest.shape[1]:
        return rest, coefficients, rest.new_empty(0, 0)
    u, s, _ = torch.linalg.svd(rest, full_matrices=False)
    kept = s > max(noise, 1e-14 * columns.norm().item())
    new = u[:, kept]
    new = torch.linalg.qr(new - basis @ (basis.T @ new))[0] if new.shape[1] else new
    return new, coefficients, new.T @ rest


def _extended(matrix: Tensor, columns: Tensor) -> Tensor:
    """``matrix`` with zero rows for the new left directions and the given columns."""
    rows = torch.cat([matrix, matrix.new_zeros(len(columns) - len(matrix), matrix.shape[1])])
    return torch.cat([rows, columns], dim=1)
