from diffusers_geometry.mixin import GeometryStableDiffusionPipeline  # noqa: F401
