"""All tiny pipelines of the conformance suite: ``CASES``, and the class of each."""

import pixel
import stable_diffusion

CASES = pixel.CASES + stable_diffusion.CASES


def class_name(case):
    """The diffusers class of a case."""
    return case.name.split()[0]
