"""The geometry that a network trained on a linear manifold has, beside the exact one of its own F."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_geometry.exact import LinearManifoldDenoiser

SAMPLES = 4
INTERMEDIATE_WINDOW, FINAL_WINDOW = (0.6, 1.0), (0.0, 0.1)  # of sigma²: where the gap after 20, and the one after 40, is largest


def manifold_figures(pipe: Any, basis: Tensor, num_sigmas: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Agreement of the trained spectra with the exact ones, and the curves to draw.

    Args:
        pipe: The trained pipeline.
        basis: F, shape (d, m).
        num_sigmas: Noise levels, all the steps of one generation.

    Returns:
        Figures, and arrays: ``sigma`` (steps,), ``trained`` and ``exact`` singular values of D', (steps, d).

    Raises:
        ValueError: too few noise levels for one of the windows.
    """
    pipe.set_progress_bar_config(disable=True)
    trace = pipe.analyze_geometry(
        SAMPLES,
        torch.Generator().manual_seed(0),
        num_inference_steps=num_sigmas,
        record_steps="all",
        spectrum="dense",
        progress=False,
    )
    sigma = np.array([step.sigma for step in trace.steps])
    trained = np.stack([step.denoised_singular_values for step in trace.steps])  # (steps, samples, d)
    variances = LinearManifoldDenoiser(basis).variances.numpy()
    exact = np.zeros((len(sigma), trained.shape[2]))
    exact[:, : len(variances)] = variances / (variances + sigma[:, None] ** 2)
    gaps = (trained[..., :-1] - trained[..., 1:]).argmax(-1) + 1
    exact_gaps = (exact[:, :-1] - exact[:, 1:]).argmax(-1) + 1
    asymmetry = np.stack([step.asymmetry for step in trace.steps])
    figures = {"samples": SAMPLES, "noise_levels": num_sigmas}
    for name, (low, high) in (("sigma2_0.6_to_1", INTERMEDIATE_WINDOW), ("sigma2_below_0.1", FINAL_WINDOW)):
        inside = (sigma**2 >= low) & (sigma**2 <= high)
        if not inside.any():
            raise ValueError(f"num_sigmas={num_sigmas} puts none in {low} <= sigma² <= {high}. Expected at least 30.")
        error = np.abs(trained[inside] - exact[inside, None])
        figures[name] = {
            "noise_levels": int(inside.sum()),
            "largest_gap_trained": sorted(set(gaps[inside].ravel().tolist())),
            "largest_gap_exact": sorted(set(exact_gaps[inside].tolist())),
            "mean_error_of_singular_values": float(error.mean()),
            "largest_error_of_singular_values": float(error.max()),
            "mean_asymmetry": float(asymmetry[inside].mean()),
        }
    return figures, {"sigma": sigma, "trained": trained.mean(1), "exact": exact}
