"""Probing a pipeline's networks in float32 and without parameter gradients, leaving the user's modules as they are.

Within :meth:`ProbeWeights.scope` every parameter and floating buffer of the given modules is replaced by a detached float32
tensor (the same storage when it is float32 already, a cached copy when it is half precision), and the floating inputs of a half
precision module are raised to float32. On leaving, the original objects are put back: same tensors, same dtype, same flags.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


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

    Within a scope networks also run uncompiled, without autocast and without gradient checkpointing, none of which a derivative in
    float32 survives. Scopes over the same modules wait for one another, also between threads.

    Args:
        modules: The networks that probes will call.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self._copies: dict[int, tuple[Tensor, int, nn.Parameter]] = {}
        self._depth = 0

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Probe weights inside, the user's own outside; may be nested.

        Raises:
            ValueError: a network was put into train mode since it was recorded.
        """
        with ExitStack() as restore:
            for lock in sorted({_LOCKS.setdefault(m, threading.RLock()) for m in self.modules}, key=id):
                restore.enter_context(lock)
            if self._depth:
                yield
                return
            self._depth += 1
            restore.callback(self._leave)
            if any(_is_compiled(part) for m in self.modules for part in m.modules()):
                restore.enter_context(torch.compiler.set_stance("force_eager"))
            for kind in {p.device.type for m in self.modules for p in m.parameters()} - {"meta"} | _accelerator():
                restore.enter_context(torch.autocast(kind, enabled=False))
            for module in self.modules:
                self._enter(module, restore)
            yield

    def _enter(self, module: nn.Module, restore: ExitStack) -> None:
        if module.training:
            raise ValueError(f"{type(module).__name__} was put into train mode. Expected eval mode while it is probed.")
        if is_half(module):
            handle = module.register_forward_pre_hook(self._raise_inputs, with_kwargs=True, prepend=True)
            restore.callback(handle.remove)
        for part in module.modules():
            if getattr(part, "gradient_checkpointing", False):
                restore.callback(setattr, part, "gradient_checkpointing", True)
                part.gradient_checkpointing = False
            for tensors in (part._parameters, part._buffers):
                restore.callback(tensors.update, dict(tensors))
                tensors.update({name: self._probe(t) for name, t in tensors.items() if t is not None})

    def _leave(self) -> None:
        self._depth -= 1

    def _probe(self, tensor: Tensor) -> Tensor:
        """The tensor without gradients, half precision raised; a parameter stays one, as offloading hooks expect."""
        if tensor.dtype not in HALF:
            return self._alike(tensor, tensor.detach())
        held = self._copies.get(id(tensor))
        if held is None or held[0] is not tensor or held[1] != tensor._version:
            raised = self._alike(tensor, tensor.detach().float())
            held = self._copies[id(tensor)] = (tensor, tensor._version, raised)
        return held[2]

    @staticmethod
    def _alike(original: Tensor, value: Tensor) -> Tensor:
        return nn.Parameter(value, requires_grad=False) if isinstance(original, nn.Parameter) else value

    @staticmethod
    def _raise_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return map_tensors(args, to_float32), map_tensors(kwargs, to_float32)


def _accelerator() -> set[str]:
    """The type of the accelerator in use, where offloaded weights go."""
    return {torch.accelerator.current_accelerator().type} if torch.accelerator.is_available() else set()


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def check_probeable(name: str, module: nn.Module) -> None:
    """Refuses what a probe cannot undo: train mode, weights cast layer by layer, a step cache.

    Raises:
        ValueError: it says what to switch off.
    """
    if module.training:
        raise ValueError(
            f"pipe.{name} is in train mode, where dropout makes every evaluation different. Expected eval mode: call "
            f"pipe.{name}.eval()."
        )
    registries = [part._diffusers_hook for part in module.modules() if hasattr(part, "_diffusers_hook")]
    if any("layerwise_casting" in str(hook) for registry in registries for hook in registry.hooks):
        raise ValueError(
            f"pipe.{name} casts its weights layer by layer, which cannot be differentiated through. Expected a network without "
            "enable_layerwise_casting: load it in float32, bfloat16 or float16."
        )
    if getattr(module, "is_cache_enabled", False):
        raise ValueError(
            f"pipe.{name} reuses results between steps, so that its output is not a function of the sample alone. Expected no "
            f"cache: call pipe.{name}.disable_cache()."
        )
