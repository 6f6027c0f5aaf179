"""How a recorded generation ends: the remaining steps and the decoding, as functions of a sample.

Both run the pipeline's own ``__call__`` on a private copy, as :mod:`.drive` does. To *sample* on, a first step of the loop is spent
on putting our point in place; from there the private scheduler steps as it did, from its recorded state, until the loop ends. (What
a multistep solver remembers of earlier steps is held fixed.) To *decode*, the loop is one step long and returns our x_0, and the
``decode`` of the pipeline's autoencoder is watched; its result is taken before the pipeline clamps it to pixels, turns it into
NumPy or shows it to a safety checker. So unpacking, scaling and shifting are the pipeline's own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .continuation import Continuation
from .drive import Drive
from .pipeline_call import EndOfRun, StepOutput, generators_of, private_pipeline, run_privately
from .precision import HALF, ProbeWeights, to_float32
from .schedule import unvisited

SAMPLING_TOLERANCE = 1e-3  # relative, of a whole run in float32 that is sampled again from one of its points
HALF_SAMPLING_TOLERANCE = 0.2


@dataclass
class DecoderCall:
    """One call of an autoencoder's ``decode``: its method, the latent, the other arguments and what came out."""

    decode: Callable
    latent: Tensor
    args: tuple
    kwargs: dict[str, Any]
    output: Tensor


