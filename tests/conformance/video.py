"""Video transformers under flow matching: Wan, LTX, Mochi, Hunyuan, Sana."""

import diffusers
from case import FLOW_SIGMAS, Case, flow_scheduler, random_weights
from flow import TWO_TEXTS, flow, without
from stable_diffusion import embeddings
from tiny import randn
from transformers_2d import PROMPT_MASKS, masks

CLIP = {"height": 16, "width": 16, "num_frames": 5}
LARGE_CLIP = {"height": 32, "width": 32, "num_frames": 5}


def wan_vae(spatial=4):
    """Halves the sides ``log2(spatial)`` times and the frames twice."""
    levels = spatial.bit_length() - 1
    return random_weights(
        diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1] * (levels + 1), num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
            temperal_downsample=[False] * (levels - 2) + [True] * 2, scale_factor_spatial=spatial, scale_factor_temporal=4,
        )
    )  # fmt: skip


def wan_transformer():
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=16, num_layers=1, rope_max_seq_len=16,
    )  # fmt: skip


def wan(**components):
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return flow("WanPipeline", wan_transformer(), wan_vae(), scheduler, **{"transformer_2": None} | components)


def wan_of_two():
    """The second network takes over below nine tenths of the noise."""
    return wan(transformer_2=random_weights(wan_transformer(), seed=2), boundary_ratio=0.9)


def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=1,
        caption_channels=8,
    )  # fmt: skip
    scaling = (True, True, True, False)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=scaling, decoder_spatio_temporal_scaling=scaling, patch_size=1,
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
    )  # fmt: skip
    return flow("LTXPipeline", transformer, random_weights(vae), flow_scheduler(use_dynamic_shifting=True))


def ltx_call(pipe, **options):
    return embeddings(height=32, width=32, num_frames=9, **masks(*PROMPT_MASKS)) | options


def mochi():
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=8, in_channels=12,
        text_embed_dim=8, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    )
    return flow("MochiPipeline", transformer, random_weights(vae), flow_scheduler(invert_sigmas=True))


def mochi_call(pipe):
    bools = {name: mask.bool() for name, mask in masks(*PROMPT_MASKS).items()}
    return embeddings(height=32, width=32, num_frames=7, **bools)


def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=8, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    return flow("HunyuanVideoPipeline", transformer, random_weights(vae), flow_scheduler(shift=7.0), TWO_TEXTS)


def hunyuan_video_call(pipe, **options):
    pooled = {"pooled_prompt_embeds": randn(1, 8, seed=5), "negative_pooled_prompt_embeds": randn(1, 8, seed=6)}
    return embeddings(**LARGE_CLIP, **pooled, **masks(*PROMPT_MASKS)) | options


def sana_video():
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8, sample_size=4, rope_max_seq_len=16,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return flow("SanaVideoPipeline", transformer, wan_vae(8), scheduler)


def sana_video_call(pipe):
    options = {"frames": 5, "use_resolution_binning": False, "negative_prompt": None}
    return embeddings(height=32, width=32, **masks(*PROMPT_MASKS), **options)


CASES = (
    Case("WanPipeline", wan, lambda pipe: embeddings(**CLIP), (lambda pipe: flow_scheduler(shift=3.0),), "video", "two calls"),
    Case("WanPipeline two networks", wan_of_two, lambda pipe: embeddings(**CLIP), family="video", note="one network at high noise"),
    Case("LTXPipeline", ltx, ltx_call, FLOW_SIGMAS[:1], "video", "packed latents"),
    Case("LTXPipeline rescaled", ltx, lambda pipe: ltx_call(pipe, guidance_rescale=0.7), (), "video", "guidance rescaled"),
    Case("MochiPipeline", mochi, mochi_call, (lambda pipe: flow_scheduler(),), "video", "sigmas inverted: from zero to one"),
    Case("HunyuanVideoPipeline", hunyuan_video, lambda pipe: without(hunyuan_video_call(pipe), "negative_prompt_embeds"), (),
         "video", "embedded guidance"),
    Case("HunyuanVideoPipeline true CFG", hunyuan_video, lambda pipe: hunyuan_video_call(pipe, true_cfg_scale=3.0), (), "video",
         "embedded guidance and two calls"),
    Case("SanaVideoPipeline", sana_video, sana_video_call, (), "video", "linear attention"),
)  # fmt: skip
