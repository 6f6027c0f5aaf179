"""Pipelines that denoise pixels, or latents without a prompt."""

import diffusers
import tiny
from case import Case, autoencoder, image, pipeline, random_weights, schedulers
from text import clip_text_encoder, clip_tokenizer
from tiny import randn

PIXEL = {"num_inference_steps": 4, "output_type": "np"}
LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def pixel_unet(in_channels=1, out_channels=None, size=8, **options):
    return random_weights(
        diffusers.UNet2DModel(
            sample_size=size, in_channels=in_channels, out_channels=out_channels or in_channels, layers_per_block=1,
            block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=8, **options,
        )
    )  # fmt: skip


def conditional_unet(in_channels=4, out_channels=None, width=8, **options):
    """A text-conditioned UNet with one level of attention."""
    config = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "in_channels": in_channels,
        "out_channels": out_channels or in_channels, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": width, "norm_num_groups": 2,
        "attention_head_dim": 4,
    }  # fmt: skip
    return random_weights(diffusers.UNet2DConditionModel(**config | options))


def unconditional(name, scheduler, unet):
    return pipeline(name, unet=unet, scheduler=scheduler)


def consistency_model():
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0)
    return unconditional("ConsistencyModelPipeline", scheduler, pixel_unet(3, size=4))


def latent_diffusion():
    return pipeline(
        "LDMTextToImagePipeline", vqvae=autoencoder(4), bert=clip_text_encoder(), tokenizer=clip_tokenizer(),
        unet=conditional_unet(), scheduler=diffusers.DDIMScheduler(**LINEAR),
    )  # fmt: skip


def super_resolution():
    vqvae = random_weights(
        diffusers.VQModel(
            block_out_channels=[4, 8], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=3, norm_num_groups=2, num_vq_embeddings=8,
        )
    )  # fmt: skip
    unet, scheduler = pixel_unet(6, 3), diffusers.DDIMScheduler(**LINEAR)
    return pipeline("LDMSuperResolutionPipeline", vqvae=vqvae, unet=unet, scheduler=scheduler)


def deepfloyd():
    """The base stage: three channels of noise, six of output, the variance in the second half."""
    unet = conditional_unet(
        3, 6, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), addition_embed_type="text", encoder_hid_dim=8,
        addition_embed_type_num_heads=2, resnet_time_scale_shift="scale_shift", act_fn="gelu",
        attention_head_dim=2,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.0,
        variance_type="learned_range",
    )  # fmt: skip
    return pipeline(
        "IFPipeline", tokenizer=None, text_encoder=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, watermarker=None, requires_safety_checker=False,
    )  # fmt: skip


CASES = (
    Case("DDPMPipeline", tiny.ddpm_pipeline, lambda pipe: PIXEL, schedulers("DDIMScheduler"), "image", "clipped samples"),
    Case("DDIMPipeline", tiny.ddim_pipeline, lambda pipe: PIXEL, (), "image", "the class makes its scheduler DDIM"),
    Case("PNDMPipeline", lambda: unconditional("PNDMPipeline", diffusers.PNDMScheduler(), pixel_unet()), lambda pipe: PIXEL,
         family="image", note="Runge-Kutta steps first"),
    Case("ConsistencyModelPipeline", consistency_model, lambda pipe: {"timesteps": [22, 0], **PIXEL, "num_inference_steps": None},
         family="image", note="consistency function"),
    Case("KarrasVePipeline", lambda: unconditional("KarrasVePipeline", diffusers.KarrasVeScheduler(), pixel_unet(3, size=4)),
         lambda pipe: PIXEL, family="image", note="stochastic second-order steps"),
    Case("LDMTextToImagePipeline", latent_diffusion,
         lambda pipe: {"prompt": "a seven", "height": 32, "width": 32, "guidance_scale": 6.0, **PIXEL},
         schedulers("PNDMScheduler"), note="a text encoder in the call"),
    Case("LDMSuperResolutionPipeline", super_resolution, lambda pipe: {"image": image(8), **PIXEL},
         schedulers("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"), "task", "the picture in further channels"),
    Case("IFPipeline", deepfloyd,
         lambda pipe: {"prompt_embeds": randn(1, 5, 8, seed=3), "negative_prompt_embeds": randn(1, 5, 8, seed=4), "height": 8,
                       "width": 8, "guidance_scale": 4.0, **PIXEL},
         schedulers("DPMSolverMultistepScheduler"), "image", "learned variance, dynamic thresholding"),
)  # fmt: skip
