"""Probing a pipeline's networks in float32 and without parameter gradients, leaving the user's modules as they are.

Within :meth:`ProbeWeights.scope` every parameter and floating buffer of the given modules is replaced by a detached float32
tensor (the same storage when it is float32 already, a cached copy when it is half precision or less), and the floating inputs of
such a module are raised to float32. On leaving, the original objects are put back: same tensors, same dtype, same flags.

What diffusers hooks into a network's ``forward`` to save time or memory is passed by meanwhile, without being removed: step caches,
which make the output depend on earlier calls (they poison a difference by tens of per cent); layerwise casting, which rounds
weights inside the forward pass; group offloading, whose weights are copied to where it would load them.
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
_GROUP_OFFLOADING = "group_offloading"
_PASSED_BY = ("layerwise_casting", _GROUP_OFFLOADING, "lazy_prefetch_group_offloading", "layer_execution_tracker")
_CACHES = ("faster_cache", "fbc_", "mag_cache", "pyramid_attention_broadcast", "sea_cache", "taylorseer_cache", "text_kv_cache")
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


def out_of_inference(value: Any) -> Any:
    """The value with tensors made under ``torch.inference_mode`` copied, so that derivatives can be taken through them."""
    with torch.inference_mode(False):
        return map_tensors(value, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def to_float32(value: Tensor) -> Tensor:
    """A half precision tensor in float32, any other as it is."""
    return value.float() if value.dtype in HALF else value


def is_half(module: nn.Module) -> bool:
    """Whether any weight of the module is in half precision or less."""
    return any(_is_low(p) for p in module.parameters())


def _is_low(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def has_step_cache(module: nn.Module) -> bool:
    """Whether the network reuses results between calls (FirstBlockCache and its kin), however that was switched on."""
    return any(_is_cache(name, hook) for part in module.modules() for name, hook in _hooks(part).items())


def _is_cache(name: str, hook: Any) -> bool:
    """Whether a hook belongs to a step cache: by name, or because it keeps state."""
    return hook._is_stateful or name.startswith(_CACHES)


def _hooks(part: nn.Module) -> dict[str, Any]:
    """diffusers' hooks of one part of a network."""
    return part._diffusers_hook.hooks if hasattr(part, "_diffusers_hook") else {}


def _pass_by(hook: Any, restore: ExitStack) -> None:
    """Makes a hook do nothing until ``restore`` closes; it stays where it is and keeps its state."""
    chain = hook.fn_ref
    for name in ("pre_forward", "post_forward", "forward"):
        restore.callback(setattr, chain, name, getattr(chain, name))
    chain.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
    chain.post_forward = lambda module, output: output
    chain.forward = chain.original_forward or chain.forward


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
        self._onload_devices: dict[int, torch.device] = {}
        self._depth = 0

    @property
    def memory(self) -> int:
        """Bytes that the float32 copies of lower precision weights take, once probed."""
        tensors = {id(t): t for m in self.modules for t in (*m.parameters(), *m.buffers())}
        return sum(4 * t.numel() for t in tensors.values() if _is_low(t))

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Probe weights inside, the user's own outside; may be nested.

        Raises:
            ValueError: a network was put into train mode since it was recorded.
        """
        with self.untouched(), ExitStack() as restore:
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

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """A scope in which no other thread's probe weights are swapped in, so that the networks are as the user has them."""
        with ExitStack() as held:
            for lock in sorted({_LOCKS.setdefault(m, threading.RLock()) for m in self.modules}, key=id):
                held.enter_context(lock)
            yield

    def _enter(self, module: nn.Module, restore: ExitStack) -> None:
        if module.training:
            raise ValueError(f"{type(module).__name__} was put into train mode. Expected eval mode while it is probed.")
        if is_half(module):
            handle = module.register_forward_pre_hook(self._raise_inputs, with_kwargs=True, prepend=True)
            restore.callback(handle.remove)
        for part in module.modules():
            for name, hook in _hooks(part).items():
                if name == _GROUP_OFFLOADING:
                    self._onload(hook.group)
                if _is_cache(name, hook) or name in _PASSED_BY:
                    _pass_by(hook, restore)
        for part in module.modules():
            if getattr(part, "gradient_checkpointing", False):
                restore.callback(setattr, part, "gradient_checkpointing", True)
                part.gradient_checkpointing = False
            for tensors in (part._parameters, part._buffers):
                restore.callback(tensors.update, dict(tensors))
                tensors.update({name: self._probe(t) for name, t in tensors.items() if t is not None})

    def _leave(self) -> None:
        self._depth -= 1

    def _onload(self, group: Any) -> None:
        """Notes where the weights of an offloaded group are needed."""
        parts = [t for m in group.modules for t in (*m.parameters(), *m.buffers())]
        for tensor in (*parts, *(group.parameters or ()), *(group.buffers or ())):
            self._onload_devices[id(tensor)] = torch.device(group.onload_device)

    def _probe(self, tensor: Tensor) -> Tensor:
        """The tensor without gradients, half precision raised; a parameter stays one, as offloading hooks expect."""
        device = self._onload_devices.get(id(tensor), tensor.device)
        if not _is_low(tensor) and device == tensor.device:
            return self._alike(tensor, tensor.detach())
        held = self._copies.get(id(tensor))
        if held is None or held[0] is not tensor or held[1] != tensor._version:
            raised = self._alike(tensor, tensor.detach().to(device, torch.float32 if _is_low(tensor) else tensor.dtype))
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
    """Refuses train mode, whose dropout a probe cannot undo.

    Raises:
        ValueError: it says what to switch off.
    """
    if module.training:
        raise ValueError(
            f"pipe.{name} is in train mode, where dropout makes every evaluation different. Expected eval mode: call "
            f"pipe.{name}.eval()."
        )
