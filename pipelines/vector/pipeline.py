from diffusers_geometry.vector import GeometryVectorPipeline  # noqa: F401
