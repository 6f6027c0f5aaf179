"""Models that ship with the package: ``digits``, an 8x8 DDPM (its model card is beside it)."""

from pathlib import Path

DIGITS = Path(__file__).parent / "digits"
