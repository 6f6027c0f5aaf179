r"""What an audit's documents tell strangers: everything but the name of the machine and where files lie on it.

A page is sent to others and a folder is published, so that neither may say who computed it where. Pages are made of
:func:`public_document`, and publishing sends it in place of the document that stays in the folder. Of a path that begins at a
root, at home or above (``/a/b``, ``~/b``, ``../b``, ``C:\a\b``) the last part is left; addresses of the web, names such as
``org/model`` and paths below the working folder stay as they are, and so do prompts, which have hashes.
"""

from __future__ import annotations

import re
from pathlib import PureWindowsPath
from typing import Any

_ROOT = r"(?:(?:file://|~[\w.-]*|\.{1,2}|[A-Za-z]:)?[\\/]|\\\\)"
_BEFORE = r"(?<![^\s'\"=(\[{,;:])"  # a path begins a word, and the slashes of https://host are two
_QUOTED = re.compile(rf"{_BEFORE}(?P<quote>['\"])(?P<path>{_ROOT}(?![\\/])[^'\"\n]*)(?P=quote)")
_PLAIN = re.compile(rf"{_BEFORE}{_ROOT}(?![\\/])[^\s'\"<>|,;()\[\]{{}}]+")


def public_document(document: Any) -> Any:
    """The same document without the host's name and without places on this machine; nothing is changed in the one given."""
    return _public(document, "")


def public_text(text: str) -> str:
    """The text with nothing but the last part of every path that begins at a root, at home or above."""
    quoted = _QUOTED.sub(lambda found: f"{found['quote']}{_last(found['path'])}{found['quote']}", text)
    return _PLAIN.sub(lambda found: _last(found[0]), quoted)


def model_name(document: dict[str, Any]) -> str:
    """The model of an audit as others know it: its Hub id, or of a folder the last part."""
    name = str(document["model"].get("name") or "model")
    is_of_the_hub = document["model"].get("revision") or re.search(r"@[0-9a-f]{40}$", name)
    return name if is_of_the_hub else PureWindowsPath(name).name or "model"


def _public(value: Any, key: str) -> Any:
    if "prompt" in key:
        return value if not isinstance(value, list) else [_public(v, "") if isinstance(v, dict) else v for v in value]
    if key == "host":
        return None
    if isinstance(value, dict):
        return {name: _public(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry, "") for entry in value]
    return public_text(value) if isinstance(value, str) else value


def _last(path: str) -> str:
    """The last part of a path of either system; a line number or full stop after it stays."""
    return PureWindowsPath(path).name or path
