"""The Jacobian of a function at a point, as products.

For f: R^n -> R^m and a point x, J = df/dx is m x n. Two products give everything else: ``vjp(u) = Jᵀu`` (reverse mode) and
``jvp(v) = Jv`` (forward mode); they are adjoint, <u, Jv> = <Jᵀu, v>. A dense J is m reverse products, taken in chunks:
one forward pass, then ``vmap`` over stacked cotangents, about 1.1 to 1.4 plain forward passes each.

Nothing here knows of diffusion. Forward products need attention in plain arithmetic and contiguous group norms; both are
arranged by :func:`forward_mode`, scoped to the product, so that no process-wide switch is left turned.

Modes and costs measured on diffusers networks: reverse products work with the default attention kernels; forward mode fails
there ("Trying to use forward AD with _scaled_dot_product_flash_attention_for_cpu that does not support it").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

BatchedMap = Callable[[Tensor], Tensor]


class _ContiguousGroupNorm(TorchFunctionMode):
    """Hands every group norm a contiguous input: its forward derivative cannot view channels-last activations."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.nn.functional.group_norm, torch.group_norm) and args:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def forward_mode() -> Iterator[None]:
    """A scope in which forward-mode derivatives of diffusers networks work; nothing outlives it."""
    with sdpa_kernel(SDPBackend.MATH), _ContiguousGroupNorm():
        yield


def require_finite(value: Tensor, what: str) -> Tensor:
    """Returns ``value``; raises FloatingPointError when it holds NaN or infinity, naming ``what``."""
    if not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise FloatingPointError(
            f"{what} has {bad} non-finite entries of {value.numel()}. Expected finite values: check the weights, "
            "the dtype (half precision overflows) and the input of the network."
        )
    return value


