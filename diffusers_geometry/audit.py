"""Audits: many prompts and seeds of one model, measured unit by unit, in a folder that can be continued, shared, repeated and read.

    audit = audit_model("org/model", prompts=["a thin seven", "the amber forest"], seeds=range(4), output_dir="audit")
    print(audit.table())

docs/audit.md describes the files. Every unit (one prompt, one seed) is recorded as it generates; the geometry of every recorded
step and the memorisation scores come from that one recording. Call it again after a stop and it goes on; start it twice, on two
machines with a shared folder, and they share the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .audit_folder import AUDIT, PLAN, REFERENCE, AuditFolder, read_json
from .audit_plan import AuditPlan
from .audit_reference import reference_document
from .audit_repeat import Repetition, compare_repetition
from .audit_request import AuditRequest, prompt_text, refuse_own
from .audit_run import AuditRun, Confirm
from .audit_source import load_source, versions
from .audit_summary import SCHEMA
from .hub_errors import redacted
from .loading import completed_call
from .memorization import DEFAULT_SCORES, SCORES
from .probe import ProbePlan


@dataclass(frozen=True)
class Audit:
    """A finished audit.

    Attributes:
        folder: Where its files are.
        document: ``audit.json`` as a dict, see docs/audit.md.
    """

    folder: Path
    document: dict[str, Any]

    @classmethod
    def from_folder(cls, path: str | Path) -> Audit:
        """Reads a finished audit.

        Raises:
            FileNotFoundError: no ``audit.json`` there.
            ValueError: a damaged one, or one of another schema.
        """
        path = Path(path)
        if not (path / AUDIT).is_file():
            more = " It holds an audit that is not finished: run it again to continue." if (path / PLAN).is_file() else ""
            raise FileNotFoundError(f"{path} holds no {AUDIT}. Expected a folder of a finished audit.{more}")
        document = read_json(path / AUDIT)
        if str(document.get("schema")).split(".")[:2] != SCHEMA.split(".")[:2]:  # another minor number only adds
            raise ValueError(f"{path / AUDIT} has schema {document.get('schema')!r}. Expected {SCHEMA!r}.")
        return cls(path, document)

    def table(self) -> str:
        """The audit as text: what was done, the most suspicious prompts, geometry over steps, health."""
        d = self.document
        done = sum(unit["status"] == "done" for unit in d["units"])
        lines = [
            f"{d['model']['name']} ({d['model']['pipeline']}): {done} of {len(d['units'])} units done, {len(d['prompts'])} prompts"
        ]
        for levels, step in zip(d["steps"], d["geometry"], strict=True):
            sigma = "inf" if levels["sigma"] is None else f"{levels['sigma']:.4g}"
            said = "  ".join(f"{name} {_said(step[name])}" for name in ("psi", "nu", "effective_dimension", "spectral_norm"))
            lines.append(f"step {levels['position']:>4}  sigma {sigma:>8}  {said}")
        ranked = sorted((p for p in d["prompts"] if p["rank"] is not None), key=lambda p: p["rank"])
        for p in ranked[:10]:
            between = p["rank_interval"]
            place = f"rank {p['rank']}" + (f" ({between[0]} to {between[1]})" if between else "")
            lines.append(
                f"{'FLAGGED  ' if p['flagged'] else ''}{place}: {prompt_text(p['prompt'])} (combined {_said(p['combined'])})"
            )
        lines.append(d["memorization"]["combined"]["certainty"])
        lines += [
            f"health: {check['name']} {_number(check['value'])}, limit {check['limit']:g}, "
            f"{ {True: 'ok', False: 'NOT OK', None: 'not measured'}[check['ok']] }"
            for check in d["health"]["checks"]
        ]
        if d["out_of_distribution"]:
            found = d["out_of_distribution"]
            lines.append(f"unlike the reference: {len(found['flagged'])} units. {found['explanation']}")
        return "\n".join(line for line in lines if line)


def audit_model(
    model: Any,
    prompts: Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3),
    output_dir: str | Path = "audit",
    *,
    labels: Sequence[bool | None] | None = None,
    reference: str | Path | None = None,
    call: dict[str, Any] | None = None,
    scores: Sequence[str] = DEFAULT_SCORES,
    neighborhood_radius: float | None = None,
    probe_products: int | None = None,
    threads: int = 1,
    revision: str | None = None,
    lora: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    token: str | None = None,
    max_products: int | None = None,
    max_seconds: float | None = None,
    retry_failed: bool = False,
    progress: bool = True,
    confirm: Confirm | None = None,
    command: str | None = None,
    **options: Any,
) -> Audit:
    """Audits a model: geometry, memorisation scores and health of every prompt with every seed; goes on where it was stopped.

    Processes of ``accelerate launch`` or ``torchrun``, and processes started by hand, share the units of one folder.

    Args:
        model: A Hub id, a folder, None for the bundled digits, or a pipeline.
        prompts: Texts; ``class_labels`` likewise; with neither the pipeline is called without.
        class_labels: Of a class-conditional pipeline.
        seeds: Of the generations.
        output_dir: The audit's folder.
        labels: Per prompt, whether it is known to be memorised: the detector is then fitted and judged.
        reference: Folder of another audit with the same steps; units unlike its units are flagged.
        call: Other arguments of the pipeline, such as ``num_inference_steps`` and ``guidance_scale``.
        scores: Memorisation scores, names in :data:`~.memorization.SCORES`.
        neighborhood_radius: Also take delta, in a neighbourhood of this size, see :func:`~.complexity.local_complexity`.
        probe_products: Budget of every recorded step, ``max_products`` of :func:`~.analyze.analyze_geometry`.
        threads: With which every unit is computed; another number may change the last bits.
        revision: Branch, tag or commit of a Hub id; the commit it stands for is stored.
        lora: A safetensors file of adapter weights, loaded into the model; see ``hf-geometry compare``.
        dtype: "float32", "bfloat16" or "float16".
        device: Torch device.
        token: For a private or gated model; stored nowhere.
        max_products: Refuses a plan of more Jacobian products, over all units.
        max_seconds: Refuses a plan of more seconds on one process.
        retry_failed: Try units again that failed before.
        progress: Show a bar with the time that is left.
        confirm: Called with the plan before the start; raises to refuse it. Not called when an audit goes on.
        command: What is stored as the command that made the audit.
        **options: Of :func:`~.analyze.analyze_geometry`. 6 steps are recorded by default; ``psi_rank`` is the same for all units.

    Raises:
        ValueError: a request that cannot be met, a plan beyond the limits, a folder that holds another audit.
        AuditStopped: the folder cannot be written; what is finished is kept.
    """
    unknown = sorted(set(scores) - set(SCORES))
    if unknown:
        raise ValueError(f"scores has {unknown}. Expected names in {list(SCORES)}.")
    options |= {} if probe_products is None else {"max_products": probe_products}
    compared = None if reference is None else _reference(Path(reference))
    pipe, identity = load_source(model, revision, dtype, device, token, lora)
    request = AuditRequest.make(
        prompts, class_labels, seeds, _checked_call(pipe, call, prompts, class_labels), options, scores, labels,
        reference=compared and compared["sha256"], neighborhood_radius=neighborhood_radius, threads=threads,
    )  # fmt: skip
    made = f"audit_model({identity['name']!r}, ...)" if command is None else redacted(command, token)
    run = AuditRun(pipe, AuditFolder(output_dir), identity, request, _provenance(made, threads), compared)

    def within_limits(plan: AuditPlan) -> None:
        plan.refuse_beyond(max_products, max_seconds)
        if confirm is not None:
            confirm(plan)

    run.prepare(within_limits)
    AuditPlan(**run.plan["plan"], probe=None).refuse_beyond(max_products, max_seconds)  # also of an audit that goes on
    return Audit(Path(output_dir), run.work(retry_failed=retry_failed, progress=progress))


def repeat_audit(
    folder: str | Path,
    output_dir: str | Path,
    *,
    model: Any = None,
    token: str | None = None,
    retry_failed: bool = False,
    progress: bool = True,
    confirm: Confirm | None = None,
) -> tuple[Audit, Repetition]:
    """Runs the plan of an audit again with the same weights, and says which numbers came out otherwise.

    Args:
        folder: Of the finished audit.
        output_dir: Of the repetition; may be one that was stopped.
        model: Where the model is now, if not under the name that the audit has.
        token: For a private or gated model.
        retry_failed: As in :func:`audit_model`.
        progress: As in :func:`audit_model`.
        confirm: As in :func:`audit_model`.

    Raises:
        ValueError: the model has other weights; it says which.
        FileNotFoundError: no finished audit in ``folder``.
    """
    first, plan = Audit.from_folder(folder), AuditFolder(folder).read_plan()
    before = plan["model"]
    source, revision = (before["name"], before["revision"]) if model is None else (model, None)
    pipe, identity = load_source(source, revision, before["dtype"], before["device"], token, before.get("lora"))
    for name in ("weights", "weights_sha256", "scheduler", "pipeline"):
        if identity[name] != before[name]:
            changed = (
                [f for f in {**before[name], **identity[name]} if before[name].get(f) != identity[name].get(f)]
                if name in ("weights", "scheduler")
                else [name]
            )
            raise ValueError(
                f"{source} is not the model of {folder}: {name} differs ({', '.join(sorted(changed))}). Expected the same weights: "
                f"{before['name']}{'@' + before['revision'] if before['revision'] else ''}."
            )
    request, other = AuditRequest.from_dict(plan["request"]), AuditFolder(output_dir)
    reference = read_json(Path(folder) / REFERENCE) if request.reference else None
    provenance = _provenance("hf-geometry audit --repeat FOLDER --output OTHER", request.threads)
    run = AuditRun(pipe, other, identity, request, provenance, reference)
    probe = plan["probe"] and ProbePlan(**plan["probe"])
    run.prepare(confirm, (AuditPlan(**plan["plan"], probe=probe), request))
    second = Audit(Path(output_dir), run.work(retry_failed=retry_failed, progress=progress))
    repetition = compare_repetition(first.document, second.document)
    other.write_json("repetition.json", repetition.as_dict())
    return second, repetition


def _reference(folder: Path) -> dict[str, Any]:
    audit = Audit.from_folder(folder)
    return reference_document(audit.document, hashlib.sha256((folder / AUDIT).read_bytes()).hexdigest())


def _checked_call(pipe: Any, call: dict[str, Any] | None, prompts: Any, class_labels: Any) -> dict[str, Any]:
    """The call's other arguments, seen together with those that every unit adds."""
    refuse_own(call or {})
    given = {"generator": None} | ({} if prompts is None else {"prompt": None})
    given |= {} if class_labels is None else {"class_labels": list(class_labels)}
    found = completed_call(pipe, dict(call or {}) | given)
    return {name: value for name, value in found.items() if name not in given}


def _provenance(command: str, threads: int) -> dict[str, Any]:
    repeat = "hf-geometry audit --repeat FOLDER --output OTHER"
    return {"versions": versions(), "threads": threads, "command": command, "repeat": repeat}


def _said(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    return _number(estimate["value"]) + ("" if estimate["sem"] is None else f" ± {estimate['sem']:.2g}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
