"""The activations of a network at a point, seen without touching the network.

A piecewise linear activation bends at its *knots*: ReLU at 0, ReLU6 at 0 and 6, |x| at 0, max(a, b) where a = b. Which piece a unit
is on is a small number, 0 below its first knot; a knot lies between two points where that number differs. This is exact. SiLU,
GELU, Mish and the gates of gated units bend everywhere; for them the zero of the (gate's) pre-activation stands in, as a *proxy*.
tanh is nearly linear at its zero, so nothing stands in for it.

A :class:`~torch.overrides.TorchFunctionMode` sees every call of a torch function in its scope: functional, method or module, in
place or not. Nothing is patched and no hook is set; the names of layers are read from the Python stack. What runs below torch
functions (TorchScript, recurrent layers) cannot be seen there; a dispatch mode finds out that it did, and it is reported.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["exact", "proxy"]
Knots = tuple[Any, ...]  # numbers, or tensors that broadcast with the pre-activation


@dataclass(frozen=True)
class Activation:
    """One activation call at one point.

    Attributes:
        function: Name of the torch function.
        module: Path of the innermost module that made the call, "" for the outermost or none; None where it was not asked for.
        kind: "exact" or "proxy".
        knots: Knots per unit.
        pieces: The piece each unit is on, uint8, shape of the pre-activation.
        checksum: Sums of the pre-activation and of its absolute value, shape (2,).
    """

    function: str
    module: str | None
    kind: Kind
    knots: int
    pieces: Tensor
    checksum: Tensor


def _at(*knots: float) -> Callable[..., tuple[Tensor, Knots]]:
    return lambda input, *args, **kwargs: (input, knots)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> tuple[Tensor, Knots]:
    return input, () if negative_slope == 1 else (0.0,)


def _threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> tuple[Tensor, Knots]:
    return input, (threshold,)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> tuple[Tensor, Knots]:
    return input, (min_val, max_val)


def _shrink(input: Tensor, lambd: float = 0.5) -> tuple[Tensor, Knots]:
    return input, (-lambd, lambd)


def _clamp(input: Tensor, min: Any = None, max: Any = None, **kwargs: Any) -> tuple[Tensor, Knots]:
    return input, tuple(bound for bound in (min, max) if bound is not None)


def _bound(input: Tensor, min: Any = None, max: Any = None, **kwargs: Any) -> tuple[Tensor, Knots]:
    return input, (max if min is None else min,)


def _larger(input: Tensor, other: Any = None, *args: Any, **kwargs: Any) -> tuple[Tensor, Knots] | None:
    return (input, (other,)) if isinstance(other, Tensor) else None


def _glu(input: Tensor, dim: int = -1) -> tuple[Tensor, Knots]:
    return input.chunk(2, dim)[1], (0.0,)


EXACT: dict[str, Callable[..., tuple[Tensor, Knots] | None]] = {
    **dict.fromkeys(("relu", "prelu", "rrelu", "abs", "absolute"), _at(0.0)),
    **dict.fromkeys(("hardshrink", "softshrink"), _shrink),
    **dict.fromkeys(("clamp", "clip"), _clamp),
    **dict.fromkeys(("clamp_min", "clamp_max"), _bound),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin", "max", "min"), _larger),
    "relu6": _at(0.0, 6.0),
    "leaky_relu": _leaky_relu,
    "threshold": _threshold,
    "hardtanh": _hardtanh,
    "hardsigmoid": _at(-3.0, 3.0),
}
PROXY: dict[str, Callable[..., tuple[Tensor, Knots] | None]] = {
    **dict.fromkeys(("silu", "gelu", "mish", "elu", "selu", "celu", "softplus", "log_sigmoid"), _at(0.0)),
    **dict.fromkeys(("sigmoid", "special_expit"), _at(0.0)),  # gates of units written out by hand: x sigmoid(x)
    "hardswish": _at(-3.0, 3.0),
    "glu": _glu,
}
# They bend or jump, at places that belong to no single unit or that their arguments do not tell.
NOT_COUNTED = frozenset({
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "fractional_max_pool2d", "fractional_max_pool3d", "max", "min", "amax", "amin", "aminmax", "median", "sort", "topk", "where",
    "round", "floor", "ceil", "trunc", "sign", "sgn", "heaviside",
})  # fmt: skip
# Activations as the dispatcher names them. Outside of a call that was seen, they were hidden below torch functions.
DISPATCHED = frozenset({
    "relu", "relu_", "leaky_relu", "leaky_relu_", "_prelu_kernel", "threshold", "threshold_", "hardtanh", "hardtanh_",
    "hardsigmoid", "hardswish", "silu", "silu_", "gelu", "mish", "elu", "elu_", "softplus", "log_sigmoid_forward", "glu",
    "sigmoid", "sigmoid_", "mkldnn_rnn_layer",
})  # fmt: skip
_DROPOUTS = frozenset({
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "rrelu",
    "batch_norm",
})  # fmt: skip
_TRAINING_ARGUMENT = {"rrelu": 3, "batch_norm": 5}  # where the others have theirs third


class ActivationRecorder(TorchFunctionMode):
    """A scope that takes down every activation call.

    Args:
        until: Name the calls, by the modules on the Python stack up to the frame of this code.

    Attributes:
        activations: The calls in their order.
        uncounted: Names of functions with kinks or jumps that are not counted.

    Raises:
        RuntimeError: dropout, or a batch norm over the batch, inside the scope.
    """

    def __init__(self, until: CodeType | None = None) -> None:
        super().__init__()
        self.activations: list[Activation] = []
        self.uncounted: set[str] = set()
        self.inside = False
        self._until, self._paths = until, {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in _DROPOUTS:
            _refuse_training(name, args, kwargs)
        rule = EXACT.get(name) or PROXY.get(name)
        if rule is None and name not in NOT_COUNTED:
            return func(*args, **kwargs)
        self.inside = True
        try:
            found = rule(*args, **_renamed(kwargs)) if rule else None
            if found is not None:
                self._take_down(name, *found)
            elif name in NOT_COUNTED:
                self.uncounted.add(name)
            return func(*args, **kwargs)
        finally:
            self.inside = False

    def _take_down(self, function: str, units: Tensor, knots: Knots) -> None:
        if not knots or not units.is_floating_point():
            return
        pieces = sum((units > knot).to(torch.uint8) for knot in knots)
        values = units if units.dtype in (torch.float32, torch.float64) else units.float()
        checksum = torch.stack([values.sum(), values.abs().sum()])
        kind: Kind = "exact" if function in EXACT else "proxy"
        module = self._path() if self._until else None
        self.activations.append(Activation(function, module, kind, len(knots), pieces, checksum))

    def _path(self) -> str:
        """Path of the innermost module on the Python stack within the outermost, both above the frame of ``until``."""
        modules, frame = [], sys._getframe(1)
        while frame is not None and frame.f_code is not self._until:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                modules.append(owner)
            frame = frame.f_back
        if not modules:
            return ""
        root = modules[-1]
        if id(root) not in self._paths:
            self._paths[id(root)] = {id(module): name for name, module in root.named_modules()}
        return next((self._paths[id(root)][id(m)] for m in modules if id(m) in self._paths[id(root)]), "")


class HiddenActivations(TorchDispatchMode):
    """Adds to a recorder's ``uncounted`` the activations that ran where torch functions are not seen."""

    def __init__(self, recorder: ActivationRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in DISPATCHED and not self.recorder.inside:
            self.recorder.uncounted.add(f"hidden {name.strip('_')}")
        return func(*args, **(kwargs or {}))


def layer_names(activations: list[Activation]) -> list[str]:
    """One name per call: the module's path, or the function's name where there is none; "#2" for the second of a name."""
    seen: Counter = Counter()
    names = []
    for activation in activations:
        base = activation.module or activation.function
        seen[base] += 1
        names.append(base if seen[base] == 1 else f"{base}#{seen[base]}")
    return names


def _renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"input" if name == "self" else name: value for name, value in kwargs.items()}


def _refuse_training(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """RuntimeError when a random or batch-coupled layer is in training mode."""
    place = _TRAINING_ARGUMENT.get(name, 2)
    default = name in ("dropout", "dropout1d", "dropout2d", "dropout3d")
    training = kwargs.get("training", kwargs.get("train", args[place] if len(args) > place else default))
    rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5) if name not in _TRAINING_ARGUMENT else 1.0
    if training and rate:
        raise RuntimeError(
            f"{name} is in training mode. Expected a deterministic network whose samples do not influence one another: call "
            ".eval() on it first."
        )
