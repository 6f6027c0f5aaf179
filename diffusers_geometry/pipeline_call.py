"""One call of a pipeline, and how to make it again in private: same arguments, same random numbers, nothing of the user's touched.

A private run has a shallow copy of the pipeline with a scheduler of its own. What a pipeline converts for the length of its loop (a
half precision autoencoder raised to float32) is left alone: probes see float32 weights already, and assigning weights while a
derivative is taken through the call ends the process.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from .precision import map_tensors, to_float32

_CALLBACKS = ("callback", "callback_on_step_end")


class EndOfRun(BaseException):
    """Ends a private run of the pipeline; not an Exception, so that no pipeline swallows it."""


class StepOutput(tuple):
    """What a pipeline reads of a scheduler step: ``.prev_sample``, or the first item of a tuple."""

    @property
    def prev_sample(self) -> Tensor:
        """The sample that the loop goes on with."""
        return self[0]


@dataclass
class PipelineCall:
    """One call of a pipeline, with what is needed to repeat its conditioning.

    Attributes:
        pipe: The pipeline.
        pipeline_class: Its class.
        arguments: Keyword arguments of the call (positional ones bound to their names), callbacks left out.
        generator_states: States that the call's generators had at its start.
        rng_states: States of torch's global generators at its start, per device type.
        positional: What the call passed through a ``*args``, with everything before it.
    """

    pipe: Any
    pipeline_class: type
    arguments: dict[str, Any]
    generator_states: list[tuple[torch.device, Tensor]] = field(default_factory=list)
    rng_states: dict[str, Any] = field(default_factory=dict)
    positional: tuple = ()

    @classmethod
    def capture(cls, pipe: Any, pipeline_class: type, args: tuple, kwargs: dict) -> PipelineCall:
        """Takes down the call ``pipe(*args, **kwargs)`` before it is made."""
        bound = inspect.signature(pipeline_class.__call__).bind(pipe, *args, **kwargs)
        arguments, positional = dict(list(bound.arguments.items())[1:]), ()
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                # Python binds what stands before *args by position too.
                before = list(bound.signature.parameters)[1 : list(bound.signature.parameters).index(name)]
                positional = (*(arguments.pop(n) for n in before if n in arguments), *arguments.pop(name, ()))
        arguments = {k: v for k, v in arguments.items() if k not in _CALLBACKS}
        generators = generators_of(arguments)
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
        states_of = [(g.device, g.get_state()) for g in generators]
        return cls(pipe, pipeline_class, arguments, states_of, states, positional)

    def replayed_arguments(self) -> dict[str, Any]:
        """The arguments with fresh generators in the recorded states."""
        arguments = dict(self.arguments)
        if self.generator_states:
            fresh = []
            for device, state in self.generator_states:
                fresh.append(torch.Generator(device))
                fresh[-1].set_state(state)
            arguments["generator"] = fresh if isinstance(arguments["generator"], (list, tuple)) else fresh[0]
        return arguments

    @contextmanager
    def global_rng(self) -> Any:
        """A scope in which torch's global generators are in the recorded states; the current ones return afterwards."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if "cuda" in self.rng_states else []):
            torch.set_rng_state(self.rng_states["cpu"])
            if "cuda" in self.rng_states:
                torch.cuda.set_rng_state_all(self.rng_states["cuda"])
            yield


def generators_of(arguments: dict[str, Any]) -> Sequence[torch.Generator]:
    """The generators among keyword arguments: a list of them, one, or none."""
    given = arguments.get("generator")
    return given if isinstance(given, (list, tuple)) else [given] if given is not None else []


