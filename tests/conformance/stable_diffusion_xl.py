"""Stable Diffusion XL, and what shares its UNet or stands on several stages: Kandinsky, Stable Cascade, Wuerstchen."""

import diffusers
from case import Case, autoencoder, image, pipeline, random_weights, schedulers
from pixel import LINEAR, conditional_unet
from stable_diffusion import embeddings
from text import clip_text_encoder, clip_tokenizer
from tiny import SCALED_LINEAR, randn

EULERS = schedulers("DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler")
EDM = schedulers("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
SIZE = {"height": 8, "width": 8}


def xl_unet(in_channels=4, numbers=6):
    """The XL UNet: pooled text and ``numbers`` sizes and crops are added to the time embedding."""
    return conditional_unet(
        in_channels, 4, addition_embed_type="text_time", addition_time_embed_dim=4, use_linear_projection=True,
        projection_class_embeddings_input_dim=4 * numbers + 8,
    )  # fmt: skip


def xl(name, in_channels=4, scheduler=None, numbers=6, force_upcast=False, **components):
    return pipeline(
        name, vae=autoencoder(force_upcast=force_upcast), text_encoder=None, tokenizer=None, tokenizer_2=None,
        text_encoder_2=clip_text_encoder(projected=True), unet=xl_unet(in_channels, numbers),
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(**SCALED_LINEAR), **components,
    )  # fmt: skip


def xl_call(**options):
    pooled = {"pooled_prompt_embeds": randn(1, 8, seed=5), "negative_pooled_prompt_embeds": randn(1, 8, seed=6)}
    return embeddings(**pooled) | options


def aesthetic(**options):
    return xl("StableDiffusionXLImg2ImgPipeline", numbers=5, requires_aesthetics_score=True, **options)


def aesthetic_call(pipe):
    return xl_call(image=image(), strength=0.75)


def upcast():
    """As released: the class then calls ``vae.to(torch.float32)`` before its loop, with nothing to convert."""
    return aesthetic(force_upcast=True)


def edm_scheduler():
    return diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)


def movq():
    return random_weights(
        diffusers.VQModel(
            block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], in_channels=3,
            latent_channels=4, layers_per_block=1, norm_num_groups=2, norm_type="spatial", num_vq_embeddings=8, out_channels=3,
            up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], vq_embed_dim=4,
        )
    )  # fmt: skip


def kandinsky():
    unet = conditional_unet(
        4, 8, addition_embed_type="image", down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        encoder_hid_dim=8, encoder_hid_dim_type="image_proj", resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    return pipeline("KandinskyV22Pipeline", unet=unet, scheduler=diffusers.DDIMScheduler(**LINEAR), movq=movq())


def kandinsky_call(pipe):
    embeds = {"image_embeds": randn(1, 8, seed=3), "negative_image_embeds": randn(1, 8, seed=4)}
    return {**embeds, "height": 16, "width": 16, "guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "latent"}


def cascade_unet(channels, **config):
    options = {
        "in_channels": channels, "out_channels": channels, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 16,
        "block_out_channels": [8, 16], "num_attention_heads": [-1, 2], "down_num_layers_per_block": [1, 1],
        "up_num_layers_per_block": [1, 1], "clip_text_pooled_in_channels": 8, "dropout": [0.1, 0.1],
        "block_types_per_layer": [
            ["SDCascadeResBlock", "SDCascadeTimestepBlock"], ["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"],
        ],
    }  # fmt: skip
    return random_weights(diffusers.models.StableCascadeUNet(**options | config))


def paella():
    model = diffusers.pipelines.deprecated.wuerstchen.PaellaVQModel
    return random_weights(model(bottleneck_blocks=1, num_vq_embeddings=8, embed_dim=8))


def cascade_decoder():
    return pipeline(
        "StableCascadeDecoderPipeline", decoder=cascade_unet(4, effnet_in_channels=4), tokenizer=clip_tokenizer(),
        text_encoder=clip_text_encoder(projected=True), scheduler=diffusers.DDPMWuerstchenScheduler(), vqgan=paella(),
        latent_dim_scale=2.0,
    )  # fmt: skip


def cascade_text():
    names = ("prompt_embeds", "negative_prompt_embeds", "prompt_embeds_pooled", "negative_prompt_embeds_pooled")
    shapes = ((1, 5, 8), (1, 5, 8), (1, 1, 8), (1, 1, 8))
    return {name: randn(*shape, seed=3 + i) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))}


def cascade_decoder_call(pipe):
    image_embeddings = randn(1, 4, 2, 2, seed=9)
    options = {"guidance_scale": 2.0, "num_inference_steps": 4, "output_type": "latent"}
    return {"image_embeddings": image_embeddings, **cascade_text(), **options}


def cascade_prior():
    unet = cascade_unet(4, clip_text_in_channels=8, clip_image_in_channels=8, switch_level=[False])
    return pipeline(
        "StableCascadePriorPipeline", tokenizer=clip_tokenizer(), text_encoder=clip_text_encoder(projected=True), prior=unet,
        scheduler=diffusers.DDPMWuerstchenScheduler(), resolution_multiple=4.0,
    )  # fmt: skip


def cascade_prior_call(pipe):
    options = {"height": 16, "width": 16, "guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "pt"}
    return {**cascade_text(), **options}


CASES = (
    Case("StableDiffusionXLPipeline", lambda: xl("StableDiffusionXLPipeline"), lambda pipe: xl_call(**SIZE), EULERS),
    Case("StableDiffusionXLPipeline EDM", lambda: xl("StableDiffusionXLPipeline", scheduler=edm_scheduler()),
         lambda pipe: xl_call(**SIZE), EDM[1:], note="preconditioned as Karras et al."),
    Case("StableDiffusionXLPipeline Turbo one step", lambda: xl("StableDiffusionXLPipeline"),
         lambda pipe: xl_call(**SIZE, guidance_scale=0.0, num_inference_steps=1), note="one step, unguided"),
    Case("StableDiffusionXLImg2ImgPipeline", aesthetic,
         aesthetic_call, EULERS, note="starts within the schedule, aesthetic scores"),
    Case("StableDiffusionXLInpaintPipeline", lambda: xl("StableDiffusionXLInpaintPipeline", 9),
         lambda pipe: xl_call(**SIZE, image=image(), mask_image=image(channels=1).round(), strength=0.99), EULERS[:1], "task",
         "mask and picture in channels"),
    Case("KandinskyV22Pipeline", kandinsky, kandinsky_call, schedulers("DDPMScheduler"), note="learned variance, image embeddings"),
    Case("StableCascadeDecoderPipeline", cascade_decoder, cascade_decoder_call, note="Wuerstchen's scheduler, times in [0, 1]"),
    Case("StableCascadePriorPipeline", cascade_prior, cascade_prior_call, note="the first stage, image embeddings as latents"),
    Case("StableDiffusionXLImg2ImgPipeline upcast", upcast, aesthetic_call, EULERS, note="the VAE is cast within the call"),
)  # fmt: skip
