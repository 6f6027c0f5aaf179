"""The 16 largest singular values of D' against the dense Jacobian, side by side in one run; d = 1024.

    python benchmarks/top_values.py                 # about ten minutes on two cores

The network is the UNet2DModel with attention of dense_jacobian.py, 1.1 M parameters, once with its random initial weights, whose
spectrum is flat (the hard case), and once after a short training on random strokes, whose spectrum falls as trained ones do.
Products to a true relative error of 1e-3 are counted on the dense matrix; times are those of the network, where each block size
runs until its own bounds say that all 16 values have converged. Rounds alternate with the dense Jacobian in its best chunk.
"""

import argparse
import math
import statistics
import time

import torch
from dense_jacobian import BLOCKS, NETWORKS
from diffusers import DDPMScheduler, UNet2DModel

from diffusers_geometry import Denoiser, Jacobian, golub_kahan_spectrum

COUNT, TOLERANCE = 16, 1e-3
TIMESTEPS = (100, 400, 700)


def make_network():
    torch.manual_seed(0)
    config = NETWORKS["UNet2DModel (32, 64, 64), attention at 16x16"]
    return UNet2DModel(32, 1, 1, block_out_channels=BLOCKS, layers_per_block=1, norm_num_groups=8, **config)


def strokes(count, generator):
    """Images (count, 1, 32, 32) in [-1, 1] of one soft straight stroke each."""
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 32)] * 2, indexing="ij"), dim=-1)
    angle, shift = (torch.rand(count, 1, 1, generator=generator) * s for s in (math.pi, 1.0))
    across = grid[..., 0] * torch.cos(angle) + grid[..., 1] * torch.sin(angle) - shift + 0.5
    return (2 * torch.exp(-((across / 0.15) ** 2)) - 1)[:, None]


def train(network, steps):
    """A few hundred steps of noise prediction."""
    generator, scheduler = torch.Generator().manual_seed(1), DDPMScheduler()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(steps):
        clean = strokes(16, generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(1000, (16,), generator=generator)
        loss = (network(scheduler.add_noise(clean, noise, timesteps), timesteps).sample - noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"trained on strokes for {steps} steps, last loss {loss.item():.3f}")
    return network


def denoiser_at(network, timestep):
    """The denoiser at a timestep of DDPM, and a noised stroke there."""
    alpha_bar = DDPMScheduler().alphas_cumprod[timestep].item()
    alpha_t, sigma_t = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    generator = torch.Generator().manual_seed(timestep)
    x_t = alpha_t * strokes(1, generator)[0] + sigma_t * torch.randn(1, 32, 32, generator=generator)
    return Denoiser.from_function(lambda x: network(x, timestep).sample, alpha_t=alpha_t, sigma_t=sigma_t), x_t


def products_to_true_error(matrix, truth, block_size):
    """The smallest budget, in steps of one block, after which all values are within the tolerance."""
    jacobian = Jacobian(lambda x: matrix @ x, torch.zeros(len(matrix)))
    for budget in range(2 * max(COUNT, block_size), 1200, 2 * block_size):
        found = golub_kahan_spectrum(jacobian, COUNT, TOLERANCE / 100, budget, block_size=block_size)
        if ((found.singular_values - truth).abs() <= TOLERANCE * truth).all():
            return found.products
    return None


def timed(run):
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def compare(name, network, timestep, blocks, rounds):
    denoiser, x_t = denoiser_at(network, timestep)
    denoiser.jacobian(x_t).jvp(x_t)  # set-up
    matrix = denoiser.jacobian(x_t, chunk_size=64).dense()
    truth = torch.linalg.svdvals(matrix.double())[:COUNT]
    for block_size in blocks:
        pairs = []
        for _ in range(rounds):
            plain, _ = timed(lambda: denoiser.jacobian(x_t, chunk_size=64).dense())
            run, found = timed(lambda: golub_kahan_spectrum(denoiser.jacobian(x_t), COUNT, TOLERANCE, block_size=block_size))
            pairs.append((plain, run))
        error = ((found.singular_values - truth).abs() / truth).max().item()
        seconds, run = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(r / p for p, r in pairs)
        needed = products_to_true_error(matrix, truth, block_size)
        print(
            f"| {name} | {denoiser.sigma:.2f} | {truth[0]:.2f} .. {truth[-1]:.2f} | {block_size} | {needed} | {found.products} | "
            f"{error:.0e} | {seconds:.1f} | {run:.1f} | {ratio:.2f} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--training-steps", type=int, default=300)
    args = parser.parse_args()
    networks = {"random": make_network(), "trained": train(make_network(), args.training_steps)}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, d = 1024, {COUNT} values")
    columns = ("weights", "sigma", "values", "block", "products to true error 1e-3", "to converged", "its true error")
    print(f"| {' | '.join((*columns, 'dense (s)', 'Golub-Kahan (s)', 'ratio'))} |")
    print("| --- " * 10 + "|")
    for name, network in networks.items():
        network.eval().requires_grad_(False)
        for timestep in TIMESTEPS:
            compare(name, network, timestep, args.blocks, args.rounds)


if __name__ == "__main__":
    main()
