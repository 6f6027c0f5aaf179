"""What a dense Jacobian costs, in plain forward passes of the same network, side by side in one run; d = 1024.

    python benchmarks/dense_jacobian.py                 # about three minutes on two cores

Both sides are given their best batch: the forward pass its fastest stack, the Jacobian its fastest chunk, each found by timing.
Rounds alternate between the two, and the ratio is taken round by round, so that a drifting machine cancels.
"""

import argparse
import statistics
import time

import torch
from diffusers import UNet2DModel

from diffusers_geometry import Jacobian

BLOCKS = (32, 64, 64)
NETWORKS = {
    "UNet2DModel (32, 64, 64), no attention": dict(
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, add_attention=False
    ),
    "UNet2DModel (32, 64, 64), attention at 16x16": dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        add_attention=False, attention_head_dim=16,
    ),
}  # fmt: skip


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def forwards(network, batch, count=1024):
    x = torch.randn(batch, 1, 32, 32)
    with torch.no_grad():
        for _ in range(count // batch):
            network(x, 300)


def dense(network, chunk):
    Jacobian(lambda x: network(x[None], 300).sample[0], torch.randn(1, 32, 32), chunk_size=chunk).dense()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| network | parameters | forward batch | chunk | 1024 forwards (s) | dense (s) | ratio (min, median, max) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, config in NETWORKS.items():
        network = UNet2DModel(32, 1, 1, block_out_channels=BLOCKS, layers_per_block=1, norm_num_groups=8, **config)
        network = network.eval().requires_grad_(False)
        forwards(network, 64, 128)
        batch = min((16, 32, 64, 128), key=lambda b: seconds(lambda: forwards(network, b)))
        chunk = min((16, 32, 64, 128), key=lambda c: seconds(lambda: dense(network, c)))
        pairs = [(seconds(lambda: forwards(network, batch)), seconds(lambda: dense(network, chunk))) for _ in range(args.rounds)]
        plain, jacobian = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(j / f for f, j in pairs)
        spread = f"{ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f}"
        count = sum(p.numel() for p in network.parameters())
        print(f"| {name} | {count:,} | {batch} | {chunk} | {plain:.1f} | {jacobian:.1f} | {spread} |")


if __name__ == "__main__":
    main()
