"""Pipelines with geometry: thin sugar over :mod:`.capture` and :mod:`.analyze`.

    pipe = with_geometry(DiffusionPipeline.from_pretrained(...))       # any pipeline, sharing its modules
    pipe = GeometryDDPMPipeline.from_pretrained(...)                   # or a class of its own
    trace = pipe.analyze_geometry(num_inference_steps=50)

Every geometry pipeline writes the plain diffusers class into ``model_index.json``, so any diffusers installation loads the folder.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import diffusers

from .analyze import analyze_geometry, plan_geometry
from .guidance import GeometryGuidance, guided
from .transitions import measure_transitions

BASES = (diffusers.DiffusionPipeline, diffusers.ModularPipeline)
GEOMETRY_PIPELINES = {
    f"Geometry{name}": name
    for name in ("DDPMPipeline", "DDIMPipeline", "DiTPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline",
                 "StableDiffusion3Pipeline", "FluxPipeline", "PixArtAlphaPipeline")
}  # fmt: skip


class GeometryMixin:
    """Adds analysis, its plan, transitions and guided generation to a diffusers pipeline class; name it first among the bases."""

    analyze_geometry = analyze_geometry
    plan_geometry = plan_geometry
    measure_transitions = measure_transitions

    def generate_with_geometry(self, /, *args: Any, guidance: GeometryGuidance, **kwargs: Any) -> Any:
        """``self(*args, **kwargs)`` steered by ``guidance``, see :func:`~.guidance.guided`; the pipeline's own output."""
        with guided(self, guidance):
            return self(*args, **kwargs)

    def to_json_string(self) -> str:
        """The configuration as JSON, under the name of the plain pipeline class."""
        document = json.loads(super().to_json_string()) | {"_class_name": plain_class(type(self)).__name__}
        return json.dumps(document, indent=2, sort_keys=True) + "\n"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles what :func:`with_geometry` made, whose class has no importable name, by way of the plain class."""
        if type(self).__dict__.get("_made_by_with_geometry"):
            return _restore, (plain_class(type(self)), self.__dict__)
        return super().__reduce_ex__(protocol)


def _restore(pipeline_class: type, attributes: dict[str, Any]) -> Any:
    pipe = object.__new__(_subclass(pipeline_class))
    pipe.__dict__.update(attributes)
    return pipe


def plain_class(pipeline_class: type) -> type:
    """The first pipeline class of the MRO that has no geometry in it; the class itself where there is none."""
    plain = (c for c in pipeline_class.__mro__ if issubclass(c, BASES) and c not in BASES and not issubclass(c, GeometryMixin))
    return next(plain, pipeline_class)


def with_geometry(pipe: Any) -> Any:
    """A pipeline like ``pipe`` that also has the methods of :class:`GeometryMixin`.

    Modules, scheduler and settings are shared, nothing is copied or cast, and ``pipe`` itself stays as it is.

    Args:
        pipe: A diffusers pipeline, of a class of its own or modular.

    Raises:
        TypeError: ``pipe`` is not a pipeline.
    """
    if not isinstance(pipe, BASES):
        raise TypeError(f"pipe is a {type(pipe).__name__}. Expected a diffusers.DiffusionPipeline.")
    if getattr(type(pipe), "_is_recorded", False):
        raise TypeError("pipe is being recorded. Expected with_geometry(pipe) outside the `with record(pipe)` block.")
    return _restore(type(pipe), pipe.__dict__)


@functools.cache
def _subclass(pipeline_class: type) -> type:
    """The geometry subclass of a pipeline class, under the same name; itself if it has geometry already."""
    if issubclass(pipeline_class, GeometryMixin):
        return pipeline_class
    members = {"__module__": pipeline_class.__module__, "__doc__": pipeline_class.__doc__, "_made_by_with_geometry": True}
    return type(pipeline_class.__name__, (GeometryMixin, pipeline_class), members)


def __getattr__(name: str) -> type:
    """Makes ``GeometryXPipeline`` classes on first use, so that only the pipelines in use are imported."""
    if name not in GEOMETRY_PIPELINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Expected one of {sorted(GEOMETRY_PIPELINES)}.")
    base = getattr(diffusers, GEOMETRY_PIPELINES[name])
    document = f"``diffusers.{base.__name__}`` with geometry, see :class:`GeometryMixin`."
    value = type(name, (GeometryMixin, base), {"__module__": __name__, "__doc__": document})
    globals()[name] = value
    return value
