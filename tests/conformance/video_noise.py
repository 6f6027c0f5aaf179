"""Video pipelines that predict noise or velocity under a variance-preserving or variance-exploding scheduler."""

import diffusers
import transformers
from case import Case, autoencoder, image, pipeline, random_weights, schedulers
from pixel import LINEAR, conditional_unet
from stable_diffusion import embeddings
from text import clip_vision_encoder
from tiny import SCALED_LINEAR
from transformers_2d import PROMPT_MASKS, VP, masks

FRAMES = {"height": 8, "width": 8, "num_frames": 2}


def cogvideo():
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=8,
        num_layers=1, sample_width=4, sample_height=4, sample_frames=5, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=5,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8,) * 4,
        latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    return pipeline(
        "CogVideoXPipeline", tokenizer=None, text_encoder=None, vae=random_weights(vae), transformer=random_weights(transformer),
        scheduler=scheduler,
    )  # fmt: skip


def cogvideo_call(pipe, **options):
    return embeddings(height=32, width=32, num_frames=5) | options


def latte():
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=4, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=8, in_channels=4,
        cross_attention_dim=16, out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return pipeline(
        "LattePipeline", tokenizer=None, text_encoder=None, vae=autoencoder(), transformer=random_weights(transformer),
        scheduler=scheduler,
    )  # fmt: skip


def latte_call(pipe):
    return embeddings(height=8, width=8, video_length=2, negative_prompt=None, clean_caption=False)


def allegro():
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=24,
        sample_width=4, sample_height=4, sample_frames=2, caption_channels=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4, block_out_channels=(8,) * 4,
        latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    vae.enable_tiling()  # it decodes in no other way, and its tiles are larger than this picture
    vae.kernel = vae.stride = (8, 32, 32)
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SCALED_LINEAR)
    return pipeline(
        "AllegroPipeline", tokenizer=None, text_encoder=None, vae=random_weights(vae), transformer=random_weights(transformer),
        scheduler=scheduler,
    )  # fmt: skip


def allegro_call(pipe):
    ones = masks(*PROMPT_MASKS)
    return embeddings(height=32, width=32, num_frames=8, negative_prompt=None, clean_caption=False, **ones)


def animate_diff():
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2,
        motion_max_seq_length=4,
    )  # fmt: skip
    pipe = pipeline(
        "AnimateDiffPipeline", vae=autoencoder(), text_encoder=None, tokenizer=None, unet=conditional_unet(),
        motion_adapter=random_weights(adapter),
        scheduler=diffusers.DDIMScheduler(**LINEAR), feature_extractor=None, image_encoder=None,
    )  # fmt: skip
    random_weights(pipe.unet)
    return pipe


def text_to_video():
    unet = diffusers.UNet3DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    return pipeline(
        "TextToVideoSDPipeline", vae=autoencoder(), text_encoder=None, tokenizer=None, unet=random_weights(unet),
        scheduler=diffusers.DDIMScheduler(**LINEAR),
    )  # fmt: skip


def stable_video():
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, sample_size=4, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=8, num_attention_heads=2,
        projection_class_embeddings_input_dim=24, addition_time_embed_dim=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        **SCALED_LINEAR, prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002, timestep_type="continuous",
        use_karras_sigmas=True, timestep_spacing="leading", interpolation_type="linear",
    )  # fmt: skip
    return pipeline(
        "StableVideoDiffusionPipeline", vae=random_weights(vae), image_encoder=clip_vision_encoder(),
        unet=random_weights(unet), scheduler=scheduler, feature_extractor=transformers.CLIPImageProcessor(crop_size=8, size=8),
    )  # fmt: skip


def stable_video_call(pipe):
    options = {"max_guidance_scale": 2.5, "num_inference_steps": 4, "output_type": "latent"}
    return {"image": image(), **FRAMES, "min_guidance_scale": 1.5, **options}


CASES = (
    Case("CogVideoXPipeline", cogvideo, cogvideo_call, schedulers("CogVideoXDPMScheduler", "DDIMScheduler"), "video",
         "zero-terminal signal-to-noise ratio"),
    Case("CogVideoXPipeline dynamic CFG", cogvideo, lambda pipe: cogvideo_call(pipe, use_dynamic_cfg=True),
         schedulers("DDIMScheduler"), "video", "guidance that grows with the step"),
    Case("LattePipeline", latte, latte_call, VP[1:], "video", "learned variance"),
    Case("AllegroPipeline", allegro, allegro_call, schedulers("DDIMScheduler"), "video", "variance-exploding"),
    Case("AnimateDiffPipeline", animate_diff, lambda pipe: embeddings(**FRAMES), schedulers("EulerDiscreteScheduler"), "video",
         "frames folded into the batch inside the network"),
    Case("TextToVideoSDPipeline", text_to_video, lambda pipe: embeddings(**FRAMES), (), "video",
         "frames folded into the batch of the scheduler"),
    Case("StableVideoDiffusionPipeline", stable_video, stable_video_call, (), "video", "a picture in channels, guidance per frame"),
)  # fmt: skip
