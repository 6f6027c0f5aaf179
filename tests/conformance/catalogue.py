"""All tiny pipelines of the conformance suite: ``CASES``, and the class of each."""

import audio
import flow
import flow_latents
import pixel
import stable_diffusion
import stable_diffusion_xl
import task
import transformers_2d
import video
import video_noise

MODULES = (pixel, stable_diffusion, stable_diffusion_xl, transformers_2d, flow, flow_latents, video, video_noise, audio, task)
CASES = tuple(case for module in MODULES for case in module.CASES)


def class_name(case):
    """The diffusers class of a case."""
    return case.name.split()[0]
