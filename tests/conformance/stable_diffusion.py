"""Stable Diffusion 1 and 2: text, image, mask, control, instruction, depth, upscaling, perturbed attention, consistency."""

import diffusers
import tiny
from case import Case, autoencoder, image, pipeline, random_weights, schedulers
from pixel import conditional_unet
from tiny import SCALED_LINEAR, randn

MANY = schedulers("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler")
TWO = schedulers("EulerAncestralDiscreteScheduler")


def embeddings(dim=8, **options):
    """Prompt embeddings, guidance on and latents out: what every class of this family takes."""
    return {
        "prompt_embeds": randn(1, 5, dim, seed=3), "negative_prompt_embeds": randn(1, 5, dim, seed=4), "guidance_scale": 5.0,
        "num_inference_steps": 4, "output_type": "latent", **options,
    }  # fmt: skip


def text_to_image(**options):
    return embeddings(height=8, width=8) | options


def ddim(**options):
    return diffusers.DDIMScheduler(**SCALED_LINEAR, clip_sample=False, **options)


def plain(scheduler=None):
    return tiny.sd_pipeline(scheduler, unet=conditional_unet())


def stable_diffusion(name, in_channels=4, scheduler=None, unet=None, **components):
    return pipeline(
        name, vae=autoencoder(), text_encoder=None, tokenizer=None, unet=unet or conditional_unet(in_channels, 4),
        scheduler=scheduler or ddim(), **components,
    )  # fmt: skip


def unchecked(name, **options):
    """The classes that may come with a safety checker, without one."""
    return stable_diffusion(name, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **options)


def controlnet():
    return random_weights(
        diffusers.ControlNetModel(
            block_out_channels=(8, 16), layers_per_block=1, in_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            cross_attention_dim=8, norm_num_groups=2, attention_head_dim=4, conditioning_embedding_out_channels=(4, 8),
        )
    )  # fmt: skip


def controlled():
    return unchecked("StableDiffusionControlNetPipeline", controlnet=controlnet())


def adapter():
    return random_weights(
        diffusers.T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    )


def with_adapter():
    """The adapter's features are added before a block with attention halves the picture, and after the last block."""
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    unet = conditional_unet(down_block_types=down, up_block_types=up)
    return unchecked("StableDiffusionAdapterPipeline", unet=unet, adapter=adapter())


def upscaler():
    """Four channels of noise and three of the picture; the picture's own noise level is a class label."""
    unet = conditional_unet(7, 4, num_class_embeds=100)
    low_res = diffusers.DDPMScheduler()
    return unchecked_upscaler("StableDiffusionUpscalePipeline", unet, low_res_scheduler=low_res, max_noise_level=99)


def unchecked_upscaler(name, unet, **components):
    return pipeline(
        name,
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=ddim(prediction_type="v_prediction"),
        **components,
    )


def latent_upscaler():
    """The k-diffusion upscaler: preconditioned by hand inside the loop, with Euler's sigmas."""
    unet = random_weights(
        diffusers.UNet2DConditionModel(
            act_fn="gelu", attention_head_dim=4, norm_num_groups=None, block_out_channels=[32, 64, 64], time_cond_proj_dim=136,
            conv_in_kernel=1, conv_out_kernel=1, cross_attention_dim=8,
            down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 2), in_channels=8,
            mid_block_type=None, only_cross_attention=False, out_channels=5, resnet_time_scale_shift="scale_shift",
            time_embedding_type="fourier", timestep_post_act="gelu", up_block_types=(*["KCrossAttnUpBlock2D"] * 2, "KUpBlock2D"),
        )
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="sample")
    return pipeline(
        "StableDiffusionLatentUpscalePipeline", vae=autoencoder(), text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler
    )


def latent_upscaler_call(pipe):
    pooled = {"pooled_prompt_embeds": randn(1, 8, seed=5), "negative_pooled_prompt_embeds": randn(1, 8, seed=6)}
    return embeddings(image=randn(1, 4, 4, 4, seed=7), **pooled)


