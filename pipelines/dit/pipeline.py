from diffusers_geometry.mixin import GeometryDiTPipeline  # noqa: F401
