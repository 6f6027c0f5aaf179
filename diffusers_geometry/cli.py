"""``hf-geometry``: the library from the command line. Heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_audit import register as register_audit
from .cli_options import AsJson, Call, ClassLabel, Device, Dtype, Model, Prompt, Seed, Steps
from .cli_reward import register
from .loading import UsageError, call_arguments, check_writable, load_pipeline, one_line, step_choice

if TYPE_CHECKING:
    from .trajectory import GeometryTrace

app = typer.Typer(
    name="hf-geometry", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Reads the geometry of a diffusion model's score while a diffusers pipeline generates.",
)  # fmt: skip


@app.callback()
def _common() -> None:
    """Reads the geometry of a diffusion model's score while a diffusers pipeline generates."""


RecordSteps = Annotated[str, typer.Option(help="How many steps to analyse, 'all', or positions such as 0,10,49.")]
_STEPS_REFUSED = "is not a choice of steps. Expected a number, 'all', or positions 0,10,49"
Method = Annotated[
    str,
    typer.Option(help="auto, dense, golub_kahan, randomized, perturbation (Algorithm 1) or central_difference (Algorithm 2)."),
]
Of = Annotated[str, typer.Option(help="Which map: denoised, score, epsilon, decoded, decoder or sampled.")]
Branch = Annotated[str, typer.Option(help="Branch of guidance: guided, conditional or unconditional.")]
NumSingularValues = Annotated[int | None, typer.Option(help="How many of the largest singular values; all if the method has them.")]
Flipd = Annotated[bool, typer.Option("--flipd", help="Also take the local intrinsic dimension at the final sample.")]
LogVolume = Annotated[
    float | None, typer.Option("--log-volume", help="Also take 1/2 log det(J'J + EPSILON^2), with this EPSILON.", metavar="EPSILON")
]
MaxProducts = Annotated[int | None, typer.Option(help="Budget of Jacobian products per step and sample.")]
MaxSeconds = Annotated[float | None, typer.Option(help="Limit for all probing, in seconds; sets method and budgets.")]
MaxMemory = Annotated[int | None, typer.Option(help="Limit for probing, in MiB; sets method and chunk size.")]


