"""The first words of a report, for a reader who knows nothing of Jacobians: what was looked at, and four answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .document import Source
from .text import count, estimate, interval, number, percent, prompt_name, shortened, words


@dataclass(frozen=True)
class Answer:
    """One question of the summary and its answer.

    Attributes:
        question: As a reader would ask.
        verdict: "good", "bad" (look here) or "plain" (neither, or not measured).
        short: The answer in a few words.
        text: Sentences, each of which stands on its own.
        section: Where in the page more is said, or None.
    """

    question: str
    verdict: Literal["good", "bad", "plain"]
    short: str
    text: list[str]
    section: str | None = None


def looked_at(source: Source) -> list[str]:
    """What was looked at, in sentences."""
    document = source.document
    units, steps = document["units"], document["steps"]
    request, model = document["request"], document["model"]
    done = sum(unit["status"] == "done" for unit in units)
    by = " with the scheduler ".join(str(n) for n in (model.get("pipeline"), (model.get("scheduler") or {}).get("class")) if n)
    if source.kind == "trace":
        made = f"The model made {count(done, 'sample')} ({by})." if by else f"The model made {count(done, 'sample')}."
    else:
        seeds = count(len(request["seeds"]), "seed")
        what = {"prompt": "prompt", "class_labels": "class label"}.get(request["kind"])
        asked = f"without a prompt, with {seeds}"
        if what:
            asked = f"for {count(len(request['prompts']), what)} with {seeds} each"
        made = f"The model was run {asked}{f' ({by})' if by else ''}: {done} of {count(len(units), 'run')} finished."
    if not steps:
        return [made, "No step was recorded."]
    return [
        made,
        f"At {count(len(steps), 'moment')} of every run, from noise to finished image, we measured how the model's denoiser "
        "answers to small changes of what it sees: which it keeps (details it knows) and which it wipes out as noise.",
    ]


def answers(source: Source) -> list[Answer]:
    """The questions that this folder can answer."""
    document = source.document
    found = [_dimension(source)]
    if source.kind == "audit":
        found = [_health(document), _memorised(document), *found]
    if document["out_of_distribution"] is not None:
        found.append(_reference(document))
    return found


def _health(document: dict[str, Any]) -> Answer:
    units = document["units"]
    failed = [unit for unit in units if unit["status"] != "done"]
    checks = [c for c in (document["health"] or {}).get("checks", []) if c["name"] != "failed_units"]  # said apart
    broken = [check for check in checks if check["ok"] is False]
    text = []
    if len(failed) == len(units):
        return Answer("Is something wrong?", "bad", "Nothing could be measured", [
            f"All {count(len(units), 'run')} failed; the errors are listed below."], "failed")  # fmt: skip
    if failed:
        text.append(f"{count(len(failed), 'run')} of {len(units)} failed with an error and {'is' if len(failed) == 1 else 'are'} "
                    "left out of all numbers.")  # fmt: skip
    if broken:
        names = ", ".join(words(check["name"]) for check in broken)
        text.insert(0, f"{len(broken)} of {count(len(checks), 'health check')} did not pass: {names}.")
        return Answer("Is something wrong?", "bad", "Yes, look at the health checks", text, "health")
    if failed:
        return Answer("Is something wrong?", "bad", "Some runs failed", [*text, _passed(checks)], "failed")
    if all(check["ok"] is None for check in checks):
        return Answer("Is something wrong?", "plain", "Not checked", [_passed(checks)], "health")
    return Answer("Is something wrong?", "good", "Nothing was found", [_passed(checks)], "health")


def _passed(checks: list[dict[str, Any]]) -> str:
    passed, unknown = sum(check["ok"] is True for check in checks), sum(check["ok"] is None for check in checks)
    if not passed:
        return "No health check could be made."
    more = f"; {unknown} could not be made" if unknown else ""
    return f"{passed} of {count(len(checks), 'health check')} passed on the runs that finished{more}."


def unranked(document: dict[str, Any]) -> str:
    """Why prompts are not ranked."""
    if document["request"]["kind"] == "unconditional":
        return "Prompts are compared with one another, and this model was run without."
    combined = (document["memorization"] or {}).get("combined") or {}
    return str(combined.get("certainty") or "No memorisation score was taken.")


def labelled(ranked: list[dict[str, Any]]) -> str | None:
    """How many prompts with a rank are known to be memorised, or not to be; None without any."""
    labels = [p.get("label") for p in ranked]
    yes, no = labels.count(True), labels.count(False)
    return f"{count(yes, 'prompt')} known to be memorised and {no:,} known not to be" if yes or no else None


def _memorised(document: dict[str, Any]) -> Answer:
    question = "Does it recite training images?"
    memorization, ranked = document["memorization"], [p for p in document["prompts"] if p.get("rank") is not None]
    if not memorization or not ranked:
        return Answer(question, "plain", "Not measured", [unranked(document)])
    kind = document["request"]["kind"]
    flagged = sorted((p for p in ranked if p.get("flagged")), key=lambda p: p["rank"])
    combined = memorization.get("combined") or {}
    text = []
    if flagged:
        names = "; ".join(f"“{shortened(prompt_name(kind, p['prompt']), 60)}”" for p in flagged[:3])
        more = f" and {len(flagged) - 3} more" if len(flagged) > 3 else ""
        text.append(f"Most suspicious: {names}{more}.")
    else:
        text.append(f"Of {count(len(ranked), 'ranked prompt')} none stands out above the threshold.")
    known = [[p for p in flagged if p.get("label") is label] for label in (True, False)]
    known_as = [f"{count(len(p), 'is', 'are')} known {to} memorised" for p, to in zip(known, ("to be", "not to be"), strict=True)]
    if any(known):
        text.append(f"Of those flagged, {' and '.join(known_as)}.")
    if (combined.get("auroc") or {}).get("value") is not None:
        text.append(f"On {labelled(ranked)}, the score puts a memorised one before another with a probability (AUROC) of "
                    f"{interval(combined['auroc'])}.")  # fmt: skip
    if combined.get("certainty") and combined.get("fitted_on") != "labels":
        text.append(str(combined["certainty"]))
    return Answer(question, *_flags(len(flagged), len(ranked), combined.get("fitted_on")), text, "memorisation")


def _flags(flagged: int, ranked: int, fitted_on: str | None) -> tuple[Literal["good", "bad", "plain"], str]:
    """Verdict and short answer; without labels a flag only says that a prompt is unlike the others, and none says nothing."""
    compared = fitted_on == "robust z"
    if not flagged:
        return ("plain", "No prompt stands out") if compared else ("good", "No prompt is flagged")
    one = flagged == 1
    does = f"{'stands' if one else 'stand'} out" if compared else f"{'is' if one else 'are'} flagged as memorised"
    return "bad", f"{count(flagged, 'prompt')} of {ranked:,} {does}"


def _dimension(source: Source) -> Answer:
    question = "How many dimensions does it use?"
    document = source.document
    found, size = document["manifold_dim"] or {}, (document["plan"] or {}).get("dimension")
    of = f" of {number(size)}" if size else ""
    things = "samples" if source.kind == "trace" else "runs"
    last = _final(document)
    if not document["steps"]:
        return Answer(question, "plain", "Not measured", ["There is no spectrum to count in."])
    text = []
    if last is not None:
        of_units = f" (mean over {things})" if (last.get("n") or 0) > 1 else ""
        kept = f"{estimate(last, why=False)}{of} directions{of_units}"
        text.append(f"At the last noise level recorded the denoiser keeps about {kept}: the sum of what it keeps of each.")
    if found.get("value") is None:
        text.insert(0, "No run ends in the phase in which directions are either kept or dropped, so there is no clean count.")
        return Answer(question, "plain", "No clean count", text, "geometry")
    text.insert(0, f"Around its finished images the model can move in about {number(found['value'], 3)}{of} directions; the others "
                f"it treats as noise. This is a clear count in {percent(found.get('share'))} of the {things}.")  # fmt: skip
    return Answer(question, "plain", f"{estimate(found, why=False)}{of}", text, "geometry")


def _final(document: dict[str, Any]) -> dict[str, Any] | None:
    """The effective dimension at the smallest noise level, where it is known."""
    steps, geometry = document["steps"], document["geometry"]
    levels = [i for i, step in enumerate(steps) if step["sigma"] is not None and i < len(geometry)]
    if not levels:
        return None
    last = geometry[min(levels, key=lambda i: steps[i]["sigma"])].get("effective_dimension")
    return last if last and last.get("value") is not None else None


def _reference(document: dict[str, Any]) -> Answer:
    found, question = document["out_of_distribution"], "Does it behave like the reference?"
    flagged, judged = len(found["flagged"]), len(found["units"])
    name = (found.get("reference") or {}).get("name")
    text = [str(found["explanation"])] if found.get("explanation") else []
    text.insert(0, f"The reference is an audit of {shortened(name, 80)}." if name else "It was compared with another audit.")
    expected = found.get("expected_false_alarms") or 0
    if flagged <= expected or not flagged:
        short = "Yes" if not flagged else f"Yes: {count(flagged, 'run')} of {judged} flagged, no more than by chance"
        return Answer(question, "good", short, text, "reference")
    return Answer(question, "bad", f"{count(flagged, 'run')} of {judged} {'does' if flagged == 1 else 'do'} not", text, "reference")
