"""Pipelines that estimate something from a picture: Marigold's depth and normals."""

import diffusers
from case import Case, autoencoder, image, pipeline, schedulers
from pixel import LINEAR, conditional_unet
from text import clip_text_encoder, clip_tokenizer


def marigold(name):
    """The picture's latents and the estimate's go in, the velocity of the estimate comes out."""
    scheduler = diffusers.DDIMScheduler(**LINEAR, prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1)
    return pipeline(
        name, unet=conditional_unet(8, 4), vae=autoencoder(), scheduler=scheduler, text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(), default_denoising_steps=4, default_processing_resolution=0,
    )  # fmt: skip


def call(pipe):
    return {"image": image(), "num_inference_steps": 4, "processing_resolution": 0, "output_type": "np"}


NOTE = "the picture in channels, no guidance"
CASES = tuple(
    Case(name, lambda name=name: marigold(name), call, schedulers("LCMScheduler"), "task", NOTE)
    for name in ("MarigoldDepthPipeline", "MarigoldNormalsPipeline")
)
