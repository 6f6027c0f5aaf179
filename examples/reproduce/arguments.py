"""The command line that every reproduction has."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def took(seconds: float | None = None) -> str:
    """A sentence on the processor time, summed over cores, that ``seconds`` is, or that the process has taken."""
    return f"This took {time.process_time() if seconds is None else seconds:.0f} seconds of processor time."


def parse(document: str) -> tuple[Path, bool]:
    """(folder for figures and tables, whether it is a smoke run: little of everything, in a temporary folder by default)."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="little of everything, in a temporary folder")
    args = parser.parse_args()
    output = Path(tempfile.mkdtemp()) if args.smoke and args.output == RESULTS else args.output
    output.mkdir(parents=True, exist_ok=True)
    return output, args.smoke
