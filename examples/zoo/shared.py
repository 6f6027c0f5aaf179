"""What the digit models share, loaded: the VAE, the text encoder, the classifier, and the training digits as latents."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from classifier import DigitClassifier
from data import digits_split
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SHARED = Path(__file__).parent / "shared"
GUIDANCE_DROPOUT = 0.1  # share of training rows without a caption or class


def load_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(SHARED / "vae", use_safetensors=True)


def load_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(SHARED / "tokenizer")


def load_text_encoder(projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """The text encoder in float32: transformers keeps the stored dtype, diffusers' networks are upcast when loaded."""
    return (CLIPTextModelWithProjection if projected else CLIPTextModel).from_pretrained(SHARED / "text_encoder").eval()


@functools.cache
def load_classifier() -> DigitClassifier:
    return DigitClassifier.from_pretrained(SHARED / "classifier", use_safetensors=True)


@functools.cache
@torch.no_grad()
def training_latents() -> Tensor:
    """The training digits' posterior means under the VAE, scaled to unit standard deviation, (4000, 4, 8, 8)."""
    vae, images = load_vae(), digits_split()[0].images
    return torch.cat([vae.encode(x).latent_dist.mean for x in images.split(500)]) * vae.config.scaling_factor


@torch.no_grad()
def reconstructions(images: Tensor) -> Tensor:
    """Images through the VAE and back, clamped to [-1, 1] as the pipelines do, (n, 1, 32, 32)."""
    vae = load_vae()
    return torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) for x in images.split(500)])


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Writes a pipeline whose networks and VAE are stored in half precision and whose configurations name no path."""
    for module in pipe.components.values():
        if isinstance(module, ModelMixin):
            module.half()
        if hasattr(module, "register_to_config"):
            module.register_to_config(_name_or_path="")
    pipe.save_pretrained(folder)
