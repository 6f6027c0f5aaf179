"""Train the pixel models with the schedule of Ho et al. (2020): ``ddpm-mnist`` (32x32 digits) or ``ddpm-emoji`` (16x16 colour).

python examples/zoo/train_ddpm.py --data mnist               # about an hour on two cores (emoji: a quarter); run again to resume
python examples/zoo/train_ddpm.py --data emoji               # fetches the images with npm on first use
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from data import digits_split, emoji_split, random_rows
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from shared import save_pipeline
from torch import Tensor, nn
from training import History, argument_parser, finish, fit, write_training

BATCH = 64
# Steps, the rate from which a cosine falls, and the share of a batch that is kept for the levels where the image takes shape.
STAGES = {"mnist": ((2000, 1e-3, 0.0), (1500, 6e-4, 0.0), (3200, 1e-3, 0.5), (2000, 6e-4, 0.5)), "emoji": ((2000, 1e-3, 0.0),)}
SHAPING = (80, 680)  # timesteps: sigma / alpha from 0.27 to 10


def make_unet(data: str) -> UNet2DModel:
    if data == "mnist":
        return UNet2DModel(
            32, 1, 1, block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=8, attention_head_dim=16,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    return UNet2DModel(
        16, 3, 3, block_out_channels=(48, 80, 112), layers_per_block=1, norm_num_groups=8, attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def random_timesteps(shaping: float, generator: torch.Generator) -> Tensor:
    """A batch of timesteps, a share of them within ``SHAPING``; which are drawn does not change what the best network is."""
    t = torch.randint(1000, (BATCH,), generator=generator)
    count = round(shaping * BATCH)
    t[:count] = torch.randint(*SHAPING, (count,), generator=generator)
    return t


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", choices=("mnist", "emoji"), required=True)
    args = finish(parser)
    name = f"ddpm-{args.data}"
    images = digits_split()[0].images if args.data == "mnist" else emoji_split()[0]
    torch.manual_seed(0)
    unet, scheduler = make_unet(args.data), DDPMScheduler(beta_start=1e-4, beta_end=2e-2)

    def loss_of(model: nn.Module, generator: torch.Generator, shaping: float) -> Tensor:
        x_0 = images[random_rows(len(images), BATCH, generator)]
        noise, t = torch.randn(x_0.shape, generator=generator), random_timesteps(shaping, generator)
        x_t = scheduler.add_noise(x_0, noise, t)
        return (model(x_t.to(unet.device), t.to(unet.device)).sample - noise.to(unet.device)).square().mean()

    history = History()
    for number, (steps, rate, shaping) in enumerate(STAGES[args.data], start=1):
        stage = argparse.Namespace(**vars(args) | {"steps": steps if args.steps is None else args.steps})
        options = {"trained_on": [images], "learning_rate": rate, "mixed_precision": "bf16"}
        history += fit(unet, partial(loss_of, shaping=shaping), name if number == 1 else f"{name}-{number}", stage, **options)
    folder = args.output / name
    shaped = sum(steps for steps, _, shaping in STAGES[args.data] if shaping)
    facts = {"shaping": f"in the last {shaped:,} half of a batch from timesteps {SHAPING[0]} to {SHAPING[1]}"} if shaped else {}
    write_training(folder, unet, history, batch=BATCH, **facts)
    save_pipeline(DDPMPipeline(unet, scheduler), folder)


if __name__ == "__main__":
    main()
