from diffusers_geometry.mixin import GeometryPixArtAlphaPipeline  # noqa: F401
