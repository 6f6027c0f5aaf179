"""Diffusion transformers that predict noise or velocity with a variance-preserving scheduler."""

import diffusers
import tiny
from case import Case, autoencoder, pipeline, random_weights, schedulers
from stable_diffusion import embeddings
from text import t5_encoder
from tiny import randn

VP = schedulers("DDIMScheduler", "EulerDiscreteScheduler")
SIZE = {"height": 8, "width": 8}


def masks(*names, length=5):
    return {name: randn(1, length).mul(0).add(1).long() for name in names}


PROMPT_MASKS = ("prompt_attention_mask", "negative_prompt_attention_mask")


def dit():
    pipe = tiny.dit_pipeline()
    pipe.transformer = random_weights(tiny.dit(size=4))
    return pipe


def pixart(name, **config):
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=4, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=8, in_channels=4,
        cross_attention_dim=16, out_channels=8, norm_type="ada_norm_single", **config,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return pipeline(
        name, tokenizer=None, text_encoder=None, vae=autoencoder(), transformer=random_weights(transformer), scheduler=scheduler
    )


def pixart_call(pipe):
    return embeddings(**SIZE, **masks(*PROMPT_MASKS), negative_prompt=None, use_resolution_binning=False)


def hunyuan():
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=4, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=8, hidden_size=16, text_len=5, text_len_t5=5,
    )  # fmt: skip
    return pipeline(
        "HunyuanDiTPipeline", vae=autoencoder(), text_encoder=None, tokenizer=None, text_encoder_2=t5_encoder(), tokenizer_2=None,
        transformer=random_weights(transformer), scheduler=diffusers.DDPMScheduler(clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def hunyuan_call(pipe, **options):
    second = {"prompt_embeds_2": randn(1, 5, 8, seed=5), "negative_prompt_embeds_2": randn(1, 5, 8, seed=6)}
    ones = masks(*PROMPT_MASKS, *(name + "_2" for name in PROMPT_MASKS))
    return embeddings(height=16, width=16, use_resolution_binning=False, **second, **ones) | options


def lumina():
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=8, cross_attention_dim=8,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return pipeline(
        "LuminaPipeline",
        transformer=random_weights(transformer),
        scheduler=scheduler,
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
    )


def cogview3():
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4, text_embed_dim=8,
        time_embed_dim=8, condition_dim=4, pos_embed_max_size=4, sample_size=4,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    return pipeline(
        "CogView3PlusPipeline", tokenizer=None, text_encoder=None, vae=autoencoder(), transformer=random_weights(transformer),
        scheduler=scheduler,
    )  # fmt: skip


CASES = (
    Case("DiTPipeline", dit, lambda pipe: tiny.dit_call(num_inference_steps=4), schedulers("DPMSolverMultistepScheduler"),
         note="the scheduler holds the batch twice, learned variance"),
    Case("PixArtAlphaPipeline", lambda: pixart("PixArtAlphaPipeline", use_additional_conditions=False), pixart_call, VP,
         note="learned variance"),
    Case("PixArtSigmaPipeline", lambda: pixart("PixArtSigmaPipeline"), pixart_call, VP, note="learned variance"),
    Case("HunyuanDiTPipeline", hunyuan, hunyuan_call, VP, note="two text encoders, learned variance"),
    Case("HunyuanDiTPipeline rescaled", hunyuan, lambda pipe: hunyuan_call(pipe, guidance_rescale=0.7), note="guidance rescaled"),
    Case("LuminaPipeline", lumina, lambda pipe: embeddings(height=32, width=32, **masks(*PROMPT_MASKS)), family="latent",
         note="guidance on three channels, prediction negated"),
    Case("CogView3PlusPipeline", cogview3, lambda pipe: embeddings(**SIZE), schedulers("CogVideoXDPMScheduler"),
         note="zero-terminal signal-to-noise ratio"),
)  # fmt: skip
