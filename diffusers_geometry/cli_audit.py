"""``hf-geometry audit``, ``compare`` and ``report``: measure a model, put two audits side by side, render one."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import AsJson, Call, ClassLabel, Device, Dtype, Model, Steps
from .loading import UsageError, check_writable, one_line, parsed_call, step_choice

if TYPE_CHECKING:
    from .audit_plan import AuditPlan

STOPPED = 130  # exit status of a command that was interrupted
_STEPS_REFUSED = "is not a choice of steps. Expected a number, 'all', or positions 0,10,49"
_OF_THE_PLAN = (
    "prompts", "prompt", "class_label", "seeds", "labels", "reference", "steps", "record_steps", "call", "spectrum",
    "num_singular_values", "psi_rank", "probe_products", "flipd", "delta", "scores", "threads", "revision", "lora", "dtype",
    "device",
)  # fmt: skip
_LABELS = {
    "1": True,
    "true": True,
    "yes": True,
    "0": False,
    "false": False,
    "no": False,
    "": None,
    "-": None,
    "null": None,
    "?": None,
}


def register(app: typer.Typer) -> None:
    """Adds the three commands."""
    app.command("audit")(audit)
    app.command("compare")(compare)
    app.command("report")(report)


def audit(
    model: Model = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts: a text file, one a line, or a JSON list.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text prompt (repeatable).")] = None,
    class_label: ClassLabel = None,
    seeds: Annotated[str, typer.Option(help="Seeds of every prompt: 0-3, or 0,5,7-9.")] = "0-3",
    labels: Annotated[
        Path | None, typer.Option(help="What is known of each prompt: 1 (memorised), 0 or -, one a line or a JSON list.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of another audit; units unlike its own are flagged.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the audit; run again to continue one.")] = Path("audit"),
    steps: Steps = 50,
    record_steps: Annotated[str, typer.Option(help="How many steps to measure, 'all', or positions such as 0,10,49.")] = "6",
    call: Call = None,
    spectrum: Annotated[str, typer.Option(help="auto, dense, golub_kahan, randomized, perturbation, central_difference.")] = "auto",
    num_singular_values: Annotated[int | None, typer.Option(help="How many of the largest; all if the method has them.")] = None,
    psi_rank: Annotated[int | None, typer.Option(help="Singular values that psi sums; 16, or all of fewer.")] = None,
    probe_products: Annotated[int | None, typer.Option(help="Budget of Jacobian products of every recorded step.")] = None,
    flipd: Annotated[bool, typer.Option("--flipd", help="Also take FLIPD at every recorded step.")] = False,
    delta: Annotated[float | None, typer.Option(help="Also take local complexity, within this radius.", metavar="RADIUS")] = None,
    scores: Annotated[str | None, typer.Option(help="Memorisation scores, separated by commas; 'none' for none.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of every unit; another number may change the last bits.")] = 1,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    lora: Annotated[Path | None, typer.Option(help="Adapter to load: a safetensors file.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Start without asking.")] = False,
    max_products: Annotated[int | None, typer.Option(help="Refuse a plan of more products, all units together.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Refuse a plan of more seconds on one process.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try units again that failed before.")] = False,
    repeat: Annotated[Path | None, typer.Option(help="Run this audit's plan again and compare.")] = None,
    publish: Annotated[str | None, typer.Option(help="Hub repository to publish to, when the audit is done.")] = None,
    publish_as: Annotated[str, typer.Option(help="dataset, or pull-request on the model's repository.")] = "dataset",
    private: Annotated[bool, typer.Option("--private", help="Make the dataset that is published to private.")] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Audit a model: geometry, memorisation and health of many prompts and seeds. Run it again to continue after a stop.

    Status 1 if no unit could be measured, 130 after Ctrl-C.
    """
    given = locals()
    _check_publishing(publish, publish_as, private)
    if repeat is not None and output.absolute() == repeat.absolute():
        raise UsageError(f"--output {output} is the audit that is to be repeated. Expected another folder.")
    check_writable(output)
    try:
        document, said = _repeated(given) if repeat is not None else _audited(given)
    except KeyboardInterrupt:
        print(f"\nhf-geometry: stopped; what is finished is kept in {output}. Run the same again to continue.", file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    if document is None:  # another process of this launch says it
        return
    from .report import write_report

    page = write_report(output)
    print(json.dumps(document, indent=1, allow_nan=False) if as_json else f"{said}\n\nReport in {page}")
    if publish is not None:
        from .hub_publish import publish as publish_folder

        print(publish_folder(output, publish, kind=publish_as.replace("-", "_"), private=private or None))
    if not any(unit["status"] == "done" for unit in document["units"]):
        raise typer.Exit(1)


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a finished audit.")],
    second: Annotated[Path, typer.Argument(help="Folder of another: another checkpoint, a LoRA, another precision.")],
    output: Annotated[Path | None, typer.Option(help="JSON file to write the comparison to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put two audits side by side: which numbers differ, by how much, and whether more than by chance."""
    from .audit import Audit
    from .audit_compare import compare_audits
    from .storage import write_together

    found = compare_audits(*(Audit.from_folder(folder).document for folder in (first, second)))
    text = json.dumps(found.as_dict(), indent=1, allow_nan=False)
    if output is not None:
        write_together(output.parent, {output.name: (text + "\n").encode()})
    print(text if as_json else found.table())


def report(folder: Annotated[Path, typer.Argument(help="Folder of an audit, or of a trace that analyze wrote.")]) -> None:
    """Write the report of an audit or a trace again: index.html, report.md and figures."""
    from .audit_folder import PLAN, AuditFolder
    from .report import write_report

    if (folder / PLAN).is_file() and (folder / "units").is_dir():  # without units, of what audit.json says
        from .audit_summary import summarise

        summarise(AuditFolder(folder))
    print(f"Report in {write_report(folder)}")


def _audited(given: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    from .audit import audit_model
    from .memorization import DEFAULT_SCORES

    texts = _prompts(given["prompts"], given["prompt"])
    if texts is not None and given["class_label"]:
        raise UsageError("--prompt and --class-label are both given. Expected one kind.")
    if given["steps"] < 1:
        raise UsageError(f"--steps {given['steps']} is not possible. Expected at least 1.")
    chosen = {None: DEFAULT_SCORES, "none": ()}.get(given["scores"], (given["scores"] or "").split(","))
    kept = ("reference", "threads", "revision", "lora", "dtype", "device", "max_products", "max_seconds", "retry_failed",
            "probe_products", "spectrum", "num_singular_values", "psi_rank", "flipd")  # fmt: skip
    found = audit_model(
        given["model"], texts, given["class_label"] or None, numbers("--seeds", given["seeds"]), given["output"],
        labels=_labels(given["labels"]), scores=chosen, neighborhood_radius=given["delta"],
        call=parsed_call(given["call"] or []) | {"num_inference_steps": given["steps"]},
        record_steps=step_choice("--record-steps", given["record_steps"], _STEPS_REFUSED),
        confirm=lambda plan: _confirm(plan, given), command=_command(), progress=not given["as_json"],
        **{name: given[name] for name in kept},
    )  # fmt: skip
    return (found.document, found.table()) if _is_main() else (None, "")


def _repeated(given: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    from .audit import repeat_audit

    named = [n for n in _OF_THE_PLAN if given[n] != inspect.signature(audit).parameters[n].default]
    if named:
        option = "--" + named[0].replace("_", "-")
        raise UsageError(f"--repeat takes everything from the plan; {option} is given too. Expected MODEL and --output only.")
    found, repetition = repeat_audit(
        given["repeat"], given["output"], model=given["model"], retry_failed=given["retry_failed"],
        confirm=lambda plan: _confirm(plan, given), progress=not given["as_json"],
    )  # fmt: skip
    document = found.document | {"repetition": repetition.as_dict()}
    return (document, f"{found.table()}\n\n{repetition.table()}") if _is_main() else (None, "")


def _check_publishing(repository: str | None, publish_as: str, private: bool) -> None:
    """Refuses what cannot be published before anything is computed."""
    if publish_as not in ("dataset", "pull-request"):
        raise UsageError(f"--publish-as {publish_as!r} is not known. Expected dataset or pull-request.")
    if private and (repository is None or publish_as != "dataset"):
        raise UsageError("--private is of a dataset that is published to. Expected --publish ORG/NAME with it, as a dataset.")
    if repository is not None:
        from .hub_publish import check_target

        check_target(repository)


def _is_main() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _confirm(plan: AuditPlan, given: dict[str, Any]) -> None:
    """Shows the plan and asks; where nobody can be asked, a limit must say that the cost is known."""
    print(plan.table(), file=sys.stderr)
    plan.refuse_beyond(given["max_products"], given["max_seconds"])
    if given["yes"]:
        return
    if sys.stdin.isatty():
        if not typer.confirm("Start?", default=True, err=True):
            raise typer.Exit(1)
    elif given["max_products"] is None and given["max_seconds"] is None:
        needs = [f"--max-products {plan.products}"] if plan.products is not None else []
        needs += [f"--max-seconds {2 * plan.seconds:.0f}"] if plan.seconds is not None else []
        raise UsageError(f"there is no terminal to confirm the plan at. Expected {' or '.join([*needs, '--yes'])}.")


def _prompts(path: Path | None, given: list[str] | None) -> list[str] | None:
    if path is None:
        return given or None
    if given:
        raise UsageError("--prompts and --prompt are both given. Expected one of them.")
    return _lines("--prompts", path, str)


def _labels(path: Path | None) -> list[bool | None] | None:
    if path is None:
        return None
    found = _lines("--labels", path, (bool, int, str, type(None)), keep_empty=True)
    texts = ["" if value is None else str(value).strip().lower() for value in found]
    unknown = [text for text in texts if text not in _LABELS]
    if unknown:
        raise UsageError(f"--labels {path} holds {unknown[0]!r}. Expected 1, 0 or - for every prompt.")
    return [_LABELS[text] for text in texts]


def _lines(option: str, path: Path, kind: Any, *, keep_empty: bool = False) -> list[Any]:
    """The lines of a text file, or the list of a JSON file."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {option} {path}: {one_line(error)}. Expected a text file, or a JSON list.") from error
    if not isinstance(found, list) or not all(isinstance(value, kind) for value in found):
        raise UsageError(f"{option} {path} is no list of the right kind. Expected one a line, or a JSON list.")
    found = found if keep_empty or path.suffix == ".json" else [line for line in found if line]
    if not found:
        raise UsageError(f"{option} {path} is empty. Expected one a line.")
    return found


def numbers(option: str, text: str) -> list[int]:
    """Numbers and ranges of them from the text of an option: 0-3, or 0,5,7-9."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UsageError(f"{option} {text!r} is no list of numbers. Expected 0-3, or 0,5,7-9.")
        found += range(first, last + 1)
    return found


def _command() -> str:
    """How this process was called, its folder left out."""
    arguments = list(sys.argv[1:])
    for i, argument in enumerate(arguments):
        if argument == "--output" and i + 1 < len(arguments):
            arguments[i + 1] = "FOLDER"
        elif argument.startswith("--output="):
            arguments[i] = "--output=FOLDER"
    return f"hf-geometry {shlex.join(arguments)}"
