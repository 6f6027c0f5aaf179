"""FLIPD's error against its products: data of covariance spectrum k^-p in d = 256 at sigma = 0.1, 200 seeds a cell.

    python benchmarks/trace.py                 # about a minute on two cores

Only the trace is random in FLIPD, so its error is the trace's. The last two columns take Gaussian probes on the epsilon Jacobian,
as the published implementations do: their error with 2,000 products, and the products they need for the error of "auto" (errors
fall with the square root). The last lines are where XTRACE_CORRECTION comes from: XTrace's true error over its raw one.
"""

import math
import statistics

import torch

from diffusers_geometry import Jacobian, estimate_trace
from diffusers_geometry.dimension import flipd
from diffusers_geometry.exact import GaussianDenoiser
from diffusers_geometry.stochastic import XTRACE_CORRECTION

SIZE, SIGMA, SEEDS, GAUSSIAN = 256, 0.1, 200, 2000


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def root_mean_square(values):
    return math.sqrt(statistics.fmean(v**2 for v in values))


def problem(power):
    """A denoiser in a random basis, a clean point, and D' there."""
    variances = torch.arange(1, SIZE + 1, dtype=torch.float64) ** -power
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=seeded(1), dtype=torch.float64))[0]
    clean = basis @ (variances.sqrt() * torch.randn(SIZE, generator=seeded(2)).double())
    denoiser = GaussianDenoiser((basis * variances) @ basis.T).at(1.0, SIGMA)
    return denoiser, clean, denoiser.jacobian(clean).dense()


def estimates(matrix, budget, method):
    jacobian = Jacobian(lambda x: matrix @ x, torch.zeros(SIZE, dtype=matrix.dtype))
    return [estimate_trace(jacobian, num_products=budget, method=method, generator=seeded(s)) for s in range(SEEDS)]


def gaussian_error(matrix):
    """Error of tr D' = d - tr(I - D') with Gaussian probes on I - D' = sigma J_epsilon."""
    noise = torch.eye(SIZE, dtype=matrix.dtype) - matrix
    errors = []
    for seed in range(50):
        probes = torch.randn(GAUSSIAN, SIZE, generator=seeded(seed), dtype=matrix.dtype)
        errors.append((probes * (probes @ noise.T)).sum(dim=1).mean().item() - noise.trace().item())
    return root_mean_square(errors)


def main():
    print(f"d = {SIZE}, sigma = {SIGMA}, {SEEDS} seeds")
    columns = ("p", "FLIPD", "products", "Rademacher", "XTrace", "auto", f"Gaussian, {GAUSSIAN}", "Gaussian for the error of auto")
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    corrections = []
    for power in (1, 2, 3):
        denoiser, clean, matrix = problem(power)
        truth, trace, gaussian = flipd(denoiser, clean).value, matrix.trace().item(), gaussian_error(matrix)
        for budget in (30, 60, 120):
            errors = {}
            for method in ("rademacher", "xtrace", "auto"):
                found = estimates(matrix, budget, method)
                errors[method] = root_mean_square([e.value - trace for e in found])
                if method == "xtrace":
                    raw = root_mean_square([e.sem for e in found]) / XTRACE_CORRECTION
                    corrections.append((power, budget, errors[method] / raw))
            needed = GAUSSIAN * (gaussian / errors["auto"]) ** 2
            shown = " | ".join(f"{errors[m]:.2g}" for m in ("rademacher", "xtrace", "auto"))
            print(f"| {power} | {truth:.2f} | {budget} | {shown} | {gaussian:.2g} | {needed:,.0f} ({needed / budget:,.0f} x) |")
    print("\nXTrace, true error over the raw leave-one-out error:")
    print("; ".join(f"p = {power}, {budget} products: {ratio:.2f}" for power, budget, ratio in corrections))


if __name__ == "__main__":
    main()
