"""Train the VAE that all latent digit models share: 32x32 images to 4x8x8 latents of unit standard deviation.

python examples/zoo/train_vae.py               # about 10 minutes on two cores; run again to resume after a stop
"""

from __future__ import annotations

import torch
from data import digits_split, random_rows, shifted
from diffusers import AutoencoderKL
from torch import Tensor, nn
from training import argument_parser, finish, fit, write_training

BATCH = 64
KL_WEIGHT = 2e-3  # per latent number, against squared errors per pixel


def main() -> None:
    args = finish(argument_parser(__doc__, steps=3000))
    torch.manual_seed(0)
    vae = AutoencoderKL(
        1, 1, ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3, (16, 32, 64), norm_num_groups=8, latent_channels=4,
        sample_size=32, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip
    images = digits_split()[0].images

    def loss_of(_: nn.Module, generator: torch.Generator) -> Tensor:
        x = shifted(images[random_rows(len(images), BATCH, generator)], generator).to(vae.device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        return (decoded - x).square().mean() + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    history = fit(vae, loss_of, "vae", args, trained_on=[images], learning_rate=2e-3, mixed_precision="bf16")
    vae.half().float()  # the factor is that of the weights as they are stored
    with torch.no_grad():
        latents, held_out = vae.encode(images).latent_dist.mean, digits_split()[1].images
        error = (vae.decode(vae.encode(held_out).latent_dist.mean).sample - held_out).square().mean().item()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    folder = args.output / "shared" / "vae"
    vae.half().save_pretrained(folder)
    write_training(folder, vae, history, batch=BATCH, held_out_squared_error=error)


if __name__ == "__main__":
    main()
