"""Flow-matching transformers of images whose latents stay a picture: AuraFlow, Sana, Lumina 2, ZImage, CogView 4 and others."""

import diffusers
import torch
from case import FLOW, FLOW_SIGMAS, Case, autoencoder, flow_scheduler, random_weights
from flow import THREE_TEXTS, TWO_TEXTS, flow, pooled
from stable_diffusion import embeddings
from text import clip_text_encoder
from tiny import randn
from transformers_2d import PROMPT_MASKS, masks

SIZE = {"height": 8, "width": 8}
LARGE = {"height": 32, "width": 32}


def aura():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=8, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    return flow("AuraFlowPipeline", transformer)


def sana_vae():
    """Four levels, as the pictures' sides must be multiples of 32."""
    blocks, scales = ("ResBlock",) * 3 + ("EfficientViTBlock",), ((),) * 3 + ((5,),)
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales, encoder_layers_per_block=(1,) * 4, decoder_layers_per_block=(1,) * 4,
        downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.4,
    )  # fmt: skip
    return random_weights(vae)


def sana(name="SanaPipeline", scheduler=None, **config):
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4, sample_size=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, **config,
    )  # fmt: skip
    return flow(name, transformer, sana_vae(), scheduler or flow_scheduler(shift=3.0))


def sana_call(pipe):
    return embeddings(**LARGE, **masks(*PROMPT_MASKS), use_resolution_binning=False, negative_prompt=None)


def sprint():
    return sana("SanaSprintPipeline", diffusers.SCMScheduler(), guidance_embeds=True, qk_norm="rms_norm_across_heads")


def sprint_call(pipe):
    arguments = embeddings(**LARGE, **masks(PROMPT_MASKS[0]), use_resolution_binning=False, num_inference_steps=2)
    del arguments["negative_prompt_embeds"]
    return arguments


def lumina_2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(16, 16, 16), cap_feat_dim=8,
    )  # fmt: skip
    return flow("Lumina2Pipeline", transformer)


def lumina_2_call(pipe, **options):
    return embeddings(**LARGE, **masks(*PROMPT_MASKS), **options)


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=8, axes_dims=[4, 2, 2], axes_lens=[64, 16, 16],
    )  # fmt: skip
    return flow("ZImagePipeline", transformer)


def z_image_call(pipe, **options):
    prompts = {"prompt_embeds": [randn(5, 8, seed=3)], "negative_prompt_embeds": [randn(4, 8, seed=4)]}
    return embeddings(**SIZE, **prompts, **options)


def cogview_4():
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4, text_embed_dim=8,
        time_embed_dim=8, condition_dim=4, rope_axes_dim=(16, 16),
    )  # fmt: skip
    scheduler = flow_scheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return flow("CogView4Pipeline", transformer, autoencoder(3), scheduler)


def prx():
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=2, in_channels=4, context_in_dim=8, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[4, 4],
    )  # fmt: skip
    return flow("PRXPipeline", transformer, text=("tokenizer",), text_encoder=clip_text_encoder())


def prx_call(pipe):
    bools = {name: mask.bool() for name, mask in masks(*PROMPT_MASKS).items()}
    return embeddings(**SIZE, **bools, use_resolution_binning=False)


def hidream():
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_channels=[8, 8], text_emb_dim=8, num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8), llama_layers=(0, 1),
    )  # fmt: skip
    pipe = flow("HiDreamImagePipeline", transformer, text=(*THREE_TEXTS, "text_encoder_4", "tokenizer_4"))
    pipe.default_sample_size = 4  # pictures are scaled to this area
    return pipe


def hidream_call(pipe):
    arguments = pooled(height=8, width=8)
    for prefix, seed in (("", 3), ("negative_", 7)):
        del arguments[prefix + "prompt_embeds"]
        arguments[prefix + "prompt_embeds_t5"] = randn(1, 5, 8, seed=seed)
        arguments[prefix + "prompt_embeds_llama3"] = randn(2, 1, 5, 8, seed=seed + 1)
    return arguments


def kandinsky_5():
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=8, out_visual_dim=4, patch_size=(1, 2, 2), model_dim=16, ff_dim=16,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 2, 2),
    )  # fmt: skip
    pipe = flow("Kandinsky5T2IPipeline", transformer, text=TWO_TEXTS)
    pipe.resolutions = [(32, 32)]  # the class rounds to the sizes it was trained on
    return pipe


def kandinsky_5_call(pipe):
    arguments = {"height": 32, "width": 32, "guidance_scale": 3.5, "num_inference_steps": 4, "output_type": "latent"}
    for prefix, seed in (("", 3), ("negative_", 7)):
        arguments[prefix + "prompt_embeds_qwen"] = randn(1, 5, 8, seed=seed)
        arguments[prefix + "prompt_embeds_clip"] = randn(1, 8, seed=seed + 1)
        arguments[prefix + "prompt_cu_seqlens"] = torch.tensor([0, 5], dtype=torch.int32)
    return arguments


CASES = (
    Case("AuraFlowPipeline", aura, lambda pipe: embeddings(**SIZE, **masks(*PROMPT_MASKS)), FLOW),
    Case("SanaPipeline", sana, sana_call, FLOW_SIGMAS, note="linear attention"),
    Case("SanaSprintPipeline", sprint, sprint_call, note="consistency in trigonometric flow, embedded guidance"),
    Case("Lumina2Pipeline", lumina_2, lumina_2_call, note="two calls, renormalised guidance, prediction negated"),
    Case("Lumina2Pipeline plain guidance", lumina_2, lambda pipe: lumina_2_call(pipe, cfg_normalization=False), FLOW_SIGMAS[:1],
         note="two calls, prediction negated"),
    Case("ZImagePipeline", z_image, z_image_call, note="samples as a list, prediction negated"),
    Case("ZImagePipeline normalised", z_image, lambda pipe: z_image_call(pipe, cfg_normalization=True),
         note="guidance clipped in norm"),
    Case("CogView4Pipeline", cogview_4, lambda pipe: embeddings(height=16, width=16), note="sizes embedded"),
    Case("PRXPipeline", prx, prx_call, FLOW_SIGMAS),
    Case("HiDreamImagePipeline", hidream, hidream_call, FLOW_SIGMAS[:1], note="experts under no_grad: no exact Jacobian"),
    Case("Kandinsky5T2IPipeline", kandinsky_5, kandinsky_5_call, note="channels last, a frame axis"),
)  # fmt: skip
