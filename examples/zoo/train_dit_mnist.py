"""Train ``dit-mnist``, a class-conditional latent diffusion transformer on digits.

python examples/zoo/train_dit_mnist.py         # about 20 minutes on two cores; run again to resume after a stop
"""

from __future__ import annotations

import torch
from data import DIGIT_NAMES, digits_split, random_rows
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from shared import GUIDANCE_DROPOUT, load_vae, save_pipeline, training_latents
from torch import Tensor, nn
from training import argument_parser, finish, fit, write_training

BATCH = 128
NO_CLASS = 1000  # DiTPipeline asks for this class where it wants none


def main() -> None:
    args = finish(argument_parser(__doc__, steps=3000))
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8, patch_size=2, num_layers=8, attention_head_dim=32, num_attention_heads=4, in_channels=4, out_channels=4,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=NO_CLASS, norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False)
    latents, labels = training_latents(), digits_split()[0].labels

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = random_rows(len(latents), BATCH, generator)
        dropped = torch.rand(BATCH, generator=generator) < GUIDANCE_DROPOUT
        noise, t = torch.randn(BATCH, 4, 8, 8, generator=generator), torch.randint(1000, (BATCH,), generator=generator)
        x_t, told = scheduler.add_noise(latents[rows], noise, t), torch.where(dropped, NO_CLASS, labels[rows])
        device = transformer.device
        predicted = model(x_t.to(device), timestep=t.to(device), class_labels=told.to(device)).sample
        return (predicted - noise.to(device)).square().mean()

    # Classes are dropped above; the network's own dropout, which would act on top of it, is off as in evaluation.
    for module in transformer.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    history = fit(transformer, loss_of, "dit-mnist", args, trained_on=[latents, labels])
    folder = args.output / "dit-mnist"
    write_training(folder, transformer, history, batch=BATCH)
    names = dict(enumerate(DIGIT_NAMES))
    pipe = DiTPipeline(transformer, load_vae(), scheduler, id2label=names)
    pipe.register_to_config(id2label=names)  # the class itself does not, and would forget them
    save_pipeline(pipe, folder)


if __name__ == "__main__":
    main()
