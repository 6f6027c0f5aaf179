from diffusers_geometry.mixin import GeometryFluxPipeline  # noqa: F401
