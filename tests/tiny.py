"""Tiny random-weight pipelines, built as diffusers' own tests build theirs. No mocks."""

import diffusers
import torch

SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module, seed=1, scale=0.08):
    """Moves every parameter off its initial value (zero-initialised layers would hide the network), ready to evaluate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1) * 0.5)
    return module.eval()


def unet2d(size=8, channels=1):
    return randomised(
        diffusers.UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=8,
        )
    )  # fmt: skip


def sd_unet(size=8):
    return randomised(
        diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=size, in_channels=4, out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8, norm_num_groups=2, attention_head_dim=4,
        )
    )  # fmt: skip


def dit(size=8):
    return randomised(
        diffusers.DiTTransformer2DModel(
            sample_size=size, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero", norm_elementwise_affine=False,
        )
    )  # fmt: skip


def vae():
    return randomised(
        diffusers.AutoencoderKL(
            block_out_channels=[8, 16], in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4,
        )
    )  # fmt: skip


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddpm_pipeline(scheduler=None, size=8, channels=1):
    return quiet(diffusers.DDPMPipeline(unet2d(size, channels), scheduler or diffusers.DDPMScheduler()))


def ddim_pipeline(scheduler=None):
    return quiet(diffusers.DDIMPipeline(unet2d(), scheduler or diffusers.DDIMScheduler()))


def sd_pipeline(scheduler=None, unet=None):
    return quiet(
        diffusers.StableDiffusionPipeline(
            vae=vae(), text_encoder=None, tokenizer=None, unet=unet or sd_unet(), safety_checker=None, feature_extractor=None,
            scheduler=scheduler or diffusers.DDIMScheduler(**SCALED_LINEAR, clip_sample=False), requires_safety_checker=False,
        )
    )  # fmt: skip


def dit_pipeline(scheduler=None):
    return quiet(diffusers.DiTPipeline(dit(), vae(), scheduler or diffusers.DDIMScheduler(clip_sample=False)))


def sd_call(batch=1, **options):
    return {
        "prompt_embeds": randn(batch, 5, 8, seed=3), "negative_prompt_embeds": randn(batch, 5, 8, seed=4), "height": 16,
        "width": 16, "guidance_scale": 7.5, "num_inference_steps": 6, "output_type": "np", **options,
    }  # fmt: skip


def dit_call(**options):
    return {"class_labels": [3], "guidance_scale": 4.0, "num_inference_steps": 6, "output_type": "np", **options}


def pixel_call(**options):
    return {"num_inference_steps": 6, "output_type": "np", **options}


PIPELINES = {
    "DDPM": (ddpm_pipeline, pixel_call, "replay"),
    "DDIM": (ddim_pipeline, pixel_call, "replay"),
    "SD-DDIM": (sd_pipeline, sd_call, "replay"),
    "SD-Euler": (lambda: sd_pipeline(diffusers.EulerDiscreteScheduler(**SCALED_LINEAR)), sd_call, "replay"),
    "SD-EulerA": (lambda: sd_pipeline(diffusers.EulerAncestralDiscreteScheduler(**SCALED_LINEAR)), sd_call, "replay"),
    "SD-Heun": (lambda: sd_pipeline(diffusers.HeunDiscreteScheduler(**SCALED_LINEAR)), sd_call, "replay"),
    "SD-KDPM2": (lambda: sd_pipeline(diffusers.KDPM2DiscreteScheduler(**SCALED_LINEAR)), sd_call, "replay"),
    "SD-PNDM": (lambda: sd_pipeline(diffusers.PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=True)), sd_call, "replay"),
    "SD-DPM++": (lambda: sd_pipeline(diffusers.DPMSolverMultistepScheduler(**SCALED_LINEAR)), sd_call, "replay"),
    "SD-LCM": (lambda: sd_pipeline(diffusers.LCMScheduler(**SCALED_LINEAR)), sd_call, "replay"),
    "SD-unguided": (sd_pipeline, lambda **o: sd_call(guidance_scale=1.0, **o), "replay"),
    "SD-rescaled": (sd_pipeline, lambda **o: sd_call(guidance_rescale=0.7, **o), "drive"),
    "DiT": (dit_pipeline, dit_call, "replay"),
    "DiT-unguided": (dit_pipeline, lambda **o: dit_call(guidance_scale=1.0, **o), "replay"),
}
