"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str | None, typer.Argument(help="Folder or Hub id of a diffusers pipeline; the bundled digits if left out.")]
Prompt = Annotated[str | None, typer.Option(help="Text prompt, for pipelines that take one.")]
ClassLabel = Annotated[list[int] | None, typer.Option(help="Class label (repeatable), for class-conditional pipelines.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Seed = Annotated[int, typer.Option(help="Seed of the generation.")]
Call = Annotated[list[str] | None, typer.Option(help="Any other argument of the pipeline, key=value (repeatable).")]
Dtype = Annotated[str, typer.Option(help="Weights: float32, bfloat16 or float16 (probes run in float32 all the same).")]
Device = Annotated[str, typer.Option(help="Torch device.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
