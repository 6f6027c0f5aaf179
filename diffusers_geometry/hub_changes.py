"""What differs between a commit of the Hub and the files it should have: only that is sent, and nothing if nothing does.

The Hub shows a hash for every file of a commit: git's blob SHA-1, or the SHA-256 of what is kept as a large file. Comparing them
needs one listing and no download.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from .hub_card import with_section
from .hub_folder import PICTURES


def files_of(api: Any, repo_id: str, repo_type: str, revision: str) -> dict[str, Any]:
    """Every file of a commit by its path, with ``size``, ``blob_id`` and ``lfs``; folders left out."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
    return {entry.path: entry for entry in tree if hasattr(entry, "size")}


def changes(api: Any, repo_id: str, repo_type: str, revision: str, contents: dict[str, Any]) -> list[Any]:
    """Operations that bring a commit's files to these contents; none if it has them.

    Args:
        api: huggingface_hub's HfApi.
        repo_id: Repository.
        repo_type: "model" or "dataset".
        revision: The commit that is compared with.
        contents: A path or bytes per file; for README.md the card if there is none yet, and the section to put into it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = files_of(api, repo_id, repo_type, revision)
    head, text = contents["README.md"]
    card = _download(api, repo_id, repo_type, revision, "README.md") if "README.md" in there else head
    contents = contents | {"README.md": with_section(card, text)}
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in contents.items()
        if not _is_there(there.get(name), content)
    ]
    ours = {name.removesuffix("audit.json") + folder for name in contents for folder in PICTURES if name.endswith("audit.json")}
    # Pictures that the audit no longer has are taken away.
    old = [name for name in there if name.rpartition("/")[0] in ours and name not in contents]
    return operations + [CommitOperationDelete(name) for name in old]


def _is_there(file: Any, content: Path | bytes) -> bool:
    """Whether a file of the Hub has this content, by the hash that the Hub shows."""
    from huggingface_hub.utils.sha import git_hash

    if file is None:
        return False
    data = content if isinstance(content, bytes) else content.read_bytes()
    return file.lfs.sha256 == hashlib.sha256(data).hexdigest() if file.lfs else file.blob_id == git_hash(data)


def _download(api: Any, repo_id: str, repo_type: str, revision: str, name: str) -> bytes:
    """A small file as bytes, without leaving it in the cache."""
    with tempfile.TemporaryDirectory() as place:
        return Path(api.hf_hub_download(repo_id, name, repo_type=repo_type, revision=revision, local_dir=place)).read_bytes()