class Ending:
    """What the pipeline makes of a sample after step k.

    Args:
        drive: The engine of step k, for the recorded call and the scheduler's state.
        position: k.
        sample: x_t at step k, (b, *dims).
        final: Gives the run's final sample, once it is there.
        weights: Of the pipeline's networks, for probes.
    """

    def __init__(
        self, drive: Drive, position: int, sample: Tensor, final: Callable[[], Tensor | None], weights: ProbeWeights
    ) -> None:
        self.drive, self.position, self.sample, self._final, self._weights = drive, position, sample, final, weights
        self._decoder_calls: list[DecoderCall] | None = None
        self._samples_again = False

    def continuation(self, *, guided: bool = True, index: int | None = None) -> Continuation:
        """The maps from here on, of all samples or of one.

        Args:
            guided: Whether the denoiser is the guided one, which the sampler follows; of other branches nothing is sampled.
            index: The sample.
        """

        def rowwise(run: Callable[[Tensor], Tensor], others: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda points: self._each(run, others, to_float32(points), index)

        return Continuation(
            decode=rowwise(lambda x_0: self._decode(x_0)[1], self._final_sample),
            decoder_input=rowwise(lambda x_0: self._decode(x_0)[0], self._final_sample),
            decoder=rowwise(self._decode_latent, lambda: self._decode(self._final_sample())[0]),
            sample=rowwise(self._sample, lambda: self.sample) if guided else _refuse_branch,
            select_fn=lambda i: self.continuation(guided=guided, index=i),
        )

    def _final_sample(self) -> Tensor:
        final = self._final()
        if final is None:
            raise RuntimeError("the generation did not end, so nothing is known of its ending. Expected a finished run.")
        return to_float32(final[: len(self.sample)].detach())

    def _each(self, run: Callable[[Tensor], Tensor], others: Callable[[], Tensor], points: Tensor, index: int | None) -> Tensor:
        """``run`` on one whole batch after another; with ``index`` each point is that sample, beside the recorded others."""
        batch = len(self.sample)
        if index is None or batch == 1:
            if len(points) % batch:
                raise ValueError(f"{len(points)} points. Expected a multiple of {batch}, the batch of the recorded call.")
            batches = list(points.unflatten(0, (-1, batch)).unbind(0))
        else:
            base = others().to(points)
            batches = [torch.cat([base[:index], p[None], base[index + 1 :]]) for p in points]
        with self._weights.scope():
            results = [run(b) for b in batches]
        return torch.cat(results if index is None or batch == 1 else [r[index : index + 1] for r in results])

    def _decode(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """(latents that the decoder was given, what it made of them) for final samples (b, *dims)."""
        if not _decoders(self.drive.call.pipe):
            return x_0, x_0  # a pixel model: the sample is the image
        calls = self._run_decoder(x_0, len(self._learned_calls()))
        return _by_sample([c.latent for c in calls], len(x_0)), _by_sample([c.output for c in calls], len(x_0))

    def _decode_latent(self, latent: Tensor) -> Tensor:
        """What the decoder makes of latents as it receives them, (b, *latent) -> (b, *out)."""
        if not _decoders(self.drive.call.pipe):
            raise ValueError(f"{self._name} has no decoder: its samples are images. Expected of='denoised' here.")
        calls = self._learned_calls()
        rows = latent.flatten(0, 1) if latent.ndim > calls[0].latent.ndim else latent
        chunks = rows.split([len(c.latent) for c in calls])
        return _by_sample([_tensor(c.decode(z, *c.args, **c.kwargs)) for c, z in zip(calls, chunks, strict=True)], len(latent))

    def _learned_calls(self) -> list[DecoderCall]:
        """The decoder's calls for the run's own final sample, found by a run that goes on to its very end."""
        if self._decoder_calls is None:
            with torch.no_grad(), self._weights.scope():
                self._decoder_calls = self._run_decoder(self._final_sample(), None)
        if not self._decoder_calls:
            raise ValueError(f"{self._name} did not call a decoder. Expected one that decodes its final sample.")
        return self._decoder_calls

    def _run_decoder(self, x_0: Tensor, count: int | None) -> list[DecoderCall]:
        """Runs the pipeline from ``x_0`` up to the ``count``-th call of a decoder, or to its end."""
        call, calls, placed = self.drive.call, [], []

        def step(*args: Any, **kwargs: Any) -> StepOutput:
            placed.append(True)
            point = self._duplicated(x_0)
            return StepOutput((point, point))

        def watched(decode: Callable) -> Callable:
            @functools.wraps(decode)
            def watch(latent: Tensor, *args: Any, **kwargs: Any) -> Any:
                output = decode(latent, *args, **kwargs)
                if placed:
                    calls.append(DecoderCall(decode, latent, args, kwargs, _tensor(output)))
                    if len(calls) == count:
                        raise EndOfRun
                return output

            return watch

        decoders = {}
        for name, module in _decoders(call.pipe).items():
            decoders[name] = copy.copy(module)
            decoders[name].decode = watched(module.decode)
        pipe = private_pipeline(call, self._scheduler(step, self._timesteps(0, 0)), **decoders)
        changed = {"output_type": "pt"} if call.arguments.get("output_type") == "latent" else {}
        run_privately(call, pipe, **changed)
        if not placed:
            self._refuse_loop()
        return calls

    def _sample(self, x_t: Tensor) -> Tensor:
        """x_0 from samples x_t (b, *dims) at step k, by the remaining steps."""
        if not self._samples_again:
            self._check_sampling()
        return self._sample_from(x_t)

    def _sample_from(self, x_t: Tensor, *, check_noise: bool = False) -> Tensor:
        remaining, results = self._timesteps(self.position), []

        def step(*args: Any, **kwargs: Any) -> Any:
            if not results:
                self.drive.restore(scheduler)
                results.append(self._duplicated(x_t))
                return StepOutput((results[0], results[0]))
            before = _generator_states(kwargs) if check_noise else []
            output = original(*args, **kwargs)
            if check_noise and not all(map(torch.equal, before, _generator_states(kwargs))):
                self._refuse_sampling("draws noise")
            results.append(output[0] if isinstance(output, tuple) else output.prev_sample)
            if len(results) > len(remaining):
                raise EndOfRun
            return output

        scheduler = self._scheduler(step, remaining, pinned=lambda: not results)
        original = functools.partial(type(scheduler).step, scheduler)
        run_privately(self.drive.call, private_pipeline(self.drive.call, scheduler))
        if len(results) != len(remaining) + 1:
            self._refuse_loop()
        return results[-1][: len(x_t)]

    def _timesteps(self, start: int, stop: int | None = None) -> Tensor:
        """Timesteps of the run's steps between two loop positions, to its end if ``stop`` is None."""
        timesteps = torch.as_tensor(self.drive.state["timesteps"])
        return timesteps[start : len(timesteps) - unvisited(self.drive.scheduler) if stop is None else stop]

    def _after_the_last_step(self) -> Tensor:
        timesteps = torch.as_tensor(self.drive.state["timesteps"])
        return timesteps[len(self._timesteps(0)) :]

    def _scheduler(self, step: Callable, remaining: Tensor, pinned: Callable[[], bool] = lambda: True) -> Any:
        """A private scheduler in its state at step k, whose loop has one more step in front of the ``remaining`` ones."""
        # Pipelines that start late cut off as many timesteps as they did, and some the last one.
        here, after = self.drive.here(remaining), self._after_the_last_step()
        loop = torch.cat([here.repeat(self.position - self.drive.iteration + 1), remaining, after])
        return self.drive.private_scheduler(loop, step, pinned)

    def _check_sampling(self) -> None:
        """RuntimeError unless sampling on from the recorded point ends where the run did."""
        with torch.no_grad():
            again, final = self._sample_from(to_float32(self.sample), check_noise=True), self._final_sample()
        error = ((again - final).norm() / final.norm().clamp_min(torch.finfo(final.dtype).tiny)).item()
        if not error <= (HALF_SAMPLING_TOLERANCE if self.sample.dtype in HALF else SAMPLING_TOLERANCE):
            self._refuse_sampling(f"ends {error:.1e} away from where {self._name} ended")
        self._samples_again = True

    def _refuse_sampling(self, reason: str) -> NoReturn:
        raise RuntimeError(
            f"sampling on from step {self.position} with {type(self.drive.scheduler).__name__} {reason}. Expected a deterministic "
            "sampler (DDIM with eta=0, DPM-Solver++, Euler, Heun, flow matching) and no callback that moves the sample: "
            "of='sampled' is a map only there."
        )

    def _duplicated(self, point: Tensor) -> Tensor:
        return torch.cat([point, point]) if self.drive.duplicated else point

    @property
    def _name(self) -> str:
        return self.drive.call.pipeline_class.__name__

    def _refuse_loop(self) -> NoReturn:
        raise RuntimeError(
            f"{self._name} did not take the loop of its remaining steps over. Expected a loop over scheduler.timesteps that passes "
            "each step's result to the next; of='denoised' works without."
        )


def _generator_states(step_arguments: dict[str, Any]) -> list[Tensor]:
    """States of every generator that a scheduler step could draw from."""
    return [torch.get_rng_state(), *(g.get_state() for g in generators_of(step_arguments))]


def _refuse_branch(x_t: Tensor) -> NoReturn:
    raise ValueError("of='sampled' of a branch. Expected branch='guided': the sampler follows the guided output.")


def _decoders(pipe: Any) -> dict[str, nn.Module]:
    return {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module) and callable(getattr(m, "decode", None))}


def _tensor(output: Any) -> Tensor:
    """What a decoder made: ``.sample``, or the first item of a tuple."""
    output = getattr(output, "sample", output)
    return output[0] if isinstance(output, tuple) else output


def _by_sample(parts: list[Tensor], batch: int) -> Tensor:
    """The rows of all calls as (batch, *dims), or (batch, frames, *dims) where every sample has several."""
    rows = torch.cat(parts)
    if len(rows) % batch:
        raise ValueError(f"the decoder was given {len(rows)} latents for {batch} samples. Expected a multiple of the samples.")
    return rows if len(rows) == batch else rows.unflatten(0, (batch, -1))
