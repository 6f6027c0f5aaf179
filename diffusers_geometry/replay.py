"""Engine two: call the denoiser again with its recorded arguments and new samples, many stacked in one batch.

Of every network call made for step k the arguments are kept. The sample's place among them is the tensor (or list) that equals
c x, repeated r times along the batch; everything else whose leading dimension is the batch is conditioning and is tiled. How the
pipeline combined the r outputs (classifier-free guidance, a sign) is solved for as weights in least squares.

Agreement at the recorded point proves nothing: a non-linear combination (guidance_rescale, normalised guidance) fits there and has
a wrong derivative. So :mod:`.recorded_step` compares with :mod:`.drive` away from the trajectory before this engine is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .drive import own_channels
from .precision import HALF, map_tensors, to_float32

SEPARATE_TOLERANCE = 1e-5  # what the size of a batch may change by rounding


class ReplayRefused(RuntimeError):
    """Why a step cannot be replayed; the drive engine takes its place."""


@dataclass
class NetworkCall:
    """One call of a network within a step: the module, its arguments and what it returned."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any = None


@dataclass(frozen=True)
class _Slot:
    """Where the sample sits in a call: argument ``key`` holds ``repeats`` stacked copies of c_in x."""

    key: int | str
    repeats: int
    c_in: float
    is_list: bool
    item_shape: torch.Size


