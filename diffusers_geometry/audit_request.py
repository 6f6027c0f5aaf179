"""What an audit is of: prompts and seeds, the pipeline's other arguments, the analysis, the scores; plain values, stored as JSON.

A unit is one prompt with one seed. All that it depends on follows from the request and its own place in it, never from the order in
which units are computed: its noise from the seed, its probes from the probe seed, the prompt's text and the seed. So the same
prompt and seed have the same probes in every audit, which is what makes two audits comparable unit by unit.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from .analyze import analyze_geometry
from .settings import checked_settings

Kind = Literal["prompt", "class_labels", "unconditional"]
RECORD_STEPS = 6
_NOT_OPTIONS = ("progress", "watch")
_OWN = ("generator", "prompt", "class_labels", "batch_size")


@dataclass(frozen=True)
class AuditRequest:
    """What an audit is of; :meth:`make` checks it.

    Attributes:
        kind: What the pipeline is conditioned on.
        prompts: Texts, class labels, or (None,).
        seeds: Of the generations; every prompt is run with every seed.
        call: The pipeline's other arguments.
        options: All arguments of :func:`~.analyze.analyze_geometry` but the call's.
        scores: Names of the memorisation scores.
        labels: Per prompt, whether it is known to be memorised; None where that is not known.
        reference: SHA-256 of the ``audit.json`` to compare with, or None.
        neighborhood_radius: Of delta, per coordinate in units of the sample; None to leave delta out.
        threads: With which every unit is computed.
    """

    kind: Kind
    prompts: tuple[Any, ...]
    seeds: tuple[int, ...]
    call: dict[str, Any]
    options: dict[str, Any]
    scores: tuple[str, ...]
    labels: tuple[bool | None, ...]
    reference: str | None = None
    neighborhood_radius: float | None = None
    threads: int = 1

    @classmethod
    def make(
        cls,
        prompts: Sequence[str] | None,
        class_labels: Sequence[int] | None,
        seeds: Sequence[int],
        call: dict[str, Any] | None,
        options: dict[str, Any],
        scores: Sequence[str],
        labels: Sequence[bool | None] | None = None,
        **others: Any,
    ) -> AuditRequest:
        """The request, checked.

        Raises:
            ValueError: what cannot be asked for; it says what can.
            TypeError: an option that the analysis does not have.
        """
        if prompts is not None and class_labels is not None:
            raise ValueError("prompts and class_labels are both given. Expected one of them, or neither.")
        kind = "prompt" if prompts is not None else "class_labels" if class_labels is not None else "unconditional"
        conditions = _distinct(prompts if prompts is not None else class_labels, kind) if kind != "unconditional" else (None,)
        labels = (None,) * len(conditions) if labels is None else tuple(labels)
        if len(labels) != len(conditions) or not all(label is None or isinstance(label, bool) for label in labels):
            raise ValueError(f"labels={list(labels)!r:.80}. Expected True, False or None for each of {len(conditions)} prompts.")
        return cls(
            kind, conditions, _distinct(seeds, "seeds", int), _checked_call(call or {}), _options(options), tuple(scores), labels,
            **others,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> AuditRequest:
        """From what :meth:`as_dict` gave."""
        kept = {k: v for k, v in document.items() if k in cls.__dataclass_fields__}
        return cls(**kept | {name: tuple(kept[name]) for name in ("prompts", "seeds", "scores", "labels")})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the hash of all prompts."""
        document = json.loads(json.dumps(asdict(self)))
        return document | {"prompts_sha256": _sha256(json.dumps(document["prompts"]))}

    def __len__(self) -> int:
        """How many units there are."""
        return len(self.prompts) * len(self.seeds)

    def place(self, unit: int) -> tuple[int, int]:
        """(prompt's index, seed) of a unit."""
        return unit // len(self.seeds), self.seeds[unit % len(self.seeds)]

    def prompt_sha256(self, prompt: int) -> str:
        """Of one prompt, what tells it from others in any audit."""
        return _sha256(f"{self.kind}:{json.dumps(self.prompts[prompt])}")

    def arguments(self, unit: int) -> dict[str, Any]:
        """Those of the pipeline's call for a unit."""
        prompt, seed = self.place(unit)
        value = self.prompts[prompt]
        given = {} if value is None else {"prompt": value} if self.kind == "prompt" else {"class_labels": [value]}
        return self.call | given | {"generator": torch.Generator().manual_seed(seed)}

    def settings(self, unit: int) -> dict[str, Any]:
        """Those of the analysis for a unit, with probes of its own."""
        return self.options | {"probe_seed": self.random_seed(unit, "geometry")}

    def random_seed(self, unit: int, purpose: str) -> int:
        """Of random numbers that belong to one unit and purpose."""
        prompt, seed = self.place(unit)
        said = f"{self.options['probe_seed']}/{purpose}/{self.prompt_sha256(prompt)}/{seed}"
        return int(_sha256(said)[:15], 16)


def prompt_text(value: Any) -> str:
    """A prompt, class label or nothing in words."""
    return "no prompt" if value is None else value if isinstance(value, str) else f"class {value}"


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """All options of the analysis, checked, as JSON has them."""
    own = {
        p.name: p.default for p in inspect.signature(analyze_geometry).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_OPTIONS
    }  # fmt: skip
    unknown = sorted(set(given) - set(own))
    if unknown:
        raise TypeError(f"audit_model has no option {unknown[0]!r}. Expected one of its own, or of the analysis: {', '.join(own)}.")
    options = checked_settings(own | {"record_steps": RECORD_STEPS} | given)
    if options["max_probe_seconds"] is not None:
        raise ValueError(
            "max_probe_seconds makes budgets depend on timings, so that an audit could not be repeated. Expected max_products, "
            "num_singular_values or max_seconds of the whole audit."
        )
    return options


def refuse_own(call: dict[str, Any]) -> None:
    """Raises ValueError for arguments of the pipeline that every unit sets itself."""
    taken = sorted(set(_OWN) & set(call))
    if taken:
        raise ValueError(f"call has {taken}. Expected prompts=, class_labels= and seeds= instead; a unit is one sample.")


def _checked_call(call: dict[str, Any]) -> dict[str, Any]:
    refuse_own(call)
    try:
        plain = json.loads(json.dumps(call, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"call={call!r:.200} cannot be stored ({error}). Expected numbers, texts, lists and dicts.") from error
    return plain


def _distinct(values: Any, name: str, kind: type | None = None) -> tuple[Any, ...]:
    """A non-empty sequence without repeats as a tuple."""
    kind = kind or (str if name == "prompt" else int)
    values = (values,) if isinstance(values, str) else tuple(values)
    if not values or not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{name}={values!r:.80}. Expected a non-empty sequence of {kind.__name__}.")
    repeated = [v for i, v in enumerate(values) if v in values[:i]] if len(set(values)) != len(values) else []
    if repeated:
        raise ValueError(f"{name} holds {repeated[0]!r} twice. Expected no repeats: a unit is known by its prompt and seed.")
    if name == "seeds" and min(values) < 0:
        raise ValueError(f"seeds={values!r:.80}. Expected integers from 0.")
    return values


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
