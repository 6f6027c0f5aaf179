"""The method and its budget, from dimensions, product counts and bytes alone, so that a rerun is the same run.

Dense where d products are few or all values are wanted of a moderate d, else block Golub-Kahan. Limits choose the method and shrink
Golub-Kahan's budget; what no method can meet is refused with what can.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

from .costs import available_memory
from .denoiser import CONTINUED
from .golub_kahan import golub_kahan_memory
from .probe import ProbePlan
from .spectrum import CERTIFYING_PROBES, NUM_OVERSAMPLES

SpectrumMethod = Literal["auto", "dense", "golub_kahan", "randomized", "perturbation", "central_difference"]
METHODS: tuple[str, ...] = get_args(SpectrumMethod)
AUTO_DENSE = 2048  # inputs up to which auto takes the whole matrix when all values are wanted
NUM_SINGULAR_VALUES = 16  # taken by the methods for the largest values where the request does not say
PRODUCTS_PER_VALUE = 32  # Golub-Kahan's budget; benchmarks/top_values.py and the tests show how many it takes
TRACE_PRODUCTS = 60
FLIPD_EXACT = 1024  # inputs up to which FLIPD's trace is exact by default
RANDOMIZED_EXTRA = 2 * NUM_OVERSAMPLES + CERTIFYING_PROBES
STEP_PRODUCTS = 90  # central differences along which the step is chosen, at most


def plan_probe(
    size: int,
    *,
    method: str = "auto",
    of: str = "denoised",
    num_singular_values: int | None = None,
    max_products: int | None = None,
    flipd: bool = False,
    log_volume_epsilon: float | None = None,
    log_volume_probes: int = 16,
    log_volume_steps: int = 30,
    tol: float = 1e-3,
    block_size: int = 4,
    chunk_size: int = 32,
    derivative: str = "autograd",
    symmetric: bool = False,
    centred: bool = True,
    max_memory: int | None = None,
    output_size: int | None = None,
) -> ProbePlan:
    """The plan for samples of ``size`` numbers, from dimensions, product counts and bytes alone.

    ``max_products`` limits the products; the differences by which a step is chosen come on top and are in the plan. The map's
    outputs number ``output_size``, as many as its inputs if None.

    Raises:
        ValueError: a budget that the method (or with "auto" any method) cannot meet; it says what can.
    """
    wanted = num_singular_values or min(NUM_SINGULAR_VALUES, size)
    if wanted > size:
        raise ValueError(f"num_singular_values={wanted}. Expected at most {size}, the numbers of one sample.")
    # Of all d values the quadrature is a sum; else it takes its own products, or a dense Jacobian where that is cheaper.
    quadrature = min(2 * log_volume_probes * log_volume_steps, size) if log_volume_epsilon is not None else 0
    estimated, exact = min(TRACE_PRODUCTS, size), size <= FLIPD_EXACT and (max_products is None or max_products >= 2 * size)
    fixed = {"flipd_products": (size if exact else estimated) if flipd else 0}
    maps, continued, outputs = 1 if of == "denoised" else 2, of in CONTINUED, output_size or size
    reverse = derivative == "autograd" or symmetric
    shared = {
        "of": of, "size": size, "log_volume_epsilon": log_volume_epsilon, "log_volume_probes": log_volume_probes,
        "log_volume_steps": log_volume_steps, "tol": tol, "block_size": min(block_size, size), "chunk_size": chunk_size,
        "derivative": derivative, "symmetric": symmetric, "centred": centred, **fixed,
    }  # fmt: skip
    # A black box chooses a step for every map that is differentiated; that comes on top of max_products.
    others = (quadrature > 0) + flipd
    step = STEP_PRODUCTS * (maps + others) if derivative == "difference" else 0
    # Of the quadrature: a matrix where its budget reaches the dimension, else two bases a probe, twice while they grow.
    bases = 0 if not quadrature else min(36 * size**2, 24 * size * log_volume_probes * log_volume_steps)

    def dense() -> ProbePlan:
        taken = step and STEP_PRODUCTS * (1 + flipd)
        sizes = {"spectrum_products": size, "step_products": taken, "memory": 36 * size**2 * maps}
        if continued:
            sizes |= {"spectrum_products": min(size, outputs), "denoised_products": size, "memory": 36 * size * (size + outputs)}
        return ProbePlan("dense", num_singular_values=num_singular_values, **sizes, **shared)

    def largest(name: str) -> ProbePlan:
        """Golub-Kahan or the range finder, with a trace of their own."""
        trace = min(TRACE_PRODUCTS, size)
        least = 2 * max(wanted, shared["block_size"])
        if name == "randomized":
            spent = 2 * wanted + RANDOMIZED_EXTRA
        elif max_products is None:
            spent = max(least, min(PRODUCTS_PER_VALUE * wanted, 2 * size))
        else:
            spent = min((max_products - trace - quadrature - fixed["flipd_products"]) // maps, 2 * size)
        memory = golub_kahan_memory((outputs, size), max(spent, least), shared["block_size"])
        sizes = {
            "spectrum_products": spent, "denoised_products": spent * (maps - 1), "trace_products": trace,
            "log_volume_products": quadrature, "step_products": step,
            "memory": bases + (memory if name == "golub_kahan" else 32 * size * (wanted + RANDOMIZED_EXTRA)),
        }  # fmt: skip
        return ProbePlan(name, num_singular_values=wanted, **sizes, **shared)

    def values(name: str) -> ProbePlan:
        """The two algorithms that take function values."""
        count = 4 * size if name == "perturbation" else size
        if max_products is not None:
            count = max_products - quadrature - fixed["flipd_products"]
        complete = name == "central_difference" and count >= size
        own = STEP_PRODUCTS if name == "central_difference" else 0
        sizes = {
            "spectrum_products": size if complete else count, "memory": 32 * count * size * maps + (0 if complete else bases),
            "step_products": own + (STEP_PRODUCTS * others if derivative == "difference" else 0),
            "log_volume_products": 0 if complete else quadrature,
        }  # fmt: skip
        return ProbePlan(name, num_singular_values=num_singular_values, **sizes, **shared)

    if continued and method in ("perturbation", "central_difference"):
        raise ValueError(
            f"spectrum={method!r} is of denoisers, not of of={of!r}. Expected 'auto', 'dense', 'golub_kahan' or 'randomized'."
        )
    if method in ("golub_kahan", "randomized") and not reverse:
        raise ValueError(
            f"spectrum={method!r} needs reverse products, which a black box (derivative='difference') does not have. Expected "
            "spectrum='central_difference', or symmetric=True where you know that the Jacobian is symmetric."
        )
    makers = {"dense": dense} | {name: functools.partial(largest, name) for name in ("golub_kahan", "randomized")}
    makers |= {name: functools.partial(values, name) for name in ("perturbation", "central_difference")}
    if method != "auto":
        candidates = [makers[method]()]
    else:
        few = size <= PRODUCTS_PER_VALUE * wanted if num_singular_values else size <= AUTO_DENSE
        order = ["dense", "golub_kahan"] if few else ["golub_kahan", "dense"]
        candidates = [makers[name]() for name in order if reverse or name == "dense"]
    plan = _first_that_fits(candidates, max_products, max_memory)
    if 0 < plan.log_volume_products < size and not plan.has_reverse:
        raise ValueError(
            "log_volume_epsilon by quadrature needs reverse products, which a black box does not have. Expected spectrum='dense', "
            "symmetric=True where you know that, or no log-volume."
        )
    available = available_memory()
    if available is not None and plan.memory > available:
        raise ValueError(
            f"{plan.method} needs {said_bytes(plan.memory)} for its matrices and bases; {said_bytes(available)} are free. Expected "
            "fewer singular values, a smaller max_products, or spectrum='golub_kahan' instead of a matrix."
        )
    return plan


def _first_that_fits(candidates: list[ProbePlan], max_products: int | None, max_memory: int | None) -> ProbePlan:
    """The first plan within the limits; ValueError that says what each would need."""
    needs = []
    for plan in candidates:
        least = least_products(plan)
        products = least * plan.maps + plan.trace_products + plan.log_volume_products + plan.flipd_products
        fits = max_products is None or (plan.spectrum_products >= least and products <= max_products)
        if fits and (max_memory is None or plan.memory <= max_memory):
            return plan
        needs.append(f"{plan.method} needs {products} products and {said_bytes(plan.memory)}")
    limits = [f"max_products={max_products}"] * (max_products is not None)
    limits += [f"max_probe_memory={max_memory}"] * (max_memory is not None)
    size = candidates[0].size
    raise ValueError(
        f"{' and '.join(limits)} cannot be met for samples of {size} numbers, per recorded step and sample: {'; '.join(needs)}. "
        "Expected a larger limit, a smaller num_singular_values, or spectrum='central_difference' with as many directions as fit."
    )


def least_products(plan: ProbePlan) -> int:
    """The smallest budget with which the method gives a spectrum."""
    return {
        "golub_kahan": 2 * max(plan.num_singular_values or 1, plan.block_size), "dense": plan.spectrum_products,
        "randomized": plan.spectrum_products, "perturbation": 4, "central_difference": 1,
    }[plan.method]  # fmt: skip


def said_bytes(count: int) -> str:
    """A number of bytes in words."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
