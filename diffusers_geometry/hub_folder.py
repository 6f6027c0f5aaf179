"""An audit's folder as others get it: which of its files, in which form, and where they are already.

JSON goes out as strangers may see it (:mod:`.disclosure`), the page and pictures as they are. A link that leads out of the folder,
a file that holds an access token and more pictures than a folder of the Hub should have are refused before anything is asked.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from .disclosure import public_document
from .hub_errors import HubError, holds_token
from .report.document import SCHEMA, is_readable

PUBLISHED = "published.json"
PICTURES = ("images", "figures")
MOST_FILES = 10_000  # in a folder: https://huggingface.co/docs/hub/repositories-recommendations
_FILES = ("index.html", "report.md", "audit.json", "plan.json", "reference.json", "spectra.safetensors")
_NEEDED = ("index.html", "report.md", "audit.json")


def read_audit(folder: Path) -> dict[str, Any]:
    """audit.json of a finished audit.

    Raises:
        HubError: there is none, or of another schema, or its report was not made.
    """
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise HubError(
            f"{folder} has no {missing[0]}. Expected the folder of a finished audit; `hf-geometry report` makes its report."
        )
    try:
        audit = json.loads((folder / "audit.json").read_text())
        schema = audit["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(f"{folder / 'audit.json'} is no audit ({type(error).__name__}: {error}). Expected {SCHEMA}.") from None
    if not is_readable(schema):
        raise HubError(f"{folder / 'audit.json'} has the schema {schema!r}. Expected {SCHEMA!r}.")
    return audit


def files_to_publish(folder: Path) -> dict[str, Path | bytes]:
    """Its report and what it was made from, by their names in the folder; a document that names nothing private is sent as it is.

    Raises:
        HubError: a link that leads elsewhere, too many pictures, a damaged document.
    """
    found = [folder / name for name in _FILES]
    for pictures in (sorted((folder / name).glob("*.png")) for name in PICTURES):
        if len(pictures) > MOST_FILES:
            raise HubError(
                f"{pictures[0].parent} has {len(pictures)} images, and a folder of the Hub should not have more than {MOST_FILES} "
                "files. Expected fewer: move some away, the page has copies of those that it shows."
            )
        found += pictures
    for path in found:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise HubError(f"{path} is a link to {path.resolve()}, outside of the audit. Expected the file itself.")
    files = {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}
    return {name: _public(path) if path.suffix == ".json" else path for name, path in files.items()}


def _public(path: Path) -> Path | bytes:
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise HubError(f"{path} is not JSON: {error}. Expected what the audit wrote.") from None
    public = public_document(document)
    return path if public == document else json.dumps(public, indent=1, allow_nan=False).encode()


def refuse_tokens(files: dict[str, Path | bytes], folder: Path, token: Any) -> None:
    """Nothing that holds an access token leaves this machine."""
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        if holds_token(data, token):
            raise HubError(
                f"{folder / name} holds an access token. Expected none: take it out of what the audit was asked for, and revoke it."
            )


def published(folder: Path) -> dict[str, Any]:
    """Where the folder was published as a dataset; empty if it was not."""
    path = folder / PUBLISHED
    if not path.is_file():
        return {}
    try:
        noted = json.loads(path.read_text())
        return {key: noted[key] for key in ("dataset", "revision", "url")}
    except (ValueError, KeyError, TypeError):
        raise HubError(f"{path} is damaged. Expected what publish wrote; delete it and publish again.") from None


def note(folder: Path, where: dict[str, Any]) -> None:
    """Writes that down; a folder that cannot be written is warned of, since what matters is done."""
    try:
        (folder / PUBLISHED).write_text(json.dumps(where, indent=1))
    except OSError as error:
        warnings.warn(f"published at {where['url']}, but this cannot be noted in {folder}: {error}", stacklevel=2)
