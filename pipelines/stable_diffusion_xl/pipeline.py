from diffusers_geometry.mixin import GeometryStableDiffusionXLPipeline  # noqa: F401
