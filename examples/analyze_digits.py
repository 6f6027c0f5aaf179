"""The main job in Python: one generation of the bundled digits, its geometry as a table, a figure and a saved trace.

python examples/analyze_digits.py --figure docs/digits.png
"""

import argparse
import tempfile
from pathlib import Path

import torch

from diffusers_geometry import GeometryDDPMPipeline, GeometryTrace
from diffusers_geometry.bundled import DIGITS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=Path, default=Path(tempfile.gettempdir()) / "digits.png")
    parser.add_argument("--record-steps", type=int, default=24)
    args = parser.parse_args()
    pipe = GeometryDDPMPipeline.from_pretrained(DIGITS, use_safetensors=True)
    trace = pipe.analyze_geometry(
        num_inference_steps=100, generator=torch.Generator().manual_seed(4), record_steps=args.record_steps
    )
    print(trace.table())
    trace.plot(args.figure)
    with tempfile.TemporaryDirectory() as folder:
        trace.save_pretrained(folder)
        assert GeometryTrace.from_pretrained(folder).table() == trace.table()


if __name__ == "__main__":
    main()
