"""Train the bundled model: a DDPM (Ho et al., 2020, arXiv:2006.11239) on scikit-learn's 8x8 handwritten digits.

python examples/train_digits.py                     # about 15 minutes on two cores; run again to resume after a stop
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from sklearn.datasets import load_digits
from tqdm import trange


def digits_split(num_held_out: int = 500, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """(train images, train labels, held-out images, held-out labels); images (n, 1, 8, 8) in [-1, 1]."""
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order].float().reshape(-1, 1, 8, 8) / 8 - 1, labels[order]
    return images[num_held_out:], labels[num_held_out:], images[:num_held_out], labels[:num_held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="diffusers_geometry/bundled/digits")
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "train_digits")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    images, accelerator = digits_split()[0], Accelerator(cpu=not torch.cuda.is_available())
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
        unet = UNet2DModel(
            8, 1, 1, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=16, **blocks
        )
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    unet, optimizer, decay = accelerator.prepare(unet, optimizer, decay)
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    accelerator.register_for_checkpointing(ema)
    done = args.checkpoint / "done"
    first = int(done.read_text()) if done.exists() else 0
    if first:
        accelerator.load_state(str(args.checkpoint / f"step{first}"))
    for step in (bar := trange(first, args.steps, initial=first, total=args.steps)):
        generator = torch.Generator().manual_seed((args.seed << 32) + step)  # the step fixes the batch: resuming changes nothing
        x_0 = images[torch.randint(len(images), (128,), generator=generator)].to(accelerator.device)
        epsilon = torch.randn(x_0.shape, generator=generator).to(x_0)
        t = torch.randint(1000, (128,), generator=generator).to(x_0.device)
        loss = (unet(scheduler.add_noise(x_0, epsilon, t), t).sample - epsilon).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step(), decay.step(), optimizer.zero_grad(), ema.step(unet.parameters())
        if (step + 1) % 1000 == 0 or step + 1 == args.steps:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            accelerator.save_state(str(args.checkpoint / f"step{step + 1}"))
            done.write_text(str(step + 1))
    ema.copy_to(unet.parameters())
    DDPMPipeline(unet.half(), scheduler).save_pretrained(args.output)


if __name__ == "__main__":
    main()
