"""Derivatives from function values alone: central differences, and the step they should take.

A column is (f(x + h v) - f(x - h v)) / 2h = J v + error, and the error is about noise/(sqrt(2) h) + h² M3/6. The rounding noise of
f is measured from a difference table (Moré and Wild, 2011, "Estimating computational noise") and the curvature term from halving
h; h is chosen where their sum is least. Nothing here needs a gradient, so f may be a black box.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

BatchedMap = Callable[[Tensor], Tensor]
MAX_RUNGS = 16  # of the ladder of steps
STEP_SHARES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # of the longest step of a checked derivative
DIFFERENCE_TOLERANCE = 0.02  # between a derivative and a difference that is short enough


def require_finite(value: Tensor, what: str) -> Tensor:
    """Returns ``value``; raises FloatingPointError when it holds NaN or infinity, naming ``what``."""
    if not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise FloatingPointError(
            f"{what} has {bad} non-finite entries of {value.numel()}. Expected finite values: check the weights, "
            "the dtype (half precision overflows) and the input of the network."
        )
    return value


def check_derivative(fn: BatchedMap, x: Tensor, shift: Tensor, direction: Tensor, pulled: Tensor, what: str) -> None:
    """Compares Jᵀu with central differences of ``fn`` along ``shift``, which is shortened until the two agree twice running.

    Over a long step a curved function differs by as much as one whose gradient is cut in part; the difference of the first goes to
    its derivative, that of the second never does, and only crosses it.

    Args:
        fn: x -> f(x).
        x: The point.
        shift: The longest step.
        direction: u, of f's shape.
        pulled: Jᵀu by automatic differentiation.
        what: Its name in an error.

    Raises:
        RuntimeError: they do not agree.
    """
    agreed, rounding = False, 0.0
    for share in STEP_SHARES:
        with torch.no_grad():
            ends = [fn(x + sign * share * shift) for sign in (1, -1)]
        rounding = 10 * torch.finfo(x.dtype).eps * ends[0].norm().item()
        slope, found = share * (pulled * shift).sum().item(), ((ends[0] - ends[1]) / 2 * direction).sum().item()
        before, agreed = agreed, abs(slope - found) <= DIFFERENCE_TOLERANCE * abs(found) + rounding
        if agreed and before:
            return
    off = abs(slope / found - 1) if found else math.inf
    raise RuntimeError(
        f"the derivative of {what} differs by {off:.1e} from its finite difference. Expected one with a gradient: detach, "
        "no_grad or rounding inside it, or a __call__ that calls another under no_grad, hides its Jacobian. For a black box pass "
        "derivative='difference'."
    )


class CountedMap:
    """A map on a stack that counts the points it was evaluated at.

    Attributes:
        evaluations: Points so far.
    """

    def __init__(self, fn: BatchedMap) -> None:
        self.fn, self.evaluations = fn, 0

    def __call__(self, points: Tensor) -> Tensor:
        """``fn`` at the points, (K, *dims) -> (K, *out)."""
        self.evaluations += len(points)
        return self.fn(points)


def evaluate(fn: BatchedMap, points: Tensor, chunk_size: int, *, shrink: bool = True) -> Tensor:
    """``fn`` on a stack (K, *dims) in chunks, without gradients, flat and finite: (K, out).

    Chunks that run out of memory are halved, unless ``shrink`` is off and the caller wants to know.
    """
    values, start = [], 0
    while start < len(points):
        chunk = points[start : start + chunk_size]
        try:
            with torch.no_grad():
                values.append(fn(chunk).flatten(1))
        except RuntimeError as error:
            if not shrink:
                raise
            chunk_size = smaller_chunk(error, len(chunk))
            continue
        start += len(chunk)
    return require_finite(torch.cat(values), "the function")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Accelerators raise OutOfMemoryError; the CPU's allocator a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def smaller_chunk(error: RuntimeError, size: int) -> int:
    """Half of a chunk size that ran out of memory, with a warning; raises ``error`` if that is not what happened."""
    if not is_out_of_memory(error) or size == 1:
        raise error
    warnings.warn(f"out of memory with chunk_size={size}; going on with {size // 2}.", stacklevel=4)
    return size // 2


def orthonormal_directions(shape: torch.Size, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """``count`` orthonormal directions (count, *shape): the unit vectors when they are all of them, else random."""
    size = math.prod(shape)
    if not 1 <= count <= size:
        raise ValueError(f"num_directions={count}. Expected 1 <= num_directions <= {size}, the input dimension.")
    if count == size:
        basis = torch.eye(size)
    else:
        gaussian = torch.randn(size, count, generator=generator, dtype=torch.float64, device=generator.device)
        basis = torch.linalg.qr(gaussian.cpu())[0].T
    return basis.to(like).reshape(count, *shape)


def central_difference_columns(
    fn: BatchedMap, x: Tensor, directions: Tensor, step: float, *, chunk_size: int = 32, shrink: bool = True
) -> tuple[Tensor, Tensor]:
    """(f(x + h v) - f(x - h v)) / 2h as rows (K, out), and the directions (K, n) that floating point really took."""
    ahead, behind = x + step * directions, x - step * directions
    values = evaluate(fn, torch.stack([ahead, behind], dim=1).flatten(0, 1), chunk_size, shrink=shrink)
    realised = (ahead - behind).flatten(1) / (2 * step)
    return (values[0::2] - values[1::2]) / (2 * step), realised


def choose_step(fn: BatchedMap, x: Tensor, *, scale: float, generator: torch.Generator) -> tuple[float, float]:
    """The difference step h and an estimate of the largest error |column - J v| that it leaves for a unit v.

    A ladder of steps, from the formula (3u)^(1/3) ``scale`` of the dtype's rounding unit u to 0.1 max(1, ``scale``), is
    tried along a few directions: random ones and, for a map of a space to itself, where J takes them, since the map is most curved
    along directions that it moves. Every rung's error is its rounding error plus what halving the step changes beyond it; the
    worst direction counts. Of the rungs with an error near the least, or below the square root of the rounding unit, the shortest
    is taken: directions that were not tried may bend sooner.

    Args:
        fn: The map on a stack, (K, *dims) -> (K, *out).
        x: The point, shape (*dims).
        scale: Length in x on which J changes; the noise sigma_t for a denoiser.
        generator: Random directions.
    """
    low, high = (3 * torch.finfo(x.dtype).eps / 2) ** (1 / 3) * scale, 0.1 * max(1.0, scale)
    rungs = min(MAX_RUNGS, max(3, math.ceil(math.log2(high / low)) + 2))
    ladder = torch.logspace(math.log2(low / 2), math.log2(high), rungs, base=2.0).tolist()
    errors, size = torch.zeros(len(ladder) - 1, dtype=torch.float64), 0.0
    for direction in _telling_directions(fn, x, low, generator):
        noise = _rounding_noise(fn, x, direction, spacing=low / 4)
        columns = [central_difference_columns(fn, x, direction, h)[0].cpu().double() for h in ladder]
        size = max(size, columns[0].norm().item())
        rounding = [noise / (math.sqrt(2) * h) for h in ladder]
        for i in range(1, len(ladder)):
            change = (columns[i] - columns[i - 1]).norm().item()
            halving = (ladder[i] / ladder[i - 1]) ** 2
            curvature = max(0.0, change - rounding[i] - rounding[i - 1]) * halving / (halving - 1)
            errors[i - 1] = max(errors[i - 1].item(), rounding[i] + curvature)
    enough = max(2 * errors.min().item(), math.sqrt(torch.finfo(x.dtype).eps) * size)
    best = int((errors <= enough).nonzero()[0])
    return ladder[best + 1], errors[best].item()


def _telling_directions(fn: BatchedMap, x: Tensor, step: float, generator: torch.Generator) -> list[Tensor]:
    """Unit directions (1, *dims): two random ones, and for a square map twice the image of the first under J."""
    directions = [orthonormal_directions(x.shape, 1, x, generator) for _ in range(2)]
    for _ in range(2):
        image = central_difference_columns(fn, x, directions[-1], step)[0]
        if image.numel() != x.numel() or not image.any():
            break
        directions.append((image / image.norm()).reshape(1, *x.shape))
    return directions


def _rounding_noise(fn: BatchedMap, x: Tensor, direction: Tensor, *, spacing: float, points: int = 8) -> float:
    """Norm of the rounding noise in f, from the higher differences of f on a short line (Moré and Wild, 2011, eq. 2.3)."""
    offsets = torch.arange(points, dtype=x.dtype, device=x.device).reshape(-1, *[1] * x.ndim)
    differences = evaluate(fn, x + spacing * offsets * direction, points).cpu().double()
    if not differences.diff(dim=0).any():  # a rounded output on one of its steps: look as far as the next one
        differences = evaluate(fn, x + 64 * spacing * offsets * direction, points).cpu().double()
    # Where f is flat its values round alike and differ by nothing; they are rounded all the same.
    rounded = torch.finfo(x.dtype).eps / math.sqrt(12) * differences[0].norm().item()
    levels = []
    for order in range(1, points - 1):
        differences = differences[1:] - differences[:-1]
        variance = differences.square().sum(dim=1).mean().item() / math.comb(2 * order, order)
        if order >= 3:
            levels.append(math.sqrt(variance))
    return max(min(levels), rounded)
