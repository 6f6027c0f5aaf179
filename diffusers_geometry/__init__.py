"""Reads the geometry of a diffusion model's score while a diffusers pipeline generates.

Names are resolved on first use, so that ``import diffusers_geometry`` itself loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Audit": "audit",
    "Denoiser": "denoiser",
    "Estimate": "estimate",
    "GeometryDDIMPipeline": "mixin",
    "GeometryDDPMPipeline": "mixin",
    "GeometryDiTPipeline": "mixin",
    "GeometryDataset": "dataset",
    "GeometryFluxPipeline": "mixin",
    "GeometryGuidance": "guidance",
    "GeometryMixin": "mixin",
    "GeometryPixArtAlphaPipeline": "mixin",
    "GeometryReward": "reward",
    "GeometryStableDiffusion3Pipeline": "mixin",
    "GeometryStableDiffusionPipeline": "mixin",
    "GeometryStableDiffusionXLPipeline": "mixin",
    "GeometryTrace": "trajectory",
    "GeometryTrainingCallback": "training_callback",
    "GeometryVectorPipeline": "vector",
    "Jacobian": "jacobian",
    "MemorizationObjective": "mitigation",
    "Spectrum": "spectrum",
    "TransitionReport": "transition_report",
    "VectorNetwork": "vector",
    "audit_model": "audit",
    "best_of": "best_of",
    "dense_spectrum": "spectrum",
    "estimate_trace": "stochastic",
    "golub_kahan_spectrum": "golub_kahan",
    "measure_transitions": "transitions",
    "guided": "guidance",
    "record": "capture",
    "with_geometry": "mixin",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from .audit import Audit as Audit
    from .audit import audit_model as audit_model
    from .best_of import best_of as best_of
    from .capture import record as record
    from .dataset import GeometryDataset as GeometryDataset
    from .denoiser import Denoiser as Denoiser
    from .estimate import Estimate as Estimate
    from .golub_kahan import golub_kahan_spectrum as golub_kahan_spectrum
    from .guidance import GeometryGuidance as GeometryGuidance
    from .guidance import guided as guided
    from .jacobian import Jacobian as Jacobian
    from .mitigation import MemorizationObjective as MemorizationObjective
    from .mixin import GeometryDDIMPipeline as GeometryDDIMPipeline
    from .mixin import GeometryDDPMPipeline as GeometryDDPMPipeline
    from .mixin import GeometryDiTPipeline as GeometryDiTPipeline
    from .mixin import GeometryFluxPipeline as GeometryFluxPipeline
    from .mixin import GeometryMixin as GeometryMixin
    from .mixin import GeometryPixArtAlphaPipeline as GeometryPixArtAlphaPipeline
    from .mixin import GeometryStableDiffusion3Pipeline as GeometryStableDiffusion3Pipeline
    from .mixin import GeometryStableDiffusionPipeline as GeometryStableDiffusionPipeline
    from .mixin import GeometryStableDiffusionXLPipeline as GeometryStableDiffusionXLPipeline
    from .mixin import with_geometry as with_geometry
    from .reward import GeometryReward as GeometryReward
    from .spectrum import Spectrum as Spectrum
    from .spectrum import dense_spectrum as dense_spectrum
    from .stochastic import estimate_trace as estimate_trace
    from .training_callback import GeometryTrainingCallback as GeometryTrainingCallback
    from .trajectory import GeometryTrace as GeometryTrace
    from .transition_report import TransitionReport as TransitionReport
    from .transitions import measure_transitions as measure_transitions
    from .vector import GeometryVectorPipeline as GeometryVectorPipeline
    from .vector import VectorNetwork as VectorNetwork


def __getattr__(name: str) -> Any:
    """Imports ``name`` from the module it lives in, once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Expected one of {sorted(_HOME)}.")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, resolved or not."""
    return sorted({*globals(), *_HOME})
