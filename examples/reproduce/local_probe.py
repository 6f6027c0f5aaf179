"""psi, nu, delta and the change of the Jacobian at images, under a model of pixels, measured once and kept.

An image x is looked at as alpha x + sigma eps at training timestep 40 (noise 0.144). Draws eps, directions and probes are the same
for every image: what differs between images is not the draw. psi sums the largest quarter of the singular values of D', nu takes
all; delta counts knots of SiLU units, for which it is a labelled proxy, and the companion of smooth networks is the relative
change of D'.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from resampling import spearman
from runs import load_zoo
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_geometry import Denoiser, dense_spectrum
from diffusers_geometry.complexity import local_complexity
from diffusers_geometry.descriptors import local_rank, local_scaling
from diffusers_geometry.loading import load_pipeline
from diffusers_geometry.variation import jacobian_variation

REFERENCE_T, RADIUS, DIRECTIONS, PRODUCTS = 40, 0.05, 8, 8
DESCRIPTORS = ("psi", "nu", "delta", "variation")
CHUNK = 20  # images in a file


@dataclass(frozen=True)
class Probe:
    """A model of pixels at the reference noise, with a folder for what was measured, or None.

    Attributes:
        name: "digits", the bundled model, or one of the zoo.
        noises: Draws eps for every image.
        products: Of the change of D'; 0 leaves it out.
    """

    name: str
    noises: int
    folder: Path | None
    products: int = PRODUCTS

    def pipeline(self) -> Any:
        pipe = load_pipeline(None) if self.name == "digits" else load_zoo(self.name)
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.requires_grad_(False)
        return pipe

    def denoiser(self) -> Denoiser:
        pipe = self.pipeline()
        kept = pipe.scheduler.alphas_cumprod[REFERENCE_T].double()
        levels = {"alpha_t": float(kept.sqrt()), "sigma_t": float((1 - kept).sqrt())}
        return Denoiser.from_function(lambda x: pipe.unet(x, REFERENCE_T).sample, **levels)

    def points(self, denoiser: Denoiser, image: Tensor) -> Tensor:
        """alpha x + sigma eps under every draw, (noises, *dims)."""
        noise = torch.randn(self.noises, *image.shape, generator=torch.Generator().manual_seed(77))
        return denoiser.alpha_t * image + denoiser.sigma_t * noise

    def measure(self, images: Tensor) -> dict[str, np.ndarray]:
        """Every descriptor under every draw, (n, noises); singular values (n, noises, d); denoising errors; seconds, (n,)."""
        denoiser = self.denoiser()
        return self.kept("descriptors", images, lambda image: self._measured(denoiser, image))

    def _measured(self, denoiser: Denoiser, image: Tensor) -> dict[str, Tensor]:
        canonical, rank, rows = denoiser.canonical_map("denoised"), max(1, image.numel() // 4), []
        for draw, x_t in enumerate(self.points(denoiser, image)):
            spectrum = dense_spectrum(denoiser.jacobian(x_t, chunk_size=64))
            common = [torch.Generator().manual_seed(draw) for _ in range(2)]
            delta = local_complexity(canonical, x_t[None], RADIUS, num_directions=DIRECTIONS, num_draws=1, generator=common[0])
            row = {"psi": local_scaling(spectrum, rank=rank).value, "nu": local_rank(spectrum).value, "delta": delta.fraction}
            if self.products:
                options = {"num_products": self.products, "generator": common[1]}
                row["variation"] = jacobian_variation(canonical, x_t, RADIUS, **options).value
            with torch.no_grad():
                row["error"] = (denoiser.denoised(x_t[None])[0] - image).square().mean().sqrt()
            rows.append(row | {"values": spectrum.singular_values})
        return {n: torch.stack([torch.as_tensor(row[n], dtype=torch.float64).squeeze() for row in rows]) for n in rows[0]}

    def kept(self, what: str, images: Tensor, make: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, np.ndarray]:
        """``make`` of every image, stacked, from the folder where it is there; with the seconds of processor time it took."""
        parts = [self._part(what, chunk, make) for chunk in images.split(CHUNK)]
        return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}

    def _part(self, what: str, images: Tensor, make: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        settings = (what, self.name, self.noises, REFERENCE_T, RADIUS, DIRECTIONS, self.products)
        digest = hashlib.sha256(repr(settings).encode() + images.contiguous().numpy().tobytes()).hexdigest()[:16]
        path = self.folder / f"{what}-{digest}.safetensors" if self.folder else None
        if path and path.exists():
            return load_file(path)
        rows = []
        for image in images:
            start = time.process_time()
            row = make(image)
            rows.append(row | {"seconds": torch.tensor(time.process_time() - start, dtype=torch.float64)})
        part = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(part, path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
        return part


def reliability(values: np.ndarray) -> float:
    """Mean rank correlation of the images between two draws of the noise, (n, noises) -> number."""
    pairs = [(i, j) for i in range(values.shape[1]) for j in range(i)]
    return float(np.mean([spearman(values[:, i], values[:, j]) for i, j in pairs]))


def psi_at(values: np.ndarray, rank: int) -> np.ndarray:
    """psi over another number of singular values (n, noises, d), mean over the draws, (n,)."""
    return np.log(values[..., :rank]).sum(-1).mean(-1)
