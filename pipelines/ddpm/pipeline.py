from diffusers_geometry.mixin import GeometryDDPMPipeline  # noqa: F401
