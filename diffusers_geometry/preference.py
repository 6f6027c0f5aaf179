"""Scores of images by a preference model of the CLIP kind, a measure of what guidance did that is not geometry.

Such a model (PickScore, HPS, or CLIP itself) embeds a prompt and an image; its score is their cosine similarity times the
exponential of a learned scale, and under the Bradley-Terry model it was trained with

    P(image a is preferred to image b | prompt) = sigmoid(score_a - score_b)

(Kirstain et al., 2023, arXiv:2305.01569, equation 1). A difference of scores under one prompt means something; a score alone, or
scores under two prompts, do not compare.

    scorer = preference_scorer("org/preference-model")
    found = compare_preference(scorer, guided_images, plain_images, prompts)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .estimate import Estimate


class PreferenceScorer:
    """A CLIP model with its processor; call it with images and prompts.

    Attributes:
        name: "org/model@commit", or the folder.
        model: The CLIPModel, in eval mode.
        processor: Its CLIPProcessor.
    """

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self.name, self.model, self.processor = name, model.eval().requires_grad_(False), processor

    def __call__(self, images: Any, prompts: str | Sequence[str], chunk_size: int = 32) -> Tensor:
        """Scores of images for their prompts, shape (B,), float32 on the CPU; natural logarithms of odds.

        Args:
            images: As pipelines return them: a list of PIL images, an array (B, H, W, C) ("np") or a tensor (B, C, H, W) ("pt"),
                both in [0, 1] with one or three channels.
            prompts: One per image, or one for all. What exceeds the model's length is cut off, as in its training.
            chunk_size: Images at once.

        Raises:
            ValueError: no images, another number of prompts, or values that are no images in [0, 1].
        """
        pictures = _pictures(images)
        texts = [prompts] * len(pictures) if isinstance(prompts, str) else list(prompts)
        if not pictures or len(texts) != len(pictures):
            raise ValueError(f"{len(pictures)} images, {len(texts)} prompts. Expected at least one image, and a prompt for each.")
        parts = [slice(i, i + chunk_size) for i in range(0, len(pictures), chunk_size)]
        return torch.cat([self._score(pictures[part], texts[part]) for part in parts])

    @torch.no_grad()
    def _score(self, pictures: list, texts: list[str]) -> Tensor:
        inputs = self.processor(text=texts, images=pictures, return_tensors="pt", padding=True, truncation=True)
        found = self.model(**inputs.to(self.model.device))
        # The model gives unit vectors.
        return (self.model.logit_scale.exp() * (found.image_embeds * found.text_embeds).sum(dim=1)).float().cpu()


def preference_scorer(
    model: str | Path, *, revision: str | None = None, token: str | bool | None = None, device: str | torch.device = "cpu"
) -> PreferenceScorer:
    """A scorer from a folder or Hub id of a CLIP model with a processor; safetensors only, pinned to one commit.

    Args:
        model: Folder or Hub id, such as "yuvalkirstain/PickScore_v1".
        revision: Branch, tag or commit.
        token: Of the Hub, as transformers takes it.
        device: Where the model goes.

    Raises:
        ValueError: another kind of model, or weights that are missing.
        OSError: nothing there, or no safetensors.
    """
    from transformers import AutoConfig, CLIPModel, CLIPProcessor

    where = {"revision": revision or "main", "token": token}
    config = AutoConfig.from_pretrained(model, trust_remote_code=False, **where)
    if config.model_type != "clip":
        raise ValueError(f"{model} is a {config.model_type!r} model. Expected 'clip', with an image and a text side.")
    commit = getattr(config, "_commit_hash", None)
    where["revision"] = commit or where["revision"]
    network, said = CLIPModel.from_pretrained(model, use_safetensors=True, output_loading_info=True, **where)
    if said["missing_keys"]:
        raise ValueError(f"{model} lacks {sorted(said['missing_keys'])[:3]}. Expected the weights of a whole CLIPModel.")
    processor = CLIPProcessor.from_pretrained(model, **where)
    return PreferenceScorer(f"{model}@{commit}" if commit else str(model), network.to(torch.device(device)), processor)


@dataclass(frozen=True)
class PreferenceComparison:
    """What a scorer says of pairs of images.

    Attributes:
        difference: Mean of score(first) - score(second), with its standard error over pairs.
        share_preferred: Share of pairs in which the first scores higher, ties half, with its standard error.
        pairs: Their number.
        model: The scorer's name.
    """

    difference: Estimate
    share_preferred: Estimate
    pairs: int
    model: str


def compare_preference(scorer: PreferenceScorer, first: Any, second: Any, prompts: str | Sequence[str]) -> PreferenceComparison:
    """Compares image i of ``first`` with image i of ``second`` under prompt i; at least two pairs."""
    gap = (scorer(first, prompts) - scorer(second, prompts)).double()
    if len(gap) < 2:
        raise ValueError(f"{len(gap)} pairs. Expected at least 2, for a standard error.")
    wins = (gap.sign() + 1) / 2
    share = wins.mean().item()
    # With Laplace's two added pairs, so that an unanimous comparison of few pairs is not called certain.
    smooth = (wins.sum().item() + 1) / (len(gap) + 2)
    errors = (gap.std().item() / math.sqrt(len(gap)), math.sqrt(smooth * (1 - smooth) / len(gap)))
    return PreferenceComparison(Estimate(gap.mean().item(), errors[0]), Estimate(share, errors[1]), len(gap), scorer.name)


def _pictures(images: Any) -> list:
    """A list of RGB PIL images."""
    from PIL import Image

    if isinstance(images, Tensor):
        images = images.detach().float().cpu().movedim(1, -1).numpy() if images.ndim == 4 else images.numpy()
    if isinstance(images, np.ndarray):
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"images have shape {images.shape} and values from {images.min():.3g} to {images.max():.3g}. Expected (B, H, W, C) "
                "or a tensor (B, C, H, W), with one or three channels, in [0, 1]."
            )
        pixels = (255 * images).round().astype(np.uint8)
        images = [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
    return [image.convert("RGB") for image in images]