class Replay:
    """The model output of one step as a batched function of the sample.

    Args:
        sample: The scheduler's sample, (b, *dims).
        model_output: What the scheduler was given, (b, *dims).
        calls: The network calls of the step.

    Attributes:
        weights: Per network output (call by call, repeat by repeat), its weight in the model output.
        separable: Whether a branch may be evaluated without the others, see :meth:`separate`.

    Raises:
        ReplayRefused: a call does not contain the sample, or the outputs do not combine linearly to the model output.
    """

    def __init__(self, sample: Tensor, model_output: Tensor, calls: list[NetworkCall]) -> None:
        found = _calls_with_slots(calls, sample)
        if not found:
            raise ReplayRefused("no network of the pipeline was called with a rescaled copy of the sample")
        self.sample, self.calls, self.slots = sample, [call for call, _ in found], [slot for _, slot in found]
        outputs = [self._split(call.output, slot.repeats, 1, len(sample))[:, 0] for call, slot in found]
        self._returned = torch.cat(outputs)  # (number of outputs, b, *dims)
        self.weights, self.separable = _combination(self._returned, model_output), False

    def recorded(self, weights: Tensor) -> Tensor:
        """Model outputs (b, *dims) at the recorded sample with these weights, from what the networks returned: no evaluation."""
        return torch.tensordot(weights.to(self._returned), self._returned, dims=1)

    @property
    def c_in(self) -> float:
        """The scale with which the networks saw the sample."""
        return self.slots[0].c_in

    def fit(self, x: Tensor, model_output: Tensor) -> None:
        """Solves for the weights again, at a point (b, *dims) and in the precision in which the networks are called now."""
        outputs = []
        for call, slot in zip(self.calls, self.slots, strict=True):
            outputs.append(self._outputs(call, slot, x[None], None, range(slot.repeats))[:, 0])
        self.weights = _combination(torch.cat(outputs), model_output)

    def separate(self, x: Tensor) -> None:
        """Learns at a point (b, *dims) whether every copy of a call gives the same without the others.

        A branch is evaluated alone then; layers that mix the copies, as those of perturbed attention guidance do, forbid it.
        """
        self.separable = all(self._is_alone(call, slot, x[None]) for call, slot in zip(self.calls, self.slots, strict=True))

    def _is_alone(self, call: NetworkCall, slot: _Slot, points: Tensor) -> bool:
        if slot.repeats == 1:
            return True
        whole = self._outputs(call, slot, points, None, range(slot.repeats)).cpu().double()
        try:
            alone = torch.cat([self._outputs(call, slot, points, None, [r]) for r in range(slot.repeats)]).cpu().double()
        except RuntimeError:  # layers that cannot share this batch out
            return False
        return bool((alone - whole).norm() <= SEPARATE_TOLERANCE * whole.norm())

    def branch_weights(self, branch: str) -> Tensor:
        """Weights of "guided", "conditional" or "unconditional", shape (number of outputs,).

        Raises:
            ValueError: unknown branch, or one that this call did not compute.
        """
        if branch == "guided":
            return self.weights
        if branch not in ("conditional", "unconditional"):
            raise ValueError(f"branch={branch!r}. Expected 'guided', 'conditional' or 'unconditional'.")
        if len(self.weights) == 1 and branch == "conditional":
            return self.weights
        if len(self.weights) != 2:
            raise ValueError(
                f"branch={branch!r}, but the step made {len(self.weights)} network outputs. Expected two, a conditional and an "
                "unconditional one: set a guidance_scale above 1, or use branch='guided'."
            )
        total = self.weights.sum()
        conditional = int((self.weights / total).argmax())
        chosen = conditional if branch == "conditional" else 1 - conditional
        return torch.zeros_like(self.weights).index_fill(0, torch.tensor([chosen]), total.item())

    def __call__(self, points: Tensor, weights: Tensor, index: int | None = None) -> Tensor:
        """Model outputs at stacked points.

        Args:
            points: (K, b, *dims), or (K, 1, *dims) for one sample of the batch.
            weights: From :meth:`branch_weights`.
            index: That sample's position; its conditioning is used.
        """
        total, used = torch.zeros_like(points), 0
        for call, slot in zip(self.calls, self.slots, strict=True):
            share = weights[used : used + slot.repeats].tolist()
            used += slot.repeats
            copies = [r for r, weight in enumerate(share) if weight or not self.separable]
            if any(share):
                outputs = self._outputs(call, slot, points, index, copies)
                for r, output in zip(copies, outputs, strict=True):
                    total = total + share[r] * output
        return total

    def _outputs(self, call: NetworkCall, slot: _Slot, points: Tensor, index: int | None, copies: Sequence[int]) -> Tensor:
        """What a network returns for some of the copies of the sample in a call, (copies, K, b, *dims)."""
        args, kwargs = self._arguments(call, slot, points, index, copies)
        return self._split(call.module(*args, **kwargs), len(copies), *points.shape[:2])

    def _arguments(
        self, call: NetworkCall, slot: _Slot, points: Tensor, index: int | None, copies: Sequence[int]
    ) -> tuple[list, dict]:
        """The recorded arguments of some copies, conditioning tiled to the stack and the sample's place filled with the points."""
        stack, batch, rows = points.shape[0], points.shape[1], slot.repeats * len(self.sample)

        def tile(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
                value = value.unflatten(0, (slot.repeats, 1, len(self.sample)))
                value = value if len(copies) == slot.repeats else value[list(copies)]
                value = value if index is None else value[:, :, index : index + 1]
                return value.expand(-1, stack, *value.shape[2:]).flatten(0, 2)
            if isinstance(value, list) and len(value) == rows:
                picked = range(len(self.sample)) if index is None else [index]
                return [value[r * len(self.sample) + i] for r in copies for _ in range(stack) for i in picked]
            if isinstance(value, dict):
                return {key: tile(item) for key, item in value.items()}
            return value

        seen = (slot.c_in * points)[None].expand(len(copies), *points.shape)
        seen = seen.reshape(len(copies) * stack * batch, *slot.item_shape)
        filled: dict[int | str, Any] = {slot.key: list(seen.unbind(0)) if slot.is_list else seen}
        args = [filled.get(i, map_tensors(tile(v), to_float32)) for i, v in enumerate(call.args)]
        return args, {name: filled.get(name, map_tensors(tile(v), to_float32)) for name, v in call.kwargs.items()}

    def _split(self, output: Any, repeats: int, stack: int, batch: int) -> Tensor:
        """A network's output as (repeats, stack, batch, *dims)."""
        given, output = output, predicted(output)
        if output is None:
            raise ReplayRefused(
                f"a network that was given the sample returned {type(_first_tensor(given)).__name__}, not a prediction"
            )
        output = own_channels(output, self.sample.shape)
        if output.numel() != repeats * stack * batch * self.sample[0].numel():
            raise ReplayRefused(f"a network returned shape {tuple(output.shape)} for samples of {tuple(self.sample.shape)}")
        return output.reshape(repeats, stack, batch, *self.sample.shape[1:])


def _find_slot(call: NetworkCall, sample: Tensor) -> _Slot | None:
    """The argument that is a rescaled copy of the sample, repeated along the batch."""
    for key, value in [*enumerate(call.args), *call.kwargs.items()]:
        is_list = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(v, Tensor) for v in value)
        if is_list and any(v.shape != value[0].shape for v in value):
            continue
        tensor = torch.stack(list(value)) if is_list else value
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.numel() % sample.numel():
            continue
        repeats = tensor.numel() // sample.numel()
        if repeats == 0 or tensor.ndim == 0 or tensor.shape[0] != repeats * len(sample):
            continue
        copies = tensor.detach().cpu().double().reshape(repeats, -1)
        flat = sample.detach().cpu().double().flatten()
        c_in = ((copies @ flat).sum() / (repeats * flat.square().sum())).item()
        tolerance = 1e-2 if tensor.dtype in HALF else 1e-5
        if c_in != 0 and (copies - c_in * flat).norm() <= tolerance * copies.norm():
            return _Slot(key, repeats, c_in, is_list, tensor.shape[1:])
    return None


