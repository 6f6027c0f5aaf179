"""What a repository of the Hub shows of an audit: a section of its card, and results in the Hub's own format.

A card belongs to its owner. The section stands between two comments, which do not show; it is added at the end, or put in the
place of the one that is there, and every other byte stays as it is, line endings included.

Results are entries of ``.eval_results/*.yaml``: ``{dataset: {id, task_id, revision}, value, date, source: {url, name}, notes}``
(https://huggingface.co/docs/hub/eval-results; huggingface_hub's ``EvalResultEntry`` writes them). Each names the dataset where it
belongs, which here is the one that holds the whole audit. The Hub shows a leaderboard for datasets that it has registered as
benchmarks; for others an entry is a record that machines can read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .disclosure import model_name
from .hub_errors import HubError
from .report.text import count, markdown, markdown_code

BEGIN = b"<!-- diffusers-geometry audit: begin. What stands between these comments is replaced by the next audit. -->"
END = b"<!-- diffusers-geometry audit: end -->"
_HEAD = b"<!-- diffusers-geometry audit: begin"
_WEIGHTS = {"labels": "fitted on the audit's labels", "robust z": "equal for all scores"}


def with_section(card: bytes, section: str) -> bytes:
    """The card with the section in it, all other bytes as they were.

    Raises:
        HubError: the comments around an earlier section are not one pair.
    """
    ending = b"\r\n" if b"\r\n" in card else b"\n"
    block = BEGIN + ending + section.strip("\n").encode().replace(b"\n", ending) + ending + END
    if card.count(_HEAD) == card.count(END) == 0:
        apart = b"" if not card or card.endswith(ending * 2) else ending if card.endswith(ending) else ending * 2
        return card + apart + block + ending
    start, end = card.find(_HEAD), card.find(END)
    if card.count(_HEAD) != 1 or card.count(END) != 1 or end < start:
        raise HubError(
            f"the card has {card.count(_HEAD)} comments {_HEAD.decode()!r} and {card.count(END)} {END.decode()!r}. Expected one "
            "pair or none; its owner can mend that."
        )
    return card[:start] + block + card[end + len(END) :]


def section(audit: dict[str, Any], report: str, dataset: str | None) -> str:
    """What the card says of an audit, as Markdown.

    Args:
        audit: Content of audit.json.
        report: Address of its report, relative to the card or whole.
        dataset: Hub id of the dataset that holds the audit; None where its files came along.
    """
    model, request = audit["model"], audit["request"]
    of = _code(model_name(audit)) + (f" at {_code(model['revision'][:12])}" if model["revision"] else "")
    what = {"prompt": "prompt", "class_labels": "class label"}.get(request["kind"])
    seeds = count(len(request["seeds"]), "seed")
    asked = f"{count(len(request['prompts']), what)}, {seeds} each" if what else seeds
    done = sum(unit["status"] == "done" for unit in audit["units"])
    rows = "".join(
        f"| {number.name} | {f'{number.value:.4g} {number.error}'.strip()} | {markdown(number.meaning)} |\n"
        for number in _numbers(audit)
    )
    fetch = f"hf download {dataset} --repo-type dataset --local-dir FOLDER" if dataset else ""
    return f"""## Geometry audit

[Report]({report}) of {of}, {markdown(model["scheduler"]["class"])}, {markdown(model["dtype"])}: {asked}; {done} of
{count(len(audit["units"]), "unit")} finished. A unit is one prompt with one seed; values are means over units ± standard error.

| measured | value | unit and scope |
| --- | --- | --- |
{rows}
Weights: sha256 {_code(model["weights_sha256"])}. To repeat{" it" if fetch else " it from the files in this repository"}:
{_code(fetch) + " and " if fetch else ""}{_code(audit["provenance"]["repeat"])}
"""


def results(audit: dict[str, Any], dataset: str, revision: str | None, url: str) -> bytes:
    """The audit's numbers as one file of ``.eval_results``.

    Args:
        audit: Content of audit.json.
        dataset: Hub id of the dataset that holds the audit.
        revision: Its commit.
        url: Its page.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    date = audit["run"]["finished"]
    entries = [
        EvalResultEntry(
            dataset_id=dataset, task_id=number.task, value=number.value, dataset_revision=revision, date=date, source_url=url,
            source_name="Geometry audit", notes=f"{number.name} {number.error}".strip() + f", {number.meaning}",
        )
        for number in _numbers(audit)
    ]  # fmt: skip
    return yaml_dump(eval_result_entries_to_yaml(entries)).encode()


@dataclass(frozen=True)
class _Number:
    """One number of the audit: how machines call it, how people do, its value, its error in words, what it is."""

    task: str
    name: str
    value: float
    error: str
    meaning: str


def _numbers(audit: dict[str, Any]) -> list[_Number]:
    """What is known; the geometry at the last recorded step."""
    dim = audit["manifold_dim"]
    known = [("manifold_dim", "manifold dimension", dim, f"directions; read in {dim['share']:.0%} of the units" if dim else "")]
    for step, geometry in zip(audit["steps"][-1:], audit["geometry"][-1:], strict=True):  # none where no unit was finished
        noise = "at sigma inf" if step["sigma"] is None else f"at sigma {step['sigma']:.4g}"
        known.append(("psi", "local scaling psi", geometry["psi"], f"nats, {noise}"))
        known.append(("nu", "local rank nu", geometry["nu"], f"directions, {noise}"))
    found = [
        _Number(task, name, estimate["value"], _error(estimate), meaning)
        for task, name, estimate, meaning in known
        if estimate is not None and estimate["value"] is not None
    ]
    if audit["memorization"] and audit["memorization"]["combined"]["fitted_on"] is not None:
        combined = audit["memorization"]["combined"]
        flags = [prompt["flagged"] for prompt in audit["prompts"] if prompt["flagged"] is not None]  # None: not compared
        by = f"by the combined score, weights {_WEIGHTS.get(combined['fitted_on'], 'of another kind')}"
        found.append(
            _Number("flagged_prompts", "prompts flagged as memorised", sum(flags) / len(flags), "", f"share of {len(flags)}; {by}")
        )
        auroc = combined["auroc"]
        if auroc is not None:
            known_interval = None not in (auroc["low"], auroc["high"])
            interval = f"[{auroc['low']:.3f}, {auroc['high']:.3f}]" if known_interval else ""
            found.append(_Number("memorization_auroc", "AUROC of that score", auroc["value"], interval, "95 %, by prompt"))
    checks = [check for check in audit["health"]["checks"] if check["ok"] is not None]  # None: not measured
    failed = [check["name"] for check in checks if not check["ok"]]
    meaning = f"of {len(checks)}" + (f": {', '.join(failed)}" if failed else "")
    found.append(_Number("failed_health_checks", "health checks failed", len(failed), "", meaning))
    return found


def _error(estimate: dict[str, Any]) -> str:
    return "(n = 1)" if estimate["sem"] is None else f"± {estimate['sem']:.2g} (n = {estimate['n']})"


def _code(text: Any) -> str:
    """Text as a code span, in which the comments around a section cannot stand."""
    return markdown_code(str(text).replace("<!--", "<!- -"), 1000)
