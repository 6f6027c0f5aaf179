"""Train the bundled model, a DDPM on scikit-learn's 8x8 digits: 15 minutes on two cores; run again to resume after a stop."""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from sklearn.datasets import load_digits
from tqdm import trange

BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}


def digits_split() -> tuple[torch.Tensor, ...]:
    """(1,297 train images, their labels, 500 held-out images, their labels); images (n, 1, 8, 8) in [-1, 1]."""
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float().reshape(-1, 1, 8, 8) / 8 - 1, labels[order]
    return images[500:], labels[500:], images[:500], labels[:500]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="diffusers_geometry/bundled/digits")
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "train_digits")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--save-every", type=int, default=1000)
    args = parser.parse_args()
    images, accelerator = digits_split()[0], Accelerator()
    torch.manual_seed(0)
    size = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 16}
    unet = UNet2DModel(8, 1, 1, **size, **BLOCKS)
    scheduler, optimizer = DDPMScheduler(beta_start=1e-4, beta_end=2e-2), torch.optim.AdamW(unet.parameters(), lr=1e-3)
    unet, optimizer, decay = accelerator.prepare(unet, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps))
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    accelerator.register_for_checkpointing(ema)
    done = args.checkpoint / "done"
    if first := int(done.read_text()) if done.exists() else 0:
        accelerator.load_state(str(args.checkpoint / f"step{first}"))
    for step in (bar := trange(first, args.steps, initial=first, total=args.steps)):
        generator = torch.Generator().manual_seed(step)  # the step fixes the batch: resuming changes nothing
        x_0 = images[torch.randint(len(images), (128,), generator=generator)].to(accelerator.device)
        epsilon = torch.randn(x_0.shape, generator=generator).to(x_0)
        t = torch.randint(1000, (128,), generator=generator).to(x_0.device)
        loss = (unet(scheduler.add_noise(x_0, epsilon, t), t).sample - epsilon).square().mean()
        accelerator.backward(loss), accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step(), decay.step(), optimizer.zero_grad(), ema.step(unet.parameters())
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            accelerator.save_state(str(args.checkpoint / f"step{step + 1}"))
            done.write_text(str(step + 1))
    ema.copy_to(unet.parameters())
    DDPMPipeline(unet.half(), scheduler).save_pretrained(args.output)


if __name__ == "__main__":
    main()
