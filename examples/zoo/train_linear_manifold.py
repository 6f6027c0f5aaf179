"""Train ``linear-manifold`` and ``linear-manifold-two-variances``: score networks on x_0 = F z, d = 100, m = 40.

python examples/zoo/train_linear_manifold.py         # about 10 minutes on two cores; run again to resume after a stop

Entries of column k of F are N(0, tau_k / m): tau = 1, or 1 for twenty columns and 0.1 for the other twenty. Every batch is fresh.
F is stored beside the pipeline in ``basis.safetensors``, and the network after fewer steps in ``training/step<N>``.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from diffusers import EDMEulerScheduler
from safetensors.torch import save_file
from shared import save_pipeline
from torch import Tensor, nn
from training import argument_parser, finish, fit, write_training

from diffusers_geometry import GeometryVectorPipeline, VectorNetwork

DIM, MANIFOLD_DIM, BATCH = 100, 40, 512
VARIANCES = {"linear-manifold": (1.0,) * 40, "linear-manifold-two-variances": (1.0,) * 20 + (0.1,) * 20}
KEPT_STEPS = (100, 300, 1000, 3000, 10000)
SIGMA_MIN, SIGMA_MAX = 0.03, 20.0


def make_basis(variances: tuple[float, ...]) -> Tensor:
    """F, shape (100, 40)."""
    columns = torch.tensor(variances).sqrt() / math.sqrt(MANIFOLD_DIM)
    return torch.randn(DIM, MANIFOLD_DIM, generator=torch.Generator().manual_seed(0)) * columns


def train(name: str, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    basis, network, folder = make_basis(VARIANCES[name]), VectorNetwork(DIM), args.output / name
    data = basis.square().sum(1).mean().sqrt().item()
    scheduler = EDMEulerScheduler(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=data, sigma_schedule="exponential")

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        x_0 = torch.randn(BATCH, MANIFOLD_DIM, generator=generator) @ basis.T
        sigma = SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** torch.rand(BATCH, 1, generator=generator)
        x_t = x_0 + sigma * torch.randn(x_0.shape, generator=generator)
        power = (sigma**2 + data**2).sqrt()
        target = (x_0 - (data / power) ** 2 * x_t) * power / (sigma * data)
        predicted = model((x_t / power).to(network.device), (sigma.log() / 4).to(network.device)).sample
        return (predicted - target.to(network.device)).square().mean()

    def keep(step: int, model: nn.Module) -> None:
        copy.deepcopy(model).half().save_pretrained(folder / "training" / f"step{step}")

    history = fit(network, loss_of, name, args, trained_on=[basis], learning_rate=2e-3, keep_at=KEPT_STEPS, keep=keep)
    write_training(folder, network, history, batch=BATCH)
    save_pipeline(GeometryVectorPipeline(network, scheduler), folder)
    save_file({"basis": basis}, folder / "basis.safetensors")


def main() -> None:
    args = finish(argument_parser(__doc__, steps=30_000))
    for name in VARIANCES:
        train(name, args)


if __name__ == "__main__":
    main()
