"""What recording adds to a plain call of a pipeline, without any analysis; the bundled digits, side by side in one run.

    python benchmarks/recording.py                      # about a minute

Rounds alternate between the two; ratios are taken round by round.
"""

import argparse
import statistics
import time

import torch
from diffusers import DDPMPipeline

from diffusers_geometry import record
from diffusers_geometry.bundled import DIGITS


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    pipe = DDPMPipeline.from_pretrained(DIGITS, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)

    def plain():
        pipe(num_inference_steps=args.steps, generator=torch.Generator().manual_seed(0))

    def recorded():
        with record(pipe, 10):
            plain()

    plain(), recorded()
    pairs = [(seconds(plain), seconds(recorded)) for _ in range(args.rounds)]
    ratios = sorted(r / p for p, r in pairs)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.steps} steps, 10 of them recorded")
    print(f"plain {statistics.median(p for p, _ in pairs):.3f} s, recorded {statistics.median(r for _, r in pairs):.3f} s")
    print(f"ratio min {ratios[0]:.3f}, median {statistics.median(ratios):.3f}, max {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
