"""The geometry of a network while it trains: descriptors at fixed noised points, checkpoint after checkpoint.

    geometry = GeometryTrainingCallback(scheduler, images[:8], generator=torch.Generator().manual_seed(0))
    for step, batch in enumerate(batches):
        ...                                         # any training loop
        if step % 500 == 0:
            geometry(step, unet)
    geometry.trace.plot("training.png")

Points are x_t = alpha_t x_0 + sigma_t epsilon of given clean samples, with noise that is drawn once. At each the Jacobian D' of the
posterior mean gives psi at a fixed rank, nu, tr D' and the asymmetry |D' - D'ᵀ| / |D' + D'ᵀ|. A posterior mean has a symmetric D'
(Cov(x_0 | y) / sigma²), so asymmetry is an error that needs no ground truth. It is not an error's only sign: a network that does
nothing yet has D' = a multiple of the identity, which is symmetric, so that asymmetry may rise before it falls.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .budget import NUM_SINGULAR_VALUES, SpectrumMethod, plan_probe
from .denoiser import Denoiser
from .descriptors import local_rank, local_scaling
from .drive import own_output
from .estimate import Estimate
from .precision import ProbeWeights, to_float32
from .probe import PointGeometry, Probe, probe_generator
from .schedule import NoiseLevel, loop_length, noise_level
from .training_trace import QUANTITIES, TrainingRecord, TrainingTrace

Predict = Callable[[nn.Module, Tensor, Tensor], Tensor]


class GeometryTrainingCallback:
    """Called as ``callback(step, network)`` in a training loop; the loop's numbers stay what they are without it.

    The network is evaluated in eval mode with its weights in float32, and handed back in the mode it came in. No global random
    state is touched. Give it the network that will be used (an exponential average, where there is one), unwrapped.

    Args:
        scheduler: Of the training, a diffusers scheduler whose noise levels are known; it is copied.
        samples: Clean samples x_0, (B, *dims), as the network is trained on them (latents for a latent model).
        sigmas: Noises sigma_t / alpha_t; the nearest of the scheduler's are taken.
        generator: Of the noise and of random probes.
        psi_rank: Singular values that psi sums; at most the numbers of a sample.
        conditioning: Keyword arguments of the network, tensors (B, ...) with a row a sample, such as ``encoder_hidden_states``.
        predict: (network, its input (K, *dims), timestep) -> prediction, where ``network(x, timestep, **conditioning)`` is not
            how it is called.
        spectrum: "dense", "golub_kahan", or "auto" by dimension; without a dense D' nu and asymmetry are not in hand.
        max_products: Budget per point.
        trace: An earlier trace of the same points, to be continued.
        num_inference_steps: Of the schedule in which the nearest noises are looked for.

    Raises:
        ValueError: an argument out of range, or ``trace`` is of other points.
    """

    def __init__(
        self,
        scheduler: Any,
        samples: Tensor,
        *,
        generator: torch.Generator,
        sigmas: Sequence[float] = (0.2, 0.5, 1.0, 2.0),
        psi_rank: int = NUM_SINGULAR_VALUES,
        conditioning: dict[str, Tensor] | None = None,
        predict: Predict | None = None,
        spectrum: SpectrumMethod = "auto",
        max_products: int | None = None,
        trace: TrainingTrace | None = None,
        num_inference_steps: int = 50,
    ) -> None:
        self.conditioning, self.predict = dict(conditioning or {}), predict
        short = sorted(name for name, value in self.conditioning.items() if len(value) != len(samples))
        if short or not len(samples) or (predict is not None and self.conditioning):
            raise ValueError(
                f"{len(samples)} samples, conditioning {short} of other lengths. Expected at least one sample, a row of "
                "conditioning for each, and no conditioning beside predict."
            )
        self.psi_rank, size = psi_rank, samples[0].numel()
        if not 1 <= psi_rank <= size:
            raise ValueError(f"psi_rank={psi_rank}. Expected 1 <= psi_rank <= {size}, the numbers of one sample.")
        self.levels = nearest_levels(scheduler, sigmas, num_inference_steps)
        self.probe = Probe(plan_probe(size, method=spectrum, num_singular_values=psi_rank, max_products=max_products))
        self._seed = int(torch.randint(2**62, (), generator=generator))
        x_0 = to_float32(samples.detach()).clone()
        noise = [torch.randn(x_0.shape, generator=generator).to(x_0) for _ in self.levels]
        self.points = [level.alpha_t * x_0 + level.sigma_t * e for level, e in zip(self.levels, noise, strict=True)]
        settings = {
            "scheduler": type(scheduler).__name__, "psi_rank": psi_rank, "samples": len(samples), "probe_seed": self._seed,
            "timesteps": [level.timestep for level in self.levels], "plan": self.probe.plan.as_dict(),
            "checksum": float(sum(p.double().abs().sum() for p in self.points)),
        }  # fmt: skip
        own = TrainingTrace(tuple(level.sigma for level in self.levels), settings)
        if trace is not None and (trace.sigmas != own.sigmas or not _alike(trace.settings, settings)):
            raise ValueError("trace is of other points or another plan. Expected the same samples, generator and arguments.")
        self.trace = own if trace is None else trace

    def __call__(self, step: int, network: nn.Module) -> TrainingRecord:
        """Measures ``network`` and appends the record to ``trace``.

        Args:
            step: Of the training; must be beyond the last one measured.
            network: What is trained.

        Raises:
            ValueError: a step that is not beyond the last one, or an output that does not fit the sample.
            FloatingPointError: the network returned NaN or infinity.
        """
        if self.trace.records and step <= self.trace.records[-1].step:
            raise ValueError(f"step={step}. Expected more than {self.trace.records[-1].step}, the last one measured.")
        with ExitStack() as undo:
            for part in network.modules():
                undo.callback(setattr, part, "training", part.training)
            network.eval()
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(ProbeWeights([network]).scope())
            found = [
                [self._point(network, i, j) for j in range(len(points))] for i, points in enumerate(self.points)
            ]  # levels, samples
        estimates = {name: [[e[name] for e, _ in row] for row in found] for name in QUANTITIES}
        record = TrainingRecord(
            int(step),
            {name: np.array([[e.value for e in row] for row in rows]) for name, rows in estimates.items()},
            {name: np.array([[_sem(e) for e in row] for row in rows]) for name, rows in estimates.items()},
            sum(products for row in found for _, products in row),
            all(e.converged for row in estimates["psi"] for e in row),
        )
        self.trace.records.append(record)
        return record

    def denoiser(self, network: nn.Module, level: int, sample: int) -> Denoiser:
        """The denoiser of one sample at one level."""
        noise = self.levels[level]
        rows = {name: value[sample : sample + 1] for name, value in self.conditioning.items()}

        def denoised(x_t: Tensor) -> Tensor:
            return noise.a * x_t + noise.b * self._prediction(network, x_t, noise, rows)

        levels = {"alpha_t": noise.alpha_t, "sigma_t": noise.sigma_t, "cancellation": noise.alpha_t * abs(noise.a)}
        return Denoiser(denoised, **levels)

    def _prediction(self, network: nn.Module, x_t: Tensor, level: NoiseLevel, rows: dict[str, Tensor]) -> Tensor:
        timestep = torch.full((len(x_t),), level.timestep, device=x_t.device)
        timestep = timestep.long() if level.timestep == int(level.timestep) else timestep
        if self.predict is not None:
            return own_output(self.predict(network, level.c_in * x_t, timestep), x_t)
        kept = {name: value.expand(len(x_t), *value.shape[1:]) for name, value in rows.items()}
        output = network(level.c_in * x_t, timestep, **kept)
        return own_output(output if isinstance(output, Tensor) else output[0], x_t)

    def _point(self, network: nn.Module, level: int, sample: int) -> tuple[dict[str, Estimate], int]:
        x_t, generator = self.points[level][sample], probe_generator(self._seed, level, sample)
        found: PointGeometry = self.probe(self.denoiser(network, level, sample), x_t, x_t, generator)
        asymmetry, absent = found.denoised.asymmetry, Estimate(math.nan, None)
        return {
            "psi": local_scaling(found.spectrum, rank=self.psi_rank),
            "nu": local_rank(found.spectrum) if found.spectrum.complete else absent,  # of values in hand it says nothing
            "effective_dimension": found.effective_dimension,
            "asymmetry": absent if asymmetry is None else Estimate(asymmetry),
        }, found.products


def nearest_levels(scheduler: Any, sigmas: Sequence[float], num_inference_steps: int = 50) -> list[NoiseLevel]:
    """The noise levels of a scheduler's own schedule that are nearest to some noises, in log sigma; the scheduler is left as it is.

    Raises:
        ValueError: no noise, one that is not positive, or two whose nearest levels are one.
    """
    if not len(sigmas) or not all(0 < sigma < math.inf for sigma in sigmas):
        raise ValueError(f"sigmas={tuple(sigmas)}. Expected positive, finite noises.")
    own = copy.deepcopy(scheduler)
    own.set_timesteps(num_inference_steps)
    levels = []
    for i in range(loop_length(own)):
        try:
            levels.append(noise_level(own, i))
        except ValueError:  # epsilon prediction at alpha = 0, where there is no denoiser
            if i:
                raise
    levels = [level for level in levels if 0 < level.sigma < math.inf]
    found = [min(levels, key=lambda level: abs(math.log(level.sigma / sigma))) for sigma in sigmas]
    if len({level.timestep for level in found}) < len(found):
        raise ValueError(
            f"sigmas={tuple(sigmas)} are {[round(level.sigma, 4) for level in found]} on a schedule of {num_inference_steps} "
            "steps. Expected noises that differ there, or more num_inference_steps."
        )
    return found


def _alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Equal settings, the checksum of the points to rounding."""
    checksums = first.get("checksum", math.nan), second["checksum"]
    rest = [{k: v for k, v in s.items() if k != "checksum"} for s in (first, second)]
    return rest[0] == rest[1] and math.isclose(*checksums, rel_tol=1e-6)


def _sem(estimate: Estimate) -> float:
    return math.nan if estimate.sem is None else estimate.sem
