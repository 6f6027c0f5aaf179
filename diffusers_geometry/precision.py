"""Probing a pipeline's networks in float32 and without parameter gradients, leaving the user's modules as they are.

Within :meth:`ProbeWeights.scope` every parameter and floating buffer of the given modules is replaced by a detached float32
tensor (the same storage when it is float32 already, a cached copy when it is half precision), and the floating inputs of a half
precision module are raised to float32. On leaving, the original objects are put back: same tensors, same dtype, same flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """``function`` applied to every tensor inside nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, function) for item in value)
    return value


def to_float32(value: Tensor) -> Tensor:
    """A half precision tensor in float32, any other as it is."""
    return value.float() if value.dtype in HALF else value


def is_half(module: nn.Module) -> bool:
    """Whether any weight of the module is in half precision."""
    return any(p.dtype in HALF for p in module.parameters())


class ProbeWeights:
    """The float32, gradient-free weights of some modules, swapped in for the duration of a probe.

    Args:
        modules: The networks that probes will call.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._depth = 0

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Probe weights inside, the user's own outside; may be nested."""
        if self._depth:
            yield
            return
        self._depth += 1
        with ExitStack() as restore:
            restore.callback(self._leave)
            for module in self.modules:
                if is_half(module):
                    handle = module.register_forward_pre_hook(self._raise_inputs, with_kwargs=True, prepend=True)
                    restore.callback(handle.remove)
                for part in module.modules():
                    for tensors in (part._parameters, part._buffers):
                        restore.callback(tensors.update, dict(tensors))
                        tensors.update({name: self._probe(t) for name, t in tensors.items() if t is not None})
            yield

    def _leave(self) -> None:
        self._depth -= 1

    def _probe(self, tensor: Tensor) -> Tensor:
        if tensor.dtype not in HALF:
            return tensor.detach()
        held = self._copies.get(id(tensor))
        if held is None or held[0] is not tensor:
            held = self._copies[id(tensor)] = (tensor, tensor.detach().float())
        return held[1]

    @staticmethod
    def _raise_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return map_tensors(args, to_float32), map_tensors(kwargs, to_float32)
