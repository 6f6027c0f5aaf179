"""A model of the Hub as a folder of this machine, pinned to one commit; weights in safetensors only.

A name such as ``org/model`` means another model tomorrow: its owner may push. So a name is resolved to a commit sha first,
everything is downloaded at that sha, and the sha goes into what is measured. ``org/model@sha`` asks for it again. What is
downloaded is what diffusers loads: ``model_index.json`` names the components, and of a component's folder its configuration and
its safetensors are taken (no variants such as ``fp16``, no other formats). Three things are never downloaded: pickled weights
(.bin, .ckpt, .pt), whose loading can run anything; Python files, since ``trust_remote_code`` is never implied; and more than the
limit or the disk allows, which is checked before the first byte.

How huggingface_hub keeps a cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache. A commit is immutable, so that
a cached snapshot of a full sha is used without asking.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .hub_errors import HubError, asked, offline
from .pipeline_files import INDEX, components, is_loaded, loaded_files, refuse_without_index

MAX_BYTES = 64 * 2**30
_SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Snapshot:
    """A model as files.

    Attributes:
        path: Folder that ``from_pretrained`` loads.
        repo_id: The Hub's name of it; None for a folder of the user.
        sha: The commit; None for a folder of the user.
        files: What is loaded of it, relative to ``path``.
        num_bytes: Size of these files together.
    """

    path: Path
    repo_id: str | None
    sha: str | None
    files: tuple[str, ...]
    num_bytes: int

    @property
    def name(self) -> str:
        """What :func:`snapshot` takes to give this again: ``org/model@sha``, or the folder."""
        return f"{self.repo_id}@{self.sha}" if self.repo_id else str(self.path)


def snapshot(
    model: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    max_bytes: int | None = MAX_BYTES,
    local_files_only: bool | None = None,
    *,
    endpoint: str | None = None,
) -> Snapshot:
    """A local folder as it is, or a Hub model downloaded at one commit.

    Args:
        model: Folder of a pipeline, or a Hub id, which may have a revision: ``org/model@revision``.
        revision: Branch, tag or commit sha; the default branch if left out.
        token: Access token; the machine's own if None, none at all if False.
        cache_dir: Where huggingface_hub keeps its cache, if not in its place.
        max_bytes: Most that may be downloaded; what is cached does not count. None for as much as the disk has.
        local_files_only: Ask nothing of the Hub; None does as ``HF_HUB_OFFLINE`` says.
        endpoint: The Hub; ``HF_ENDPOINT`` if None.

    Raises:
        HubError: nothing there, gated, too large, pickled weights only, code of its own, not cached, no network; says what to do.
    """
    if Path(model).exists():
        if revision is not None:
            raise HubError(f"{model} is a folder and has no revision {revision!r}. Expected none, or a Hub id.")
        return _of_folder(Path(model))
    repo_id, _, named = str(model).partition("@")
    if named and revision not in (None, named):
        raise HubError(f"{model} names the revision {named!r}, and revision={revision!r} is another. Expected one of them.")
    revision = named or revision
    hub = _Hub(repo_id, token, None if cache_dir is None else Path(cache_dir), endpoint)
    only_cached = offline() if local_files_only is None else local_files_only
    call = (lambda: hub.cached(revision)) if only_cached else (lambda: hub.downloaded(revision, max_bytes))
    return asked(call, repo_id, revision=revision, token=token, endpoint=endpoint)


def weight_hashes(path: str | Path) -> dict[str, str]:
    """SHA-256 of every safetensors file and scheduler configuration that is loaded from a snapshot's folder, by relative path.

    The Hub shows the same hash beside a file that it keeps as LFS or Xet.
    """
    files = _of_folder(Path(path)).files
    wanted = [file for file in files if file.endswith(".safetensors") or file.endswith("/scheduler_config.json")]
    return {file: _sha256(Path(path) / file) for file in wanted}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _of_folder(path: Path) -> Snapshot:
    """A folder of the user, with whatever of it would be loaded; nothing is refused here."""
    names = [file.relative_to(path).as_posix() for pattern in ("*", "*/*") for file in path.glob(pattern) if file.is_file()]
    try:
        folders = components(json.loads((path / INDEX).read_text())) if INDEX in names else set()
    except (ValueError, HubError):
        folders = set()  # who loads it says what is wrong with it
    folders = folders or {name.split("/")[0] for name in names if "/" in name}
    files = sorted(name for name in names if is_loaded(name, folders))
    return Snapshot(path, None, None, tuple(files), sum((path / file).stat().st_size for file in files))


@dataclass(frozen=True)
class _Hub:
    """One repository, as one user sees it."""

    repo_id: str
    token: str | bool | None
    cache_dir: Path | None
    endpoint: str | None

    def downloaded(self, revision: str | None, max_bytes: int | None) -> Snapshot:
        """The snapshot of a revision, from the Hub where it is not cached yet."""
        from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

        where: Any = {"cache_dir": self.cache_dir, "endpoint": self.endpoint, "token": self.token}
        api = HfApi(endpoint=self.endpoint, token=self.token)
        # The revision is named: every Hub answers that, and its own default is this one.
        asked_for = revision or constants.DEFAULT_REVISION
        sha = asked_for if _SHA.fullmatch(asked_for) else api.model_info(self.repo_id, revision=asked_for).sha
        sizes = self._cached_sizes(sha) or {
            file.path: file.size for file in api.list_repo_tree(self.repo_id, recursive=True, revision=sha) if hasattr(file, "size")
        }
        refuse_without_index(self.repo_id, sizes)
        # By the name that was asked for, so that the cache knows later, offline, what it stands for.
        index = Path(hf_hub_download(self.repo_id, INDEX, revision=asked_for, **where))
        if index.parent.name != sha:
            raise HubError(f"{self.repo_id} was pushed to while it was looked at. Expected to try again.")
        files = loaded_files(self.repo_id, index.read_text(), list(sizes))
        self._refuse_large({file: sizes[file] for file in files}, sha, max_bytes)
        path = snapshot_download(self.repo_id, revision=sha, allow_patterns=[glob.escape(file) for file in files], **where)
        return Snapshot(Path(path), self.repo_id, sha, tuple(files), sum(sizes[file] for file in files))

    def cached(self, revision: str | None) -> Snapshot:
        """The snapshot of a revision, from the cache alone."""
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            self.repo_id, revision=revision, cache_dir=self.cache_dir, local_files_only=True, allow_patterns=[INDEX]
        )
        path = Path(found)
        names = list(self._cached_sizes(path.name)) or list(_of_folder(path).files)
        refuse_without_index(self.repo_id, names)
        files = loaded_files(self.repo_id, (path / INDEX).read_text(), names)
        missing = [file for file in files if not (path / file).is_file()]
        if missing:
            raise HubError(
                f"the cached copy of {self.repo_id} at {path.name} is not complete: no {missing[0]}"
                f"{f' and {len(missing) - 1} more' if missing[1:] else ''}. Expected to go online once more, to fetch the rest."
            )
        return Snapshot(path, self.repo_id, path.name, tuple(files), sum((path / file).stat().st_size for file in files))

    def _cached_sizes(self, sha: str) -> dict[str, int]:
        """Size of every file of a commit as the cache knows them; empty if it does not."""
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            return {file.path: file.size for file in get_cached_repo_tree(self.repo_id, revision=sha, cache_dir=self.cache_dir)}
        except CachedRepoTreeNotFoundError:
            return {}

    def _refuse_large(self, sizes: dict[str, int], sha: str, max_bytes: int | None) -> None:
        """Refuses what is over the limit, or over what the disk has, before it is downloaded."""
        from huggingface_hub import constants, try_to_load_from_cache

        def is_cached(file: str) -> bool:
            return isinstance(try_to_load_from_cache(self.repo_id, file, cache_dir=self.cache_dir, revision=sha), str)

        needed = sum(size for file, size in sizes.items() if not is_cached(file))
        if max_bytes is not None and needed > max_bytes:
            raise HubError(
                f"{self.repo_id} would download {_readable(needed)}, and max_bytes={max_bytes} allows {_readable(max_bytes)}. "
                "Expected a larger limit, a smaller model, or the folder of a copy that you downloaded."
            )
        place = self.cache_dir or Path(constants.HF_HUB_CACHE)
        free = shutil.disk_usage(next(p for p in [place.absolute(), *place.absolute().parents] if p.exists())).free
        if needed > free:
            raise HubError(
                f"{self.repo_id} would download {_readable(needed)}, and {place} has {_readable(free)} free. Expected more space "
                "there, or HF_HOME on another disk."
            )


def _readable(size: int) -> str:
    power = min(max(size.bit_length() - 1, 0) // 10, 4)
    return f"{size / 2 ** (10 * power):.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