def _combination(outputs: Tensor, model_output: Tensor) -> Tensor:
    """Least-squares weights w with Σ w_i outputs_i = model_output, shape (number of outputs,), float64."""
    columns, target = outputs.detach().cpu().double().flatten(1).T, model_output.detach().cpu().double().flatten()
    # The cut-off leaves branches that agree to rounding one shared weight instead of a fit to the rounding.
    weights = torch.linalg.lstsq(columns, target[:, None], rcond=1e-6, driver="gelsd").solution.flatten()
    residual = ((columns @ weights - target).norm() / target.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
    tolerance = 2e-2 if model_output.dtype in HALF else 1e-4
    if not residual <= tolerance:
        raise ReplayRefused(f"the network outputs do not combine linearly to the model output (residual {residual:.1e})")
    return weights


def input_scales(calls: list[NetworkCall], sample: Tensor) -> list[float]:
    """The multiples c_in of the sample that networks were called with."""
    return [slot.c_in for _, slot in _calls_with_slots(calls, sample)]


def sampled_calls(calls: list[NetworkCall], sample: Tensor) -> list[NetworkCall]:
    """The calls that were given the sample."""
    return [call for call, _ in _calls_with_slots(calls, sample)]


def predicted(output: Any) -> Tensor | None:
    """What a network predicted as a tensor, a list of one a sample stacked; None where it is neither."""
    output = _first_tensor(output)
    if isinstance(output, list) and {getattr(item, "shape", None) for item in output} == {output[0].shape}:
        output = torch.stack(output)
    return output if isinstance(output, Tensor) else None


def evaluations(calls: list[NetworkCall], sample: Tensor) -> int:
    """Network evaluations that the step took for one sample: its branches, over all calls."""
    return sum(slot.repeats for _, slot in _calls_with_slots(calls, sample))


def is_single_output(calls: list[NetworkCall], sample: Tensor) -> bool:
    """Whether the step asked the network once per sample, so that there is one branch and it is the conditional one."""
    slots = [slot for _, slot in _calls_with_slots(calls, sample)]
    return len(slots) == 1 and slots[0].repeats == 1


def _calls_with_slots(calls: list[NetworkCall], sample: Tensor) -> list[tuple[NetworkCall, _Slot]]:
    """The calls that were given the sample, and where."""
    return [(call, slot) for call in calls if (slot := _find_slot(call, sample)) is not None]


def may_hold(call: NetworkCall, sample: Tensor) -> bool:
    """Whether a call can contain the sample, by size alone; text encoders before the first step cannot."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from tensors(item)

    candidates = [t for t in tensors([*call.args, *call.kwargs.values()]) if t.is_floating_point() and t.numel()]
    return any(t.numel() % sample.numel() == 0 or 2 * t.numel() == sample.numel() for t in candidates)


def is_duplicated(sample: Tensor, model_output: Tensor, calls: list[NetworkCall]) -> bool:
    """Whether [x, x] and [o, o] went through the scheduler for one x, the halves being two branches of guidance (DiT).

    A batch that happens to hold the same latents twice differs: its halves got the same conditioning, or different outputs.
    """
    if len(sample) % 2 or not (_halves_agree(sample) and _halves_agree(model_output)):
        return False
    seen = [value for call in calls for value in (*call.args, *call.kwargs.values(), _first_tensor(call.output))]
    return any(isinstance(v, Tensor) and v.ndim > 0 and len(v) == len(sample) and not _halves_agree(v) for v in seen)


def _halves_agree(value: Tensor) -> bool:
    return torch.equal(*value.chunk(2))


def _first_tensor(output: Any) -> Any:
    """What a network predicted: ``.sample``, or the first item of a tuple."""
    output = getattr(output, "sample", output)
    return output[0] if isinstance(output, tuple) else output
