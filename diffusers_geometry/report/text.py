"""Numbers and foreign text as a reader may safely see them.

A prompt is written by others. It is shown as text wherever it stands: HTML is escaped by Jinja, Markdown by :func:`markdown_code`,
JSON inside a page by :func:`script_json`, and what would not be visible, or would turn the line around, by :func:`visible`.
A number is written with its standard error, to two digits of it, and the value to the same place.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from markupsafe import Markup

MISSING = "–"
_SPACES = str.maketrans({"\n": " ", "\r": " ", "\t": " "})
_IN_SCRIPT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_MARKDOWN = re.compile(r"([\\`*_\[\]#|~$])")


def visible(text: Any) -> str:
    """Text on one line, with controls and invisible marks (NUL, bidirectional overrides, lone surrogates) written out."""
    return "".join(_shown(character) for character in str(text).translate(_SPACES))


def _shown(character: str) -> str:
    # Joiners are part of emoji and of Persian and Indic words.
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"
    return f"[U+{ord(character):04X}]" if hidden else character


def shortened(text: Any, length: int = 100) -> str:
    """At most ``length`` characters of the text, cut at the end with an ellipsis."""
    shown = visible(text)
    return shown if len(shown) <= length else shown[: length - 1].rstrip() + "…"


def prompt_name(kind: str, prompt: Any) -> str:
    """What a unit was asked for, in words: the prompt itself, "class 3", "(empty prompt)" or "(no prompt)"."""
    if prompt is None:
        return "(no prompt)"
    if kind == "class_labels":
        return f"class {visible(prompt)}"
    return visible(prompt) if str(prompt).strip() else "(empty prompt)"


def number(value: float | None, digits: int = 4) -> str:
    """A number to ``digits`` significant digits, a dash if it is not known."""
    if value is None or not math.isfinite(value):
        return MISSING
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value):,}".replace("-", "−")
    large = abs(value) >= 10 ** max(digits, 5)
    return (f"{value:,.0f}" if large and abs(value) < 1e7 else f"{value:.{digits}g}").replace("-", "−")


def estimate(value: Mapping[str, Any] | None, unit: str = "", *, why: bool = True) -> str:
    """``{"value", "sem", "n"}`` as "1.20 ± 0.10 nats"; says why no error stands there unless ``why`` is false."""
    if value is None or value.get("value") is None:
        return MISSING
    sem = value.get("sem")
    text = with_error(value["value"], sem) + (f" {unit}" if unit else "")
    if sem is None and why:
        text += " (one value)" if value.get("n") == 1 else " (error not known)"
    return text


def with_error(value: float | None, sem: float | None) -> str:
    """The value and, where it is known and not zero, its standard error to two digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    if not sem or not math.isfinite(sem) or sem < 1e-12 * abs(value):  # rounding of equal numbers is no error
        return number(value)
    places = 1 - math.floor(math.log10(sem))
    if places > 6 or places < -3:
        return f"{value:.4g} ± {sem:.2g}".replace("-", "−")
    places = max(places, 0)
    return f"{value:,.{places}f} ± {sem:.{places}f}".replace("-", "−")


def interval(value: Mapping[str, Any] | None) -> str:
    """``{"value", "low", "high"}`` as "0.98 (95 %: 0.96 to 0.99)"."""
    if value is None or value.get("value") is None:
        return MISSING
    if value.get("low") is None or value.get("high") is None:
        return f"{value['value']:.3f} (interval not known)"
    if value["low"] == value["high"]:  # where no pair is in the wrong order the bootstrap has nothing to vary
        return f"{value['value']:.3f} (resampling these prompts gives no interval)"
    return f"{value['value']:.3f} (95 %: {value['low']:.3f} to {value['high']:.3f})"


def percent(share: float | None) -> str:
    """A share as per cent, whole unless it is within one per cent of none or all."""
    if share is None or not math.isfinite(share):
        return MISSING
    away = 100 * min(share, 1 - share)
    places = 0 if away <= 0 or away >= 1 else -math.floor(math.log10(away))
    return f"{100 * share:.{places}f} %"


def count(number_of: int, one: str, many: str | None = None) -> str:
    """ "1 prompt", "2 prompts"."""
    return f"{number_of:,} {one if number_of == 1 else many or one + 's'}"


def words(name: Any) -> str:
    """A name of the documents, such as ``spectral_norm``, in words."""
    return visible(name).replace("_", " ")


def seconds(value: float | None) -> str:
    """A duration in the largest unit that leaves two digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.1f} s" if value >= 1 else f"{value:.2g} s"


def noise(sigma: float | None) -> str:
    """A noise level sigma, "∞" where it has no finite one (alpha_t = 0)."""
    return "∞" if sigma is None or math.isinf(sigma) else number(sigma, 3)


def link(url: Any) -> str | None:
    """The address if it is a plain web address, else None: a report must not carry ``javascript:`` or ``file:`` of others."""
    try:
        parts = urlsplit(str(url))
    except ValueError:
        return None
    return str(url) if parts.scheme in ("http", "https") and parts.netloc else None


def script_json(data: Any) -> Markup:
    """JSON that may stand inside a ``<script type="application/json">``: no character of it can end the element.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup("".join(_IN_SCRIPT.get(character, character) for character in text))


def markdown(text: Any) -> Markup:
    """Text with nothing of Markdown or HTML in it, for prose and cells of tables."""
    plain = _MARKDOWN.sub(r"\\\1", visible(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(plain.replace("@", "&#64;"))


def markdown_code(text: Any, length: int = 120) -> Markup:
    """Text as a code span that also holds in a table: no HTML, link or mention in it comes alive."""
    plain = shortened(text, length)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    pad = " " if len(fence) > 1 else ""
    return Markup(f"{fence}{pad}{plain}{pad}{fence}".replace("|", "\\|"))