class Jacobian:
    """J = df/dx of ``fn`` at ``x``, exact (automatic differentiation), counting its products.

    Args:
        fn: Maps one point (*dims) to one output (*out). Must be deterministic.
        x: The point, shape (*dims), floating, at least float32.
        batched_fn: The same map on a stack, (K, *dims) -> (K, *out); lets the fallback share forward passes.
        chunk_size: Products taken at once in :meth:`dense` and for stacks.

    Attributes:
        products: Products spent so far (each vector of a stack is one).
        backend: How reverse products are taken: "vmap_vjp", or after a refusal by torch "stacked_grad" (one stacked
            forward per chunk; needs ``batched_fn``) or "looped_grad" (one forward, one backward per vector).
        fallback_reason: torch's words when ``backend`` is not "vmap_vjp", else None.
        forward_backend: "vmap_jvp", or "looped_jvp" for a function that cannot run under vmap (it draws random numbers).
        forward_fallback_reason: torch's words then, else None.

    Raises:
        TypeError: ``x`` is in half precision or not floating.
        FloatingPointError: the function or a product is not finite.
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        batched_fn: BatchedMap | None = None,
        chunk_size: int = 32,
    ) -> None:
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"x has dtype {x.dtype}. Expected float32 or float64: derivatives are not taken in less.")
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}. Expected at least 1.")
        self.fn, self.batched_fn, self.chunk_size = fn, batched_fn, chunk_size
        self.x = x.detach().clone()
        self.products = 0
        self.backend = "vmap_vjp"
        self.fallback_reason: str | None = None
        self.forward_backend = "vmap_jvp"
        self.forward_fallback_reason: str | None = None
        self._value: Tensor | None = None
        self._pullback: Callable[[Tensor], Tensor] | None = None

    @property
    def value(self) -> Tensor:
        """f(x), shape (*out), detached."""
        if self._value is None:
            self._linearise()
        return self._value

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): number of outputs, number of inputs."""
        return self.value.numel(), self.x.numel()

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀu for u of shape (*out), or for a stack (K, *out); returns (*dims) or (K, *dims)."""
        stack, single = self._stack(u, self.value.shape, "u")
        result = torch.cat([self._pull(chunk) for chunk in stack.split(self.chunk_size)])
        return result[0] if single else result

    def jvp(self, v: Tensor) -> Tensor:
        """Jv for v of shape (*dims), or for a stack (K, *dims); returns (*out) or (K, *out)."""
        stack, single = self._stack(v, self.x.shape, "v")
        result = torch.cat([self._push(chunk) for chunk in stack.split(self.chunk_size)])
        return result[0] if single else result

    def dense(self) -> Tensor:
        """J as a matrix (m, n), by as many products as its smaller side."""
        outputs, inputs = self.shape
        reverse = outputs <= inputs
        size, shape = (outputs, self.value.shape) if reverse else (inputs, self.x.shape)
        rows = []
        for start in range(0, size, self.chunk_size):
            count = min(self.chunk_size, size - start)
            basis = torch.zeros(count, size, dtype=self.x.dtype, device=self.x.device)
            basis[torch.arange(count), torch.arange(start, start + count)] = 1
            basis = basis.reshape(count, *shape)
            rows.append((self._pull(basis) if reverse else self._push(basis)).flatten(1))
        matrix = torch.cat(rows)
        return matrix if reverse else matrix.T

    def _stack(self, vector: Tensor, shape: torch.Size, name: str) -> tuple[Tensor, bool]:
        single = vector.shape == shape
        stack = vector[None] if single else vector
        if stack.shape[1:] != shape or stack.ndim != len(shape) + 1:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}. Expected {tuple(shape)} or (K, *{tuple(shape)}).")
        return stack.to(self.x), single

    def _linearise(self) -> None:
        """One forward pass, kept for all reverse products; a plain one where torch refuses."""
        try:
            with torch.enable_grad():
                value, self._pullback = torch.func.vjp(self.fn, self.x)
        except RuntimeError as error:
            self._fall_back(error)
            with torch.no_grad():
                value = self.fn(self.x)
        self._value = require_finite(value.detach().clone(), "the function at x")

    def _fall_back(self, error: RuntimeError) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        self.backend = "looped_grad" if self.batched_fn is None else "stacked_grad"
        self.fallback_reason = _first_line(error)

    def _pull(self, stack: Tensor) -> Tensor:
        """Jᵀ of a stack (K, *out) -> (K, *dims), by the first backend that torch accepts; the choice is remembered."""
        self.products += len(stack)
        with torch.enable_grad():
            if self.backend == "vmap_vjp":
                try:
                    with warnings.catch_warnings():
                        # torch loops over the batch in the backward of flash attention, and it is still the fastest kernel.
                        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                        return require_finite(torch.func.vmap(self._pullback)(stack)[0].detach(), "a reverse product")
                except RuntimeError as error:
                    self._fall_back(error)
            pull = self._stacked_grad if self.backend == "stacked_grad" else self._looped_grad
            return require_finite(pull(stack), "a reverse product")

    def _stacked_grad(self, stack: Tensor) -> Tensor:
        points = self.x.expand(len(stack), *self.x.shape).clone().requires_grad_(True)
        return torch.autograd.grad(self.batched_fn(points), points, stack)[0]

    def _looped_grad(self, stack: Tensor) -> Tensor:
        point = self.x.clone().requires_grad_(True)
        output = self.fn(point)
        return torch.stack([torch.autograd.grad(output, point, u, retain_graph=True)[0] for u in stack])

    def _push(self, stack: Tensor) -> Tensor:
        """J of a stack (K, *dims) -> (K, *out): vmap over tangents, the primal computed once."""
        self.products += len(stack)

        def product(v: Tensor) -> Tensor:
            return torch.func.jvp(self.fn, (self.x,), (v,))[1]

        with forward_mode(), torch.no_grad():
            if self.forward_backend == "vmap_jvp":
                try:
                    return require_finite(torch.func.vmap(product)(stack), "a forward product")
                except RuntimeError as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    self.forward_backend = "looped_jvp"
                    self.forward_fallback_reason = _first_line(error)
            return require_finite(torch.stack([product(v) for v in stack]), "a forward product")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