def step_arguments(scheduler: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a ``scheduler.step`` by name, as its class names them; what stands in for it may take ``*args``."""
    names = list(inspect.signature(type(scheduler).step).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


@contextmanager
def keeping_attention_processors(pipe: Any) -> Iterator[None]:
    """Puts back attention processors that a pipeline swaps for the length of its loop, also when the loop is left early."""
    networks = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    held = [(part, part.processor) for m in networks for part in m.modules() if hasattr(part, "processor")]
    try:
        yield
    finally:
        for part, processor in held:
            if part.processor is not processor:
                part.set_processor(processor) if hasattr(part, "set_processor") else setattr(part, "processor", processor)


def private_pipeline(call: PipelineCall, scheduler: Any, *, own_precision: bool = False, **components: Any) -> Any:
    """A shallow copy of the call's pipeline with another scheduler, and other components where given.

    Its networks keep their dtype through the run, unless it is to run in its ``own_precision``.
    """
    pipe = copy.copy(call.pipe)
    pipe.__class__ = call.pipeline_class
    modules = {name: m for name, m in call.pipe.components.items() if isinstance(m, nn.Module)}
    networks = modules if own_precision else {name: _staying(m) for name, m in modules.items()}
    if not own_precision and hasattr(pipe, "encode_prompt"):  # whose dtype pipelines give to what their networks see
        components = {"encode_prompt": _float32_of(pipe.encode_prompt)} | components
    guiders = {name: copy.copy(g) for name, g in call.pipe.components.items() if isinstance(g, diffusers.guiders.BaseGuidance)}
    pipe.__dict__.update(networks | guiders | components, scheduler=scheduler, _progress_bar_config={"disable": True})
    return pipe


def _staying(module: nn.Module) -> nn.Module:
    """A shallow copy of a network that keeps its dtype."""
    if hasattr(module, "_orig_mod"):  # a compiled network holds on to itself
        return module
    twin = copy.copy(module)

    @functools.wraps(module.to)
    def to(*args: Any, **kwargs: Any) -> nn.Module:
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and any(p.device != device for p in module.parameters()):
            module.to(device)
        return twin

    twin.to = to
    for name in ("encode", "decode"):  # of autoencoders, whose inputs no hook on forward sees
        if callable(getattr(module, name, None)):
            setattr(twin, name, _raised(getattr(module, name)))
    return twin


def _float32_of(method: Callable) -> Callable:
    """A method whose half precision results are raised to float32."""

    @functools.wraps(method)
    def raised(*args: Any, **kwargs: Any) -> Any:
        return map_tensors(method(*args, **kwargs), to_float32)

    return raised


def _raised(method: Callable) -> Callable:
    """A method whose half precision inputs are raised to float32, as its weights are while it is probed."""

    @functools.wraps(method)
    def raised(*args: Any, **kwargs: Any) -> Any:
        return method(*map_tensors(args, to_float32), **map_tensors(kwargs, to_float32))

    return raised


def _with_gradients(block: Any) -> Any:
    """A copy of a modular pipeline's block, and of those inside it, that does not switch gradients off."""
    block_class = type(block)
    twin, inner = copy.copy(block), torch.enable_grad()(inspect.unwrap(block_class.__call__))
    twin.__class__ = type(block_class.__name__, (block_class,), {"__call__": inner, "__module__": block_class.__module__})
    twin.sub_blocks = copy.copy(block.sub_blocks)
    for name, part in block.sub_blocks.items():
        twin.sub_blocks[name] = _with_gradients(part)
    return twin


def run_privately(call: PipelineCall, pipe: Any, *, own_precision: bool = False, **changed: Any) -> Any:
    """Repeats the call on a private pipeline, with gradients where they are enabled; None when :class:`EndOfRun` ended it.

    Args:
        call: The recorded call.
        pipe: From :func:`private_pipeline`.
        own_precision: As there; else half precision arguments are raised to float32.
        **changed: Arguments of the call that differ.
    """
    run = call.pipeline_class.__call__
    if torch.is_grad_enabled():
        run = inspect.unwrap(run)  # past diffusers' @torch.no_grad
        if isinstance(pipe, diffusers.ModularPipeline):
            pipe.__dict__["_blocks"] = _with_gradients(pipe._blocks)
    try:
        with call.global_rng(), keeping_attention_processors(pipe):
            arguments = call.replayed_arguments() | changed
            return run(pipe, *call.positional, **arguments if own_precision else map_tensors(arguments, to_float32))
    except EndOfRun:
        return None
