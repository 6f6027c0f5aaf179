"""The Jacobian of a function at a point, as products.

For f: R^n -> R^m and a point x, J = df/dx is m x n. Two products give everything else: ``vjp(u) = Jᵀu`` (reverse mode) and
``jvp(v) = Jv`` (forward mode); they are adjoint, <u, Jv> = <Jᵀu, v>. A dense J is m reverse products, taken in chunks:
one forward pass, then ``vmap`` over stacked cotangents, about 1.1 to 1.4 plain forward passes each.

A forward product is the reverse product of the reverse product: g(u) = Jᵀu is linear, so its own transpose is J. One graph of g is
kept for all of them, so none computes the function again. A backward that cannot be differentiated gives zeros there without a
word, so the graph is used only when it passes <u, Jv> = <Jᵀu, v>; forward-mode differentiation takes over where it does not.

Nothing here knows of diffusion. What forward products need of a network is arranged by :mod:`.forward_mode`, scoped to the product.

A black box without gradients (an ONNX session, a compiled engine, a remote call) has Jv by central differences
(:mod:`.difference`) and no Jᵀu: reverse products are refused, unless the user states that J is symmetric, as the Jacobian of an
exact score is and that of a trained network nearly.

In plain forward passes per product (benchmarks/products.py), for chunks of 32, of 4 and a single vector: reverse 1.4, 1.6, 3.2;
forward by the transpose of the transpose 2.5, 1.8, 3.9; forward mode 3.5, 4.9, 16. Reverse products work with the default attention
kernels; second derivatives and forward mode fail there ("Trying to use forward AD with
_scaled_dot_product_flash_attention_for_cpu that does not support it").
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from .difference import (
    BatchedMap,
    CountedMap,
    central_difference_columns,
    choose_step,
    is_out_of_memory,
    require_finite,
    smaller_chunk,
)
from .forward_mode import forward_mode

Derivative = Literal["autograd", "difference"]
DENSE_BLOCK = 256  # rows of the identity made at once by dense()


class Jacobian:
    """J = df/dx of ``fn`` at ``x``, as products that are counted; exact, or by differences for a black box.

    Args:
        fn: Maps one point (*dims) to one output (*out). Must be deterministic.
        x: The point, shape (*dims), floating, at least float32.
        batched_fn: The same map on a stack, (K, *dims) -> (K, *out); lets fallback and differences share forward passes.
        chunk_size: Products taken at once in :meth:`dense` and for stacks; halved when memory runs out.
        derivative: "autograd" (exact), or "difference" for a function that gives no gradients.
        symmetric: States that J is symmetric, so that differences may stand in for reverse products.
        scale: Length in x on which J changes, for the difference step; the noise sigma_t for a denoiser.
        generator: Directions along which the difference step is chosen; a fixed seed by default.
        cancellation: Size of what cancels inside J: 1 for I - sigma J_eps, whose rounding is that of the identity.

    Attributes:
        products: Products spent so far (each vector of a stack is one; a central difference is one). The check of a backend is
            not counted: two products of each kind, once. Nor is the choice of a difference step: ``step_products``.
        backend: How products are taken: "vmap_vjp", or after a refusal by torch "stacked_grad" (one stacked
            forward per chunk; needs ``batched_fn``) or "looped_grad" (one forward, one backward per vector); "difference".
        fallback_reason: torch's words when ``backend`` is a refusal's, else None.
        forward_backend: "double_vjp", or after a refusal by torch "vmap_jvp", or "looped_jvp" for a function that cannot run under
            vmap (it draws random numbers), or "double_grad" for one that no function transform can run (it goes through NumPy).
        forward_fallback_reason: torch's words then, else None.
        chunk_reductions: How often the chunk size was halved because memory ran out.
        step: The difference step h, and ``step_error`` the estimated error of one column it leaves; None and 0 for autograd.

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
        derivative: Derivative = "autograd",
        symmetric: bool = False,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        cancellation: float = 0.0,
    ) -> None:
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"x has dtype {x.dtype}. Expected float32 or float64: derivatives are not taken in less.")
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}. Expected at least 1.")
        if derivative not in get_args(Derivative):
            raise ValueError(f"derivative={derivative!r}. Expected one of {get_args(Derivative)}.")
        self.fn, self.batched_fn, self.chunk_size = fn, batched_fn, chunk_size
        self.derivative, self.symmetric, self.scale, self._generator = derivative, symmetric, scale, generator
        self.cancellation, self.x = cancellation, x.detach().clone()
        self.products = self.chunk_reductions = 0
        self.backend = "vmap_vjp" if derivative == "autograd" else "difference"
        self.fallback_reason: str | None = None
        self.forward_backend = "double_vjp" if derivative == "autograd" else "difference"
        self.forward_fallback_reason: str | None = None
        self.step: float | None = None
        self.step_error, self.step_products = 0.0, 0
        self._value: Tensor | None = None
        self._pullback: Callable[[Tensor], Tensor] | None = None
        self._pushforward: Callable[[Tensor], Tensor] | None = None

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

    def rounding(self, largest: float) -> float:
        """Spectral norm of what rounding and differences add to a matrix of products, ``largest`` being J's own norm."""
        unit = torch.finfo(self.x.dtype).eps * math.sqrt(min(self.shape))
        return unit * (largest + self.cancellation) + self.step_error * math.sqrt(min(self.shape))

    @property
    def dense_products(self) -> int:
        """Products that :meth:`dense` takes."""
        return min(self.shape) if self.derivative == "autograd" else self.shape[1]

    @property
    def has_reverse(self) -> bool:
        """Whether :meth:`vjp` works."""
        return self.derivative == "autograd" or self.symmetric

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀu for u of shape (*out), or for a stack (K, *out); returns (*dims) or (K, *dims).

        Raises:
            TypeError: a black box that was not stated to be symmetric.
        """
        if not self.has_reverse:
            raise TypeError(
                "a black box (derivative='difference') has no reverse products. Expected a method that takes forward products "
                "only (dense, central_difference, a trace), or symmetric=True where you know that J is symmetric."
            )
        product = self._pull if self.derivative == "autograd" else self._differ
        return self._in_chunks(product, u, self.value.shape, "u")

    def jvp(self, v: Tensor) -> Tensor:
        """Jv for v of shape (*dims), or for a stack (K, *dims); returns (*out) or (K, *out)."""
        product = self._push if self.derivative == "autograd" else self._differ
        return self._in_chunks(product, v, self.x.shape, "v")

    def dense(self) -> Tensor:
        """J as a matrix (m, n), by as many products as its smaller side (its inputs, for a black box)."""
        outputs, inputs = self.shape
        reverse = outputs <= inputs and self.derivative == "autograd"
        size, shape = (outputs, self.value.shape) if reverse else (inputs, self.x.shape)
        rows = []
        for start in range(0, size, DENSE_BLOCK):
            count = min(DENSE_BLOCK, size - start)
            basis = torch.zeros(count, size, dtype=self.x.dtype, device=self.x.device)
            basis[torch.arange(count), torch.arange(start, start + count)] = 1
            basis = basis.reshape(count, *shape)
            rows.append((self.vjp(basis) if reverse else self.jvp(basis)).flatten(1))
        matrix = torch.cat(rows)
        return matrix if reverse else matrix.T

    def _in_chunks(self, product: Callable[[Tensor], Tensor], vectors: Tensor, shape: torch.Size, name: str) -> Tensor:
        """``product`` over a stack (which may be empty) or one vector, in chunks that are halved when memory runs out."""
        single = vectors.shape == shape
        stack = vectors[None] if single else vectors
        if stack.shape[1:] != shape or stack.ndim != len(shape) + 1:
            raise ValueError(f"{name} has shape {tuple(vectors.shape)}. Expected {tuple(shape)} or (K, *{tuple(shape)}).")
        stack, results, start = stack.to(self.x), [], 0
        while start < len(stack):
            chunk = stack[start : start + self.chunk_size]
            try:
                with torch.autocast(self.x.device.type, enabled=False):
                    results.append(product(chunk))
            except RuntimeError as error:
                self._shrink(error, len(chunk))
                continue
            self.products += len(chunk)
            start += len(chunk)
        if not results:
            return stack.new_empty(0, *(self.x if name == "u" else self.value).shape)
        result = torch.cat(results)
        return result[0] if single else result

    def _shrink(self, error: RuntimeError, size: int) -> None:
        """Halves the chunk size after running out of memory, and says so; raises ``error`` if that is not what happened."""
        self.chunk_size = smaller_chunk(error, size)
        self.chunk_reductions += 1

    def _linearise(self) -> None:
        """One forward pass, kept for all reverse products; a plain one where torch refuses or there are none."""
        value = None
        if self.derivative == "autograd":
            try:
                with torch.enable_grad(), torch.autocast(self.x.device.type, enabled=False):
                    value, self._pullback = torch.func.vjp(self.fn, self.x)
            except RuntimeError as error:
                self._fall_back(error)
        if value is None:
            with torch.no_grad():
                value = self.fn(self.x)
        self._value = require_finite(value.detach().clone(), "the function at x")

    def _fall_back(self, error: RuntimeError) -> None:
        if is_out_of_memory(error):
            raise error
        self.backend = "looped_grad" if self.batched_fn is None else "stacked_grad"
        self.fallback_reason = _first_line(error)

    def _pull(self, stack: Tensor) -> Tensor:
        """Jᵀ of a stack (K, *out) -> (K, *dims), by the first backend that torch accepts; the choice is remembered."""
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
        return torch.autograd.grad(_with_graph(self.batched_fn(points)), points, stack)[0]

    def _looped_grad(self, stack: Tensor) -> Tensor:
        point = self.x.clone().requires_grad_(True)
        output = _with_graph(self.fn(point))
        return torch.stack([torch.autograd.grad(output, point, u, retain_graph=True)[0] for u in stack])

    def _push(self, stack: Tensor) -> Tensor:
        """J of a stack (K, *dims) -> (K, *out), by the first backend that torch accepts; the choice is remembered."""

        def product(v: Tensor) -> Tensor:
            return torch.func.jvp(self.fn, (self.x,), (v,))[1]

        backends: dict[str, Callable[[Tensor], Tensor]] = {
            "double_vjp": self._double_vjp,
            "vmap_jvp": torch.func.vmap(product),
            "looped_jvp": lambda vectors: torch.stack([product(v) for v in vectors]),
            "double_grad": self._double_grad,
        }
        names = list(backends)
        for name in names[names.index(self.forward_backend) :]:
            try:
                with forward_mode(twice_reversed="double" in name), torch.set_grad_enabled("double" in name):
                    result = backends[name](stack).detach()
            except RuntimeError as error:
                if is_out_of_memory(error) or name == names[-1]:
                    raise
                self.forward_fallback_reason = _first_line(error)
                continue
            self.forward_backend = name
            return require_finite(result, "a forward product")
        raise AssertionError("unreachable: the last backend returns or raises")

    def _double_vjp(self, stack: Tensor) -> Tensor:
        """J of a stack as the transpose of u -> Jᵀu, whose graph is kept."""
        if self._pushforward is None:

            def transposed(u: Tensor) -> Tensor:
                return torch.func.vjp(self.fn, self.x)[1](u)[0]

            pushforward = torch.func.vjp(transposed, torch.zeros_like(self.value))[1]
            push = torch.func.vmap(lambda v: pushforward(v)[0])
            self._check_adjoint(push)
            self._pushforward = push
        return self._pushforward(stack)

    def _double_grad(self, stack: Tensor) -> Tensor:
        """J of a stack as the transpose of the transpose in plain autograd, for a function that no function transform can run."""
        if self._pushforward is None:
            point = self.x.clone().requires_grad_(True)
            u = torch.zeros_like(self.value, requires_grad=True)
            pulled = torch.autograd.grad(_with_graph(self.fn(point)), point, u, create_graph=True)[0]

            def push(vectors: Tensor) -> Tensor:
                return torch.stack([torch.autograd.grad(pulled, u, v, retain_graph=True)[0] for v in vectors])

            self._check_adjoint(push)
            self._pushforward = push
        return self._pushforward(stack)

    def _check_adjoint(self, push: Callable[[Tensor], Tensor]) -> None:
        """RuntimeError unless <u, Jv> = <Jᵀu, v> for two random pairs, to a thousandth of their typical size."""
        generator = torch.Generator().manual_seed(0)
        u, v = (torch.randn(2, *shape, generator=generator).to(self.x) for shape in (self.value.shape, self.x.shape))
        pushed, pulled = push(v).flatten(1), self._pull(u).flatten(1)
        left, right = (pushed * u.flatten(1)).sum(dim=1), (pulled * v.flatten(1)).sum(dim=1)
        typical = pushed.norm(dim=1) + pulled.norm(dim=1)
        if not ((left - right).abs() <= 1e-3 * typical).all():
            raise RuntimeError("the backward of the function cannot be differentiated: <u, Jv> differs from <Jᵀu, v>")

    def _differ(self, stack: Tensor) -> Tensor:
        """J of a stack by central differences along the normalised vectors."""
        batched = self.batched_fn or (lambda points: torch.stack([self.fn(p) for p in points]))
        if self.step is None:
            generator = self._generator or torch.Generator().manual_seed(0)
            counted = CountedMap(batched)
            self.step, self.step_error = choose_step(counted, self.x, scale=self.scale, generator=generator)
            self.step_products = counted.evaluations // 2
        lengths = stack.flatten(1).norm(dim=1).reshape(-1, *[1] * self.x.ndim)
        directions = stack / lengths.clamp_min(torch.finfo(stack.dtype).tiny)
        options = {"chunk_size": self.chunk_size, "shrink": False}  # _in_chunks shrinks, and remembers
        columns, _ = central_difference_columns(batched, self.x, directions, self.step, **options)
        return columns.reshape(len(stack), *self.value.shape) * lengths.reshape(-1, *[1] * self.value.ndim)


def _with_graph(output: Tensor) -> Tensor:
    if not output.requires_grad:
        expected = "Expected one that can be differentiated. For a black box pass derivative='difference'."
        raise RuntimeError(f"the function gives no gradients: it left torch, or detached its result. {expected}")
    return output


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