def consistency():
    scheduler = diffusers.LCMScheduler(**SCALED_LINEAR, clip_sample=False)
    return unchecked("LatentConsistencyModelPipeline", scheduler=scheduler, unet=conditional_unet(time_cond_proj_dim=8))


def inpaint_call(pipe):
    return text_to_image(image=image(), mask_image=image(channels=1).round())


def without_negative(arguments):
    return {name: value for name, value in arguments.items() if name != "negative_prompt_embeds"}


CASES = (
    Case("StableDiffusionPipeline", plain, lambda pipe: text_to_image(), MANY),
    Case("StableDiffusionPipeline unguided", plain, lambda pipe: text_to_image(guidance_scale=1.0, output_type="np"), TWO),
    Case("StableDiffusionPipeline rescaled", plain, lambda pipe: text_to_image(guidance_rescale=0.7), TWO,
         note="guidance rescaled: not linear in the outputs"),
    Case("StableDiffusionPipeline LCM one step", lambda: plain(diffusers.LCMScheduler(**SCALED_LINEAR)),
         lambda pipe: text_to_image(guidance_scale=1.0, num_inference_steps=1), note="one step"),
    Case("StableDiffusionPipeline Turbo one step",
         lambda: plain(diffusers.EulerAncestralDiscreteScheduler(**SCALED_LINEAR, timestep_spacing="trailing")),
         lambda pipe: text_to_image(guidance_scale=0.0, num_inference_steps=1), note="one step from the largest sigma"),
    Case("StableDiffusionPipeline v-prediction", lambda: plain(ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True,
         timestep_spacing="trailing")), lambda pipe: text_to_image(), note="zero-terminal signal-to-noise ratio"),
    Case("StableDiffusionImg2ImgPipeline", lambda: unchecked("StableDiffusionImg2ImgPipeline"),
         lambda pipe: embeddings(image=image(), strength=0.75), MANY, note="starts within the schedule"),
    Case("StableDiffusionInpaintPipeline", lambda: unchecked("StableDiffusionInpaintPipeline", in_channels=9),
         inpaint_call, TWO, "task", "mask and picture in channels"),
    Case("StableDiffusionInpaintPipeline four channels", lambda: unchecked("StableDiffusionInpaintPipeline"),
         inpaint_call, TWO, "task", "the known part put back"),
    Case("StableDiffusionControlNetPipeline", controlled,
         lambda pipe: text_to_image(image=image()), TWO, "task", "a second network sees the sample"),
    Case("StableDiffusionControlNetPipeline first half", controlled,
         lambda pipe: text_to_image(image=image(), control_guidance_end=0.5), TWO, "task", "the loop counter ends the control"),
    Case("StableDiffusionAdapterPipeline", with_adapter,
         lambda pipe: text_to_image(image=image()), TWO, "task", "features of a picture added"),
    Case("StableDiffusionInstructPix2PixPipeline", lambda: unchecked("StableDiffusionInstructPix2PixPipeline", in_channels=8),
         lambda pipe: embeddings(image=image(), image_guidance_scale=1.5), TWO, "task", "three branches, the picture in channels"),
    Case("StableDiffusionDepth2ImgPipeline",
         lambda: stable_diffusion("StableDiffusionDepth2ImgPipeline", in_channels=5, depth_estimator=None, feature_extractor=None),
         lambda pipe: embeddings(image=image(), depth_map=randn(1, 4, 4, seed=6), strength=0.75), TWO, "task",
         "depth in a channel"),
    Case("StableDiffusionUpscalePipeline", upscaler, lambda pipe: embeddings(image=image(4), noise_level=20), TWO, "task",
         "a noised picture in channels"),
    Case("StableDiffusionLatentUpscalePipeline", latent_upscaler, latent_upscaler_call, family="task",
         note="preconditioned in the loop"),
    Case("StableDiffusionPAGPipeline", lambda: unchecked("StableDiffusionPAGPipeline", pag_applied_layers="mid"),
         lambda pipe: text_to_image(pag_scale=3.0), TWO, note="three branches, attention perturbed"),
    Case("LatentConsistencyModelPipeline", consistency, lambda pipe: without_negative(text_to_image()), note="guidance embedded"),
)  # fmt: skip
