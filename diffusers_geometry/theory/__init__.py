"""Closed forms to hold measurements against: spectra of linear manifolds, speciation and collapse times."""

from .empirical import EmpiricalCollapse, ParentWeight, held_out_information
from .glm import glm_information
from .linear_manifold import LinearManifold
from .transitions import (
    clone_agreement,
    collapse_time_gaussian,
    collapse_time_glm,
    collapse_time_linear,
    sigma_of_time,
    speciation_time,
    time_of_sigma,
)

__all__ = [
    "EmpiricalCollapse",
    "LinearManifold",
    "ParentWeight",
    "clone_agreement",
    "collapse_time_gaussian",
    "collapse_time_glm",
    "collapse_time_linear",
    "glm_information",
    "held_out_information",
    "sigma_of_time",
    "speciation_time",
    "time_of_sigma",
]
