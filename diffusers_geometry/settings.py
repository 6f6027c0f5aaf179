"""The arguments of an analysis, checked before the pipeline runs and turned into plain Python values that a trace can store."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from .budget import METHODS
from .capture import check_steps
from .denoiser import MAPS
from .jacobian import Derivative
from .recorded_step import Branch, Engine

_COUNTS = ("num_singular_values", "max_products", "psi_rank", "max_probe_memory")
_POSITIVE = ("log_volume_probes", "log_volume_steps", "probe_block_size", "probe_chunk_size")
_REQUEST = {
    "spectrum": "method", "of": "of", "num_singular_values": "num_singular_values", "max_products": "max_products",
    "flipd": "flipd", "log_volume_epsilon": "log_volume_epsilon", "log_volume_probes": "log_volume_probes",
    "log_volume_steps": "log_volume_steps", "probe_tolerance": "tol", "probe_block_size": "block_size",
    "probe_chunk_size": "chunk_size", "derivative": "derivative", "symmetric": "symmetric", "centred": "centred",
}  # fmt: skip


def probe_request(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`~diffusers_geometry.plan.plan_probe` among the settings."""
    return {name: settings[key] for key, name in _REQUEST.items()}


def checked_settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The analysis's own arguments as plain Python values, refused here when they are out of range."""
    settings = {k: v for k, v in arguments.items() if k not in ("pipe", "args", "kwargs", "progress", "watch")}
    settings["record_steps"] = _steps(settings["record_steps"])
    choices = {"spectrum": METHODS, "of": MAPS, "branch": get_args(Branch), "derivative": get_args(Derivative),
               "probe_engine": get_args(Engine)}  # fmt: skip
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            raise ValueError(f"{name}={settings[name]!r}. Expected one of {allowed}.")
    for name in (*_COUNTS, *_POSITIVE):
        if settings[name] is not None or name in _POSITIVE:
            settings[name] = _integer(settings[name], name, 1)
    settings["probe_seed"] = _integer(settings["probe_seed"], "probe_seed", 0)
    for name in ("relative_threshold", "phase_resolution", "probe_tolerance", "log_volume_epsilon", "max_probe_seconds"):
        if settings[name] is not None:
            settings[name] = float(settings[name])
    _check_ranges(settings)
    return settings


def _check_ranges(settings: dict[str, Any]) -> None:
    threshold, resolution, tolerance = (settings[k] for k in ("relative_threshold", "phase_resolution", "probe_tolerance"))
    if not 0 <= threshold < 1:
        raise ValueError(f"relative_threshold={threshold}. Expected 0 <= relative_threshold < 1.")
    if not 0 < resolution < 0.5:
        raise ValueError(f"phase_resolution={resolution}. Expected 0 < phase_resolution < 0.5.")
    if not 0 < tolerance < 1:
        raise ValueError(f"probe_tolerance={tolerance}. Expected 0 < probe_tolerance < 1.")
    for name in ("log_volume_epsilon", "max_probe_seconds"):
        if settings[name] is not None and not (0 < settings[name] < math.inf):
            raise ValueError(f"{name}={settings[name]}. Expected a positive finite number or None.")
    if min(settings["log_volume_probes"], settings["log_volume_steps"]) < 4:
        sizes = ", ".join(f"{name}={settings[name]}" for name in ("log_volume_probes", "log_volume_steps"))
        raise ValueError(f"{sizes}. Expected at least 4 of both.")
    if settings["spectrum"] == "perturbation" and settings["max_products"] is not None and settings["max_products"] < 4:
        raise ValueError(f"max_products={settings['max_products']} with spectrum='perturbation'. Expected at least 4 samples.")


def _steps(steps: Any) -> int | list[int] | str:
    """``record_steps`` as an int, a list of ints or "all"; NumPy's are taken too."""
    if isinstance(steps, np.ndarray):
        steps = steps.tolist()
    if isinstance(steps, Sequence) and not isinstance(steps, str):
        steps = [_integer(s, "record_steps", None) for s in steps]
    elif not isinstance(steps, str):
        steps = _integer(steps, "record_steps", None)
    check_steps(steps)
    return steps


def _integer(value: Any, name: str, least: int | None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or (least is not None and number < least):
        expected = "an integer" if least is None else "a positive integer" if least else "an integer from 0"
        raise ValueError(f"{name}={value!r}. Expected {expected}{' or None' if name in _COUNTS else ''}.")
    return number
