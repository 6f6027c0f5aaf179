"""What diffusers networks need so that forward products of their Jacobians work and are cheap; nothing outlives the scope.

Attention in plain arithmetic (fused kernels have no forward and no second derivative), contiguous input to group norms (their
forward derivative cannot view channels-last activations), and for the reverse of the reverse a convolution whose backward is
written as a transposed convolution: torch's own second derivative of a convolution also computes the weights' part, which costs as
much again and is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def forward_mode(*, twice_reversed: bool = False) -> Iterator[None]:
    """A scope in which forward-mode derivatives of diffusers networks work, or with ``twice_reversed`` reverse of reverse."""
    with sdpa_kernel(SDPBackend.MATH), _Arranged(twice_reversed):
        yield


class _Arranged(TorchFunctionMode):
    """Hands group norms and convolutions over in the form that can be differentiated."""

    def __init__(self, twice_reversed: bool) -> None:
        super().__init__()
        self.twice_reversed = twice_reversed

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (functional.group_norm, torch.group_norm) and args:
            args = (args[0].contiguous(), *args[1:])
        if self.twice_reversed and func in (functional.conv2d, torch.conv2d):
            return _convolution(*args, **kwargs)
        return func(*args, **kwargs)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``conv2d`` with the cheap second derivative; as torch has it where the padding is a word ("same")."""
    if isinstance(padding, str):
        return functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _Convolution.apply(input, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


class _Convolution(torch.autograd.Function):
    """conv2d, differentiable with respect to its input only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple, padding: tuple, dilation: tuple, groups: int
    ) -> Tensor:
        return functional.conv2d(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        image, weight, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
        ctx.size = image.shape[-2:]
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (weight,) = ctx.saved_tensors
        geometry = zip(ctx.size, grad.shape[-2:], ctx.stride, ctx.padding, ctx.dilation, weight.shape[-2:], strict=True)
        left_over = [n - ((g - 1) * s - 2 * p + d * (k - 1) + 1) for n, g, s, p, d, k in geometry]
        pulled = functional.conv_transpose2d(grad, weight, None, ctx.stride, ctx.padding, left_over, ctx.groups, ctx.dilation)
        return pulled, None, None, None, None, None, None
