"""What products cost as d grows: a UNet2DModel of one width at d = 1,024, 3,072 and 16,384, and Golub-Kahan for k values there.

    python benchmarks/scaling.py               # about five minutes on two cores

Every size runs in a process of its own. Columns: one plain forward pass in a stack of 8; a reverse and a forward product in a
chunk of 4, in forwards; bytes in flight per product; then 32 k products of Golub-Kahan for k = 4 and 16, with the time per product
in forwards; and the peak memory of the process after 8 forward passes and at the end. A dense Jacobian takes d reverse products.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch
from diffusers import UNet2DModel

from diffusers_geometry import Denoiser, golub_kahan_spectrum
from diffusers_geometry.budget import PRODUCTS_PER_VALUE, plan_probe
from diffusers_geometry.costs import measure_costs

SHAPES = ((1, 32, 32), (3, 32, 32), (4, 64, 64))


def peak_mebibytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def one(shape):
    torch.manual_seed(0)
    channels, side, _ = shape
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3, "block_out_channels": (32, 64, 64)}
    network = UNet2DModel(side, channels, channels, layers_per_block=1, norm_num_groups=8, add_attention=False, **blocks)
    network.eval().requires_grad_(False)
    denoiser = Denoiser.from_function(lambda x: network(x, 400).sample, alpha_t=0.44, sigma_t=0.9)
    x_t, stack = torch.randn(shape), torch.randn(8, *shape)
    with torch.no_grad():
        network(stack, 400)
        forward = min(seconds(lambda: network(stack, 400)) for _ in range(3)) / 8
    before = peak_mebibytes()
    costs = measure_costs(plan_probe(x_t.numel(), method="golub_kahan"), denoiser, x_t)
    cells = [f"{x_t.numel():,}", f"{1e3 * forward:.1f}", f"{costs.reverse / forward:.1f}", f"{costs.forward / forward:.1f}"]
    cells.append(f"{costs.memory / 2**20:.1f}")
    for count in (4, 16):
        budget = PRODUCTS_PER_VALUE * count
        run = seconds(lambda: golub_kahan_spectrum(denoiser.jacobian(x_t), count, 1e-9, budget))
        cells.append(f"{run:.1f} ({run / budget / forward:.1f})")
    cells += [f"{before:.0f}", f"{peak_mebibytes():.0f}", f"{x_t.numel() * costs.reverse:.0f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3)
    shape = parser.parse_args().shape
    if shape:
        one(tuple(shape))
        return
    columns = ["d", "forward (ms)", "reverse", "forward product", "MiB a product", "k = 4: s (a product)", "k = 16: s (a product)"]
    columns += ["peak MiB of forwards", "of all", "dense would take (s)"]
    print(f"| {' | '.join(columns)} |")
    print("| --- " * 10 + "|", flush=True)
    for shape in SHAPES:
        subprocess.run([sys.executable, "-W", "ignore", __file__, "--shape", *map(str, shape)], check=True)


if __name__ == "__main__":
    main()
