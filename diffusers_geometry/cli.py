"""``hf-geometry``: the library from the command line. Heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .trajectory import GeometryTrace

app = typer.Typer(
    name="hf-geometry", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Reads the geometry of a diffusion model's score while a diffusers pipeline generates.",
)  # fmt: skip


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what can."""


@app.callback()
def _common() -> None:
    """Reads the geometry of a diffusion model's score while a diffusers pipeline generates."""


@app.command()
def analyze(
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of a diffusers pipeline; the bundled digits if left out.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text prompt, for pipelines that take one.")] = None,
    class_label: Annotated[
        list[int] | None, typer.Option(help="Class label (repeatable), for class-conditional pipelines.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    record_steps: Annotated[str, typer.Option(help="How many steps to analyse, 'all', or positions such as 0,10,49.")] = "10",
    seed: Annotated[int, typer.Option(help="Seed of the generation.")] = 0,
    call: Annotated[list[str] | None, typer.Option(help="Any other argument of the pipeline, key=value (repeatable).")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the trace and the figure.")] = Path("geometry"),
    spectrum: Annotated[
        str, typer.Option(help="auto, dense, perturbation (Algorithm 1) or central_difference (Algorithm 2).")
    ] = "auto",
    of: Annotated[str, typer.Option(help="Which map: denoised, score or epsilon.")] = "denoised",
    max_products: Annotated[int | None, typer.Option(help="Budget of Jacobian products per step and sample.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Weights: float32, bfloat16 or float16 (probes run in float32 all the same).")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Generate once and print what the score's Jacobian does at the recorded steps."""
    _check_writable(output)
    pipe = load_pipeline(model, dtype, device)
    arguments = _call_arguments(pipe, prompt, class_label, steps, seed, call or [])
    trace = pipe.analyze_geometry(
        **arguments, record_steps=_record_steps(record_steps), spectrum=spectrum, of=of, max_products=max_products
    )  # fmt: skip
    trace.save_pretrained(output)
    trace.plot(output / "geometry.png")
    if as_json:
        print(json.dumps(_document(trace, output), indent=1, allow_nan=False))
    else:
        _print_trace(trace, output)


def load_pipeline(model: str | None, dtype: str = "float32", device: str = "cpu") -> Any:
    """A geometry pipeline from a folder, a Hub id, or the bundled digits; safetensors only.

    Raises:
        UsageError: nothing can be loaded there, unknown dtype or device.
    """
    from .bundled import DIGITS

    name = str(DIGITS) if model is None else model
    if Path(name).exists() and not (Path(name) / "model_index.json").is_file():
        raise UsageError(f"{name} holds no pipeline. Expected a folder with a model_index.json, as save_pretrained writes it.")
    import diffusers
    import torch

    from .mixin import with_geometry

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise UsageError(f"dtype {dtype!r} is not known. Expected one of {', '.join(dtypes)}.")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(name, dtype=dtypes[dtype], use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        if Path(name).exists():
            raise UsageError(f"cannot load the pipeline in {name}: {_one_line(error)}") from error
        raise UsageError(
            f"no model {name!r}: it is not a folder, and the Hub did not give it ({_one_line(error).split(': ')[-1][:160]}). "
            "Expected an existing folder or a Hub id such as org/name."
        ) from error
    return with_geometry(pipe.to(torch.device(device)))


def _call_arguments(
    pipe: Any, prompt: str | None, labels: list[int] | None, steps: int, seed: int, call: list[str]
) -> dict[str, Any]:
    """Keyword arguments for the pipeline's call, checked against its signature."""
    import torch

    if steps < 1:
        raise UsageError(f"--steps {steps} is not possible. Expected at least 1.")
    parameters = inspect.signature(type(pipe).__call__).parameters
    arguments: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": steps}
    if prompt is not None:
        arguments["prompt"] = prompt
    if labels:
        arguments["class_labels"] = labels
    for item in call:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--call {item!r} has no value. Expected key=value.")
        arguments[key] = _literal(value)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in arguments:
        if name not in parameters and not open_ended:
            accepted = ", ".join(list(parameters)[1:])
            raise UsageError(f"{type(pipe).__name__} takes no argument {name!r}. Expected one of: {accepted}.")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in ("self", *arguments) and p.kind not in (2, 4)]
    if missing:
        raise UsageError(f"{type(pipe).__name__} needs {', '.join(missing)}. Expected --prompt, --class-label or --call key=value.")
    return arguments


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _record_steps(text: str) -> int | list[int] | str:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        if text == "all":
            return text
        raise UsageError(
            f"--record-steps {text!r} is not a choice of steps. Expected a number, 'all', or positions 0,10,49."
        ) from None
    return numbers[0] if "," not in text else numbers


def _check_writable(folder: Path) -> None:
    """Refuses an output folder that cannot be written, before anything is computed; creates nothing."""
    existing = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UsageError(f"cannot write to --output {folder}: {_one_line(error)}. Expected a folder that can be written.") from None


def _document(trace: GeometryTrace, output: Path) -> dict[str, Any]:
    return {
        "steps": trace.rows(),
        "manifold_dim": trace.manifold_dims,
        "trivial_boundary_sigma": [_pair(pair) for pair in trace.phases.trivial_boundary],
        "consolidation_boundary_sigma": [_pair(pair) for pair in trace.phases.consolidation_boundary],
        "settings": trace.settings,
        "output": str(output),
    }


def _pair(bracket: tuple[float, float] | None) -> list[float | None] | None:
    return None if bracket is None else [None if value == float("inf") else value for value in bracket]


def _print_trace(trace: GeometryTrace, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = trace.settings
    table = Table(title=f"{settings['pipeline']}, {settings['scheduler']}, map {settings['of']}: geometry of one generation")
    batch = len(trace.manifold_dims)
    columns = [
        "step",
        *(["sample"] if batch > 1 else []),
        "sigma",
        "phase",
        "psi (nats)",
        "of",
        "nu",
        "tr D'",
        "gap",
        "asymmetry",
        "engine",
        "products",
    ]
    for column in columns:
        table.add_column(column, justify="left" if column in ("phase", "engine") else "right")
    for row in trace.rows():
        cells = [str(row["step"]), *([str(row["sample"])] if batch > 1 else []), _number(row["sigma"], ".3g", "inf"), row["phase"]]
        cells += [_with_sem(row, "psi"), str(row["psi_rank"]), _with_sem(row, "nu"), _with_sem(row, "effective_dimension")]
        cells += [_number(row["gap_dim"], ".0f"), _number(row["asymmetry"], ".3f"), row["engine"], str(row["products"])]
        table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for sample in range(batch):
        console.print(_summary(trace, sample, batch), highlight=False)
    console.print(f"Trace and figure in {output}{os.sep}", highlight=False, soft_wrap=True)


def _summary(trace: GeometryTrace, sample: int, batch: int) -> str:
    name = f"Sample {sample}: m" if batch > 1 else "M"
    dim, size = trace.manifold_dims[sample], trace.steps[0].denoised_singular_values.shape[1]
    dimension = (
        f"anifold dimension {dim} of {size}"
        if dim is not None
        else f"anifold dimension (of {size}) not read: no consolidation phase"
    )
    boundaries = [("trivial phase ends", trace.phases.trivial_boundary[sample])]
    boundaries.append(("consolidation starts", trace.phases.consolidation_boundary[sample]))
    said = [f"{what} between sigma {pair[0]:.3g} and {pair[1]:.3g}" for what, pair in boundaries if pair is not None]
    return f"{name}{dimension}{'; ' if said else ''}{'; '.join(said)}."


def _with_sem(row: dict[str, Any], name: str) -> str:
    value = _number(row[name], ".2f")
    return value if not row[f"{name}_sem"] else f"{value} ± {row[f'{name}_sem']:.2f}"


def _number(value: float | None, layout: str, missing: str = "-") -> str:
    return missing if value is None else format(value, layout)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; errors are one line on stderr and exit status 2 (a traceback with HF_GEOMETRY_TRACEBACK=1)."""
    try:
        app(args=arguments, prog_name="hf-geometry")
    except (UsageError, ValueError, TypeError, RuntimeError, FloatingPointError, OSError) as error:
        if os.environ.get("HF_GEOMETRY_TRACEBACK"):
            raise
        print(f"hf-geometry: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
