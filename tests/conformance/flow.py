"""Flow-matching transformers of images: SD3, Flux and what packs its latents as Flux does."""

import diffusers
from case import FLOW, FLOW_SIGMAS, Case, autoencoder, flow_scheduler, image, pipeline, random_weights
from stable_diffusion import embeddings
from tiny import randn
from transformers_2d import PROMPT_MASKS, masks

SIZE = {"height": 8, "width": 8}
SHIFT = {"use_dynamic_shifting": True}


def flow(name, transformer, vae=None, scheduler=None, text=("text_encoder", "tokenizer"), **components):
    """A pipeline of a transformer under flow matching, without text encoders."""
    return pipeline(
        name, transformer=random_weights(transformer), vae=vae or autoencoder(), scheduler=scheduler or flow_scheduler(),
        **dict.fromkeys(text), **components,
    )  # fmt: skip


def pixels_vae(channels=1):
    """An autoencoder that keeps the size, as the packed pipelines' own tests have it."""
    return autoencoder(1, channels, shift_factor=0.1, scaling_factor=1.5)


TWO_TEXTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
THREE_TEXTS = (*TWO_TEXTS, "text_encoder_3", "tokenizer_3")


def stable_diffusion_3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=8, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    return flow("StableDiffusion3Pipeline", transformer, text=THREE_TEXTS)


def pooled(**options):
    both = {"pooled_prompt_embeds": randn(1, 8, seed=5), "negative_pooled_prompt_embeds": randn(1, 8, seed=6)}
    return embeddings(**both) | options


def flux(name="FluxPipeline", **config):
    options = {
        "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4),
        "guidance_embeds": True,
    }  # fmt: skip
    transformer = diffusers.FluxTransformer2DModel(**options | config)
    return flow(name, transformer, pixels_vae(), flow_scheduler(**SHIFT), TWO_TEXTS)


def without(arguments, *names):
    return {name: value for name, value in arguments.items() if name not in names}


def flux_call(pipe, **options):
    return without(pooled(**SIZE), "negative_prompt_embeds", "negative_pooled_prompt_embeds") | options


def flux_2():
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), latent_channels=1,
        norm_num_groups=1, layers_per_block=1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return random_weights(vae), transformer


def flux_2_dev():
    vae, transformer = flux_2()
    return flow("Flux2Pipeline", transformer, vae, flow_scheduler(**SHIFT))


def flux_2_klein():
    vae, transformer = flux_2()
    return flow("Flux2KleinPipeline", transformer, vae, flow_scheduler(**SHIFT), is_distilled=False)


def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4), approximator_hidden_dim=16, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    return flow("ChromaPipeline", transformer, pixels_vae())


def qwen_vae():
    return random_weights(
        diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    )  # fmt: skip


def qwen():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return flow("QwenImagePipeline", transformer, qwen_vae())


def qwen_call(pipe):
    ones = masks("prompt_embeds_mask", "negative_prompt_embeds_mask")
    return embeddings(**SIZE, true_cfg_scale=4.0, **ones) | {"guidance_scale": None}


def bria():
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    return flow("BriaPipeline", transformer)


def ovis():
    transformer = diffusers.OvisImageTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return flow("OvisImagePipeline", transformer, pixels_vae())


def chroma_call(pipe):
    return embeddings(**SIZE, **{name: mask.float() for name, mask in masks(*PROMPT_MASKS).items()})


NEGATIVE = ("negative_prompt_embeds",)
CASES = (
    Case("StableDiffusion3Pipeline", stable_diffusion_3, lambda pipe: pooled(**SIZE), FLOW + FLOW_SIGMAS),
    Case("StableDiffusion3Pipeline skipped layers", stable_diffusion_3,
         lambda pipe: pooled(**SIZE, skip_guidance_layers=[0], skip_layer_guidance_start=-1.0, skip_layer_guidance_stop=1.0),
         note="a third call without a layer"),
    Case("StableDiffusion3Pipeline layers skipped at first", stable_diffusion_3,
         lambda pipe: pooled(**SIZE, skip_guidance_layers=[0], skip_layer_guidance_start=-1.0, skip_layer_guidance_stop=0.6),
         note="the loop counter ends the third call"),
    Case("FluxPipeline", flux, flux_call, FLOW_SIGMAS[:1], note="packed latents, embedded guidance"),
    Case("FluxPipeline true CFG", flux, lambda pipe: pooled(**SIZE, true_cfg_scale=3.0), note="packed latents, two calls"),
    Case("FluxImg2ImgPipeline", lambda: flux("FluxImg2ImgPipeline"), lambda pipe: flux_call(pipe, image=image(), strength=0.75),
         note="packed latents, starts within the schedule"),
    Case("FluxKontextPipeline", lambda: flux("FluxKontextPipeline"),
         lambda pipe: flux_call(pipe, image=image(), max_area=64, _auto_resize=False), family="task",
         note="a picture's tokens appended"),
    Case("Flux2Pipeline", flux_2_dev, lambda pipe: without(embeddings(**SIZE), *NEGATIVE),
         note="packed latents, embedded guidance"),
    Case("Flux2KleinPipeline", flux_2_klein, lambda pipe: embeddings(**SIZE), note="packed latents, two calls"),
    Case("ChromaPipeline", chroma, chroma_call, note="packed latents, two calls, masks"),
    Case("QwenImagePipeline", qwen, qwen_call, note="packed latents, true CFG renormalised"),
    Case("BriaPipeline", bria, lambda pipe: embeddings(**SIZE), note="packed latents"),
    Case("OvisImagePipeline", ovis, lambda pipe: embeddings(**SIZE, negative_prompt=None), note="packed latents"),
)  # fmt: skip
