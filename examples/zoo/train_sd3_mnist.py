"""Train ``sd3-mnist``: text to image on digits by flow matching with a multimodal diffusion transformer.

python examples/zoo/train_sd3_mnist.py         # about 25 minutes on two cores; run again to resume after a stop

Where its third text encoder is absent, StableDiffusion3Pipeline passes 256 zero vectors in its place, but ``from_pretrained`` then
wants ``text_encoder_3=None, tokenizer_3=None``. So that the folder loads with no argument, a T5 without layers stands there and
returns just these zeros. They stay equal to one another in every layer of the transformer, so that training carries one of them and
counts it 256 times in every attention: the same network for a fraction of the cost.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from data import all_captions
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from shared import load_text_encoder, load_tokenizer, load_vae, save_pipeline, training_latents
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from train_sd_mnist import random_pairs
from training import argument_parser, finish, fit, write_training
from transformers import T5Config, T5EncoderModel

BATCH = 128
ZERO_TOKENS = 256  # max_sequence_length of StableDiffusion3Pipeline's call


class LastKeyCounts(TorchFunctionMode):
    """Attention in which the last key stands for ``count`` equal ones: log(count) on its logits."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.bias, self.calls = math.log(count), 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is scaled_dot_product_attention:
            if kwargs.get("attn_mask") is not None:
                raise NotImplementedError("this attention has a mask already. Expected the joint attention of SD3, which has none.")
            self.calls += 1
            key = args[1]
            kwargs["attn_mask"] = torch.zeros(1, 1, 1, key.shape[2], dtype=key.dtype, device=key.device)
            kwargs["attn_mask"][..., -1] = self.bias
        return func(*args, **kwargs)


def make_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=128, caption_projection_dim=128, pooled_projection_dim=128, pos_embed_max_size=8,
    )  # fmt: skip


def absent_text_encoder(vocabulary: int) -> T5EncoderModel:
    """A T5 that returns zeros: no layers, and a last normalisation whose scale is zero."""
    heads = {"d_kv": 64, "d_ff": 64, "num_heads": 2}
    encoder = T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=128, num_layers=0, use_cache=False, **heads))
    torch.nn.init.zeros_(encoder.shared.weight)
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder.eval()


def main() -> None:
    args = finish(argument_parser(__doc__, steps=2400))
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    pipe = StableDiffusion3Pipeline(
        make_transformer(), FlowMatchEulerDiscreteScheduler(), load_vae(), load_text_encoder(projected=True), tokenizer,
        load_text_encoder(projected=True), tokenizer, None, None,
    )  # fmt: skip
    latents = training_latents()
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(
            all_captions(), None, None, do_classifier_free_guidance=False, max_sequence_length=1
        )

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        images, told = random_pairs(BATCH, False, generator)
        x_0, noise = latents[images], torch.randn(BATCH, 4, 8, 8, generator=generator)
        s = torch.randn(BATCH, generator=generator).sigmoid()  # logit-normal, as in arXiv:2403.03206
        x_t = (1 - s[:, None, None, None]) * x_0 + s[:, None, None, None] * noise
        device = pipe.transformer.device
        conditions = {"encoder_hidden_states": states[told].to(device), "pooled_projections": pooled[told].to(device)}
        with LastKeyCounts(ZERO_TOKENS) as counting:
            predicted = model(x_t.to(device), timestep=1000 * s.to(device), **conditions).sample
        if counting.calls < len(pipe.transformer.transformer_blocks):
            raise RuntimeError(f"{counting.calls} attentions were seen. Expected one or more in every block of the transformer.")
        return (predicted - (noise - x_0).to(device)).square().mean()

    history = fit(pipe.transformer, loss_of, "sd3-mnist", args, trained_on=[latents, states, pooled])
    folder = args.output / "sd3-mnist"
    write_training(folder, pipe.transformer, history, batch=BATCH)
    pipe.register_modules(text_encoder_3=absent_text_encoder(len(tokenizer)), tokenizer_3=tokenizer)
    save_pipeline(pipe, folder)


if __name__ == "__main__":
    main()