@app.command()
def analyze(
    model: Model = None,
    prompt: Prompt = None,
    class_label: ClassLabel = None,
    steps: Steps = 50,
    record_steps: RecordSteps = "10",
    seed: Seed = 0,
    call: Call = None,
    output: Annotated[Path, typer.Option(help="Folder for the trace and the figure.")] = Path("geometry"),
    spectrum: Method = "auto",
    of: Of = "denoised",
    branch: Branch = "guided",
    num_singular_values: NumSingularValues = None,
    flipd: Flipd = False,
    log_volume: LogVolume = None,
    max_products: MaxProducts = None,
    max_seconds: MaxSeconds = None,
    max_memory: MaxMemory = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Generate once and print what the score's Jacobian does at the recorded steps."""
    options = _probe_options(locals())
    check_writable(output)
    pipe, arguments = _load(locals())
    trace = pipe.analyze_geometry(**arguments, **options)
    trace.save_pretrained(output, figure="geometry.png")
    if as_json:
        print(json.dumps(_document(trace, output), indent=1, allow_nan=False))
    else:
        _print_trace(trace, output)


@app.command()
def plan(
    model: Model = None,
    prompt: Prompt = None,
    class_label: ClassLabel = None,
    steps: Steps = 50,
    record_steps: RecordSteps = "10",
    seed: Seed = 0,
    call: Call = None,
    spectrum: Method = "auto",
    of: Of = "denoised",
    branch: Branch = "guided",
    num_singular_values: NumSingularValues = None,
    flipd: Flipd = False,
    log_volume: LogVolume = None,
    max_products: MaxProducts = None,
    max_seconds: MaxSeconds = None,
    max_memory: MaxMemory = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Say what an analysis would cost in products, seconds and memory, before it is spent."""
    options = _probe_options(locals())
    pipe, arguments = _load(locals())
    planned = pipe.plan_geometry(**arguments, **options)
    print(json.dumps(planned.rows(), indent=1, allow_nan=False) if as_json else planned.table())


@app.command()
def selfcheck(
    model: Model = None,
    prompt: Prompt = None,
    class_label: ClassLabel = None,
    steps: Steps = 20,
    seed: Seed = 0,
    call: Call = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Put a manifold of known geometry behind the model's pipeline and scheduler, and compare; status 1 if an answer is wrong."""
    from .selfcheck import selfcheck as check

    pipe = load_pipeline(model, dtype, device)
    takes = inspect.signature(type(pipe).__call__).parameters
    prompt = "" if prompt is None and "prompt" in takes else prompt  # known answers need no meaning
    class_label = [0] if class_label is None and "class_labels" in takes else class_label
    arguments = call_arguments(pipe, prompt, class_label, steps, seed, call or [])
    result = check(pipe, **arguments)
    print(json.dumps(result.rows(), indent=1) if as_json else result.table())
    raise typer.Exit(0 if result else 1)


@app.command()
def transitions(
    model: Model = None,
    prompt: Prompt = None,
    class_label: ClassLabel = None,
    steps: Steps = 100,
    seed: Seed = 0,
    call: Call = None,
    data: Annotated[Path | None, typer.Option(help="Examples, .npy or .safetensors: adds recall and collapse.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Examples that the model has not seen, likewise.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the report and the figure.")] = Path("transitions"),
    parents: Annotated[int, typer.Option(help="Runs that clones are made of.")] = 64,
    clones: Annotated[int, typer.Option(help="Clones of a run at every position.")] = 4,
    positions: Annotated[str, typer.Option(help="How many positions to branch at, 'all', or positions such as 10,40,90.")] = "8",
    clusters: Annotated[int, typer.Option(help="Clusters of samples that stand for classes.")] = 2,
    agreement: Annotated[float, typer.Option(help="Agreement of clones that defines speciation.")] = 0.8,
    batch: Annotated[int, typer.Option(help="Runs at once.")] = 64,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure from which noise on a generation has its class (speciation), and from which it recites an example (collapse)."""
    given = locals()
    from .cli_transitions import transitions_of

    check_writable(output)
    print(transitions_of(*_load(given), given))


def _probe_options(given: dict[str, Any]) -> dict[str, Any]:
    """The analysis's own arguments from the options of a command."""
    memory = given["max_memory"]
    return {
        "record_steps": step_choice("--record-steps", given["record_steps"], _STEPS_REFUSED),
        "log_volume_epsilon": given["log_volume"],
        "max_probe_seconds": given["max_seconds"], "max_probe_memory": None if memory is None else memory * 2**20,
        **{k: given[k] for k in ("spectrum", "of", "branch", "num_singular_values", "flipd", "max_products")},
    }  # fmt: skip


def _load(given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The pipeline and its call's arguments from the options of a command."""
    pipe = load_pipeline(given["model"], given["dtype"], given["device"])
    names = ("prompt", "class_label", "steps", "seed")
    return pipe, call_arguments(pipe, *(given[name] for name in names), given["call"] or [])


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
        *[name for name in ("flipd", "log_volume") if trace.rows()[0][name] is not None],
        "engine",
        "products",
    ]
    for column in columns:
        table.add_column(
            column.replace("_", "-"), justify="left" if column in ("phase", "engine") else "right", no_wrap=column == "phase"
        )
    for row in trace.rows():
        cells = [str(row["step"]), *([str(row["sample"])] if batch > 1 else []), _number(row["sigma"], ".3g", "inf"), row["phase"]]
        cells += [_with_sem(row, "psi"), str(row["psi_rank"]), _with_sem(row, "nu"), _with_sem(row, "effective_dimension")]
        cells += [_number(row["gap_dim"], ".0f"), _number(row["asymmetry"], ".3f")]
        cells += [_with_sem(row, name) for name in ("flipd", "log_volume") if name in columns]
        cells += [row["engine"], str(row["products"])]
        table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for sample in range(batch):
        console.print(_summary(trace, sample, batch), highlight=False)
    console.print(f"Trace and figure in {output}{os.sep}", highlight=False, soft_wrap=True)


def _summary(trace: GeometryTrace, sample: int, batch: int) -> str:
    name = f"Sample {sample}: m" if batch > 1 else "M"
    dim, size = trace.manifold_dims[sample], trace.settings["plan"]["size"]
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


register(app)
register_audit(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; an error is one line on stderr and exit status 2 (a traceback with HF_GEOMETRY_TRACEBACK=1)."""
    try:
        status = app(args=arguments, prog_name="hf-geometry", standalone_mode=False)
    except Exception as error:
        if os.environ.get("HF_GEOMETRY_TRACEBACK"):
            raise
        print(f"hf-geometry: {_explained(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(status if isinstance(status, int) else 0)


def _explained(error: Exception) -> str:
    """One line for what a user can mend; the type and how to see more for what looks like a defect."""
    if hasattr(error, "format_message"):  # what typer found wrong with an option
        return f"{error.format_message().rstrip('.')}. Try --help."
    if isinstance(error, (UsageError, ValueError, TypeError, RuntimeError, FloatingPointError, OSError)):
        return one_line(error)
    return f"{type(error).__name__}: {one_line(error)} (HF_GEOMETRY_TRACEBACK=1 shows where)"
