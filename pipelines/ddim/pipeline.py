from diffusers_geometry.mixin import GeometryDDIMPipeline  # noqa: F401
