"""``docs/compatibility.md``: what was measured of every pipeline of the catalogue, one row a use."""

from pathlib import Path

import diffusers

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
COLUMNS = ("pipeline", "scheduler", "engine", "certified error", "reverse", "forward", "decoded", "sampled", "why")
MEASURED = ("certified error", "reverse", "forward")  # differ from machine to machine; the others are held by the tests
HEAD = f"""# Compatibility

Measured on tiny pipelines with random weights, one row a use and scheduler, by `WRITE_COMPATIBILITY=1 pytest tests/conformance`
with diffusers {diffusers.__version__}. A class that is not listed is recorded by the same code, or refused with the reason.

* **engine**: *replay* calls the denoiser again with stacked samples; *drive* runs the pipeline's own loop, where replay is refused.
* **certified error**: relative disagreement of the engine with the pipeline's own loop.
* **reverse, forward**: one Jacobian product, in evaluations of the denoiser by that engine, at chunks of 8.
* **decoded, sampled**: the maps to the decoder's output, and through the remaining steps of the sampler.
* **why**: what refuses replay, a map, or the whole run, in the library's own words.

Modular pipelines are recorded through the same step wrapper, and driven with gradients by copies of their blocks:
`StableDiffusion3ModularPipeline` replays with a certified error below 2e-5, takes `of="decoded"` and passes the self-check
(`tests/conformance/test_modular.py`). Half precision is held against its own record, see `tests/conformance/test_host.py`.
"""


def line(row):
    return "| " + " | ".join(str(row[name]).replace("|", "/") for name in COLUMNS) + " |"


def write(rows):
    table = [line(dict.fromkeys(COLUMNS) | {name: name for name in COLUMNS}), "|" + "---|" * len(COLUMNS), *map(line, rows)]
    PAGE.write_text(HEAD + "\n" + "\n".join(table) + "\n")


def read():
    """The rows of the page, by (pipeline, scheduler)."""
    cells = [
        [c.strip() for c in text.strip("| \n").split(" | ")] for text in PAGE.read_text().splitlines() if text.startswith("| ")
    ]
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in cells[1:]]
    return {(row["pipeline"], row["scheduler"]): row for row in rows}
