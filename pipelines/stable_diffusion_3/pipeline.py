from diffusers_geometry.mixin import GeometryStableDiffusion3Pipeline  # noqa: F401
