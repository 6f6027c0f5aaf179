"""``python -m diffusers_geometry`` is ``hf-geometry``."""

from .cli import main

main()
