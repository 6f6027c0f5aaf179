"""What the Hub refuses, said in one line; and access tokens, which no text may show.

A token opens private models and may write to repositories, so that it must not stand in a message, a log, a report or a plan.
Here are the two doors: :func:`asked` runs what talks to the Hub and turns its refusals into one :class:`HubError` that says what
to do, and :func:`redacted` blots tokens out of any text: the one that was given, those of this machine (``HF_TOKEN``, the file
that ``hf auth login`` writes), and whatever has the form of one, since a server may repeat what it was sent.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

BLOT = "[token]"
_EXPECTED = "Expected an existing folder or a Hub id such as org/name"
_SHORTEST = 6  # a shorter "token" would blot out words
_FORM = re.compile(r"\b(?:hf_(?:[A-Za-z0-9]{20,}|(?:oauth|jwt)_[\w.\-]{8,})|api_org_[A-Za-z0-9]{8,})")
_PLACES = [  # where something secret stands, whatever its form
    (re.compile(r"(?i)\b(bearer\s+)[\w.\-+/=]{12,}"), rf"\1{BLOT}"),
    (re.compile(r"(?i)\b(authorization\W{1,4}(?:basic\s+)?)[\w.\-+/=]{8,}"), rf"\1{BLOT}"),
    (re.compile(r"(\w://)[^\s/@:]+:[^\s/@]+@"), rf"\1{BLOT}@"),  # a password in an address
    (re.compile(r"(?i)([?&](?:token|sig|signature|x-amz-(?:signature|credential|security-token))=)[^&\s'\"]+"), rf"\1{BLOT}"),
]


class HubError(ValueError):
    """What the Hub, or the cached copy of it, does not give; the message is one line and says what to do."""


def asked(
    call: Callable[[], Result],
    repo_id: str,
    *,
    revision: str | None = None,
    token: Any = None,
    endpoint: str | None = None,
    writes: bool = False,
) -> Result:
    """Runs what talks to the Hub; its refusals become one :class:`HubError` without the request (which holds the token) behind it.

    Args:
        call: Without arguments.
        repo_id: What is asked for, for the message.
        revision: Likewise.
        token: The one that is used, so that it can be blotted out.
        endpoint: The Hub, for the message; ``HF_ENDPOINT`` if None.
        writes: Whether it is to be written to, for the message.

    Raises:
        HubError: gated, missing or private, wrong revision, wrong token, rate-limited, not cached, no network, disk full.
    """
    try:
        return call()
    except HubError as error:
        message = str(error)
    except Exception as error:
        explained = _explained(error, repo_id, revision, endpoint, writes)
        if explained is None:
            raise
        message = explained
    raise HubError(redacted(message, token))  # outside of the handler: nothing that holds the request hangs on it


def redacted(text: str, *tokens: Any) -> str:
    """The text without the tokens given, those of this machine, or anything that has the form of one."""
    for token in known_tokens(*tokens):
        text = text.replace(token, BLOT)
    text = _FORM.sub(BLOT, text)
    for place, blot in _PLACES:
        text = place.sub(blot, text)
    return text


def holds_token(data: bytes, *tokens: Any) -> bool:
    """Whether a file's content has a token given, one of this machine, or anything that has the form of one."""
    known = any(token.encode() in data for token in known_tokens(*tokens))
    return known or re.search(_FORM.pattern.encode(), data) is not None


def known_tokens(*tokens: Any) -> list[str]:
    """Tokens given (anything but text is left out) and those of this machine, longest first; read from disk, never asked for."""
    from huggingface_hub import constants

    found = {token for token in tokens if isinstance(token, str)}
    found |= {os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    found.add(_text(Path(constants.HF_TOKEN_PATH)))
    stored = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        stored.read_string(_text(Path(constants.HF_STORED_TOKENS_PATH)))
    except configparser.Error:
        stored = configparser.ConfigParser()  # not a file that huggingface_hub would read a token from either
    found |= {value for section in stored.values() for name, value in section.items() if "token" in name}
    return sorted({token.strip() for token in found if len(token.strip()) >= _SHORTEST}, key=len, reverse=True)


def offline() -> bool:
    """Whether this machine said that nothing may be asked of the Hub, before or after huggingface_hub was imported."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _explained(error: Exception, repo_id: str, revision: str | None, endpoint: str | None, writes: bool) -> str | None:
    """One line for a refusal of the Hub or of its cache; None for anything else."""
    from huggingface_hub import constants, errors

    endpoint = endpoint or constants.ENDPOINT
    where = f"{repo_id} at {revision}" if revision else repo_id
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        page = f"{endpoint}/{repo_id}"
        return f"{repo_id} is gated: accept its conditions on {page}, then log in with `hf auth login` or give a token."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}. Expected a branch, a tag or a commit sha of it."
    if isinstance(error, errors.RepositoryNotFoundError) and writes:
        return (
            f"the Hub has no repository {repo_id!r} that may be written to. Expected its id, org/name, and a token with that right."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no model {repo_id!r}: it is not a folder, and the Hub has no such repository, or a private one that this token does "
            f"not open. {_EXPECTED}."
        )
    if isinstance(error, errors.HFValidationError):
        return f"no model {repo_id!r}: there is no such folder. {_EXPECTED}. ({said})"
    if isinstance(error, errors.HfHubHTTPError):
        return _answered(error, where, said)
    if isinstance(error, errors.IncompleteSnapshotError):
        return f"the cached copy of {where} is not complete. Expected to go online once more, to fetch the rest. ({said})"
    reason = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else said
    if isinstance(error, errors.OfflineModeIsEnabled) or (isinstance(error, FileNotFoundError) and offline()):
        return f"no model {where!r}: it is not a folder, it is not cached, and HF_HUB_OFFLINE is set. {_EXPECTED}."
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.HTTPError)) or _is_transport(error):
        unreached = f"the Hub at {endpoint} was not reached ({' '.join(reason.split())})"
        if writes:
            return f"{unreached} to publish to {repo_id}. Expected a network; publish again when there is one."
        return (
            f"no model {where!r}: it is not a folder, and {unreached}. {_EXPECTED}, a network, or a cached copy with "
            "HF_HUB_OFFLINE=1."
        )
    if isinstance(error, errors.FileMetadataError) or type(error) is OSError:
        return f"cannot take {where} from the Hub: {said}"
    return None


def _is_transport(error: Exception) -> bool:
    """Whether it is the HTTP client's own: no address, no connection, a time-out."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")


def _answered(error: Any, where: str, said: str) -> str:
    """One line for an HTTP status that has no class of its own."""
    status = error.response.status_code
    if status == 401:
        return f"the Hub refused the token for {where}. Expected one of https://huggingface.co/settings/tokens, or none. ({said})"
    if status == 403:
        return f"the token may not do this with {where}. Expected one with the right to it. ({said})"
    if status == 412 or (status == 409 and "parent" in said.lower()):
        return f"{where} was changed by somebody else meanwhile. Expected to look at that and publish again. ({said})"
    if status == 429:
        wait = _seconds_to_wait(error.response.headers)
        when = "later" if wait is None else f"in {wait} s"
        return f"the Hub limits how often {where} may be asked for (status 429). Expected to try again {when}, or with a token."
    return f"the Hub answered {status} for {where}: {said}"


def _seconds_to_wait(headers: Any) -> int | None:
    """What ``Retry-After``, or the ``t=`` of ``RateLimit`` (draft-ietf-httpapi-ratelimit-headers), says."""
    after = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After") or "")
    left = re.search(r"\bt=(\d+)", headers.get("RateLimit") or "")
    found = after or left
    return int(found.group(1)) if found else None
