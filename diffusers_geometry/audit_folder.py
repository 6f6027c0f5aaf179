"""The folder of an audit: its plan, one file a unit, and nothing that is half written (docs/audit.md lists the files).

Every file is written beside its place under a name that carries its writer's token, forced to the disk and renamed. So a file that
is there is whole, a process that is killed leaves at most a partial file of its own, and the next one to come removes it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .claims import Claims

PLAN, AUDIT, SPECTRA, REFERENCE = "plan.json", "audit.json", "spectra.safetensors", "reference.json"
POLL = 0.1  # seconds between two looks at what another process holds


class AuditStopped(RuntimeError):
    """The folder cannot be written (full, read-only, no permission); what is finished is kept."""


class AuditFolder:
    """The files of one audit.

    Args:
        path: The folder; made when the first file is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.claims = Claims(self.path / "claims")

    def unit_path(self, i: int) -> Path:
        """Of a finished unit."""
        return self.path / "units" / f"{i:05d}.safetensors"

    def failure_path(self, i: int) -> Path:
        """Of a unit that failed."""
        return self.path / "units" / f"{i:05d}.failed.json"

    def take(self, name: str) -> bool:
        """Claims a name, see :mod:`.claims`; False while another process holds it.

        Raises:
            AuditStopped: the folder cannot be written.
        """
        try:
            return self.claims.take(name)
        except OSError as error:
            raise self.stopped(error, self.claims.folder) from error

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Waits until a name can be claimed, holds it inside, gives it up on leaving."""
        while not self.take(name):
            time.sleep(POLL)
        try:
            yield
        finally:
            self.claims.release(name)

    def state(self, i: int) -> str | None:
        """ "done", "failed", or None for a unit that is still to be computed."""
        return "done" if self.unit_path(i).exists() else "failed" if self.failure_path(i).exists() else None

    def path_of(self, i: int) -> Path:
        """The file of a unit that is done or failed."""
        return self.unit_path(i) if self.unit_path(i).exists() else self.failure_path(i)

    def forget_failures(self, count: int) -> None:
        """Units that failed are then to be computed again."""
        for i in range(count):
            _unlink(self.failure_path(i))

    def finished(self, count: int) -> int:
        """How many of the first ``count`` units are done or failed."""
        return sum(self.state(i) is not None for i in range(count))

    def write(self, name: str, data: bytes) -> None:
        """Writes ``name`` whole or not at all; see :meth:`write_chunks`."""
        self.write_chunks(name, [data])

    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> None:
        """Writes ``name`` whole or not at all, piece by piece.

        Raises:
            AuditStopped: the folder cannot be written.
        """
        path = self.path / name
        partial = path.parent / f".{path.name}.{self.claims.token}.partial"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise self.stopped(error, path) from error
        finally:
            _unlink(partial)

    def stopped(self, error: OSError, path: Path) -> AuditStopped:
        """The error for a file that could not be written."""
        return AuditStopped(
            f"cannot write {path}: {os.strerror(error.errno) if error.errno else error}. The units that are finished are kept. "
            "Expected a folder with free space that can be written: run the same again to continue."
        )

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """Writes a JSON document; NaN and infinity are refused."""
        self.write(name, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())

    def write_unit(self, i: int, arrays: dict[str, np.ndarray], unit: dict[str, Any], run: dict[str, Any]) -> None:
        """Writes a finished unit: its arrays, what it found, and what would differ if it were computed again."""
        said = {"unit": json.dumps(unit, allow_nan=False), "run": json.dumps(run, allow_nan=False)}
        self.write(
            str(self.unit_path(i).relative_to(self.path)), save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, said)
        )

    def write_failure(self, i: int, error: dict[str, Any], run: dict[str, Any]) -> None:
        """Writes the error of a unit."""
        self.write_json(str(self.failure_path(i).relative_to(self.path)), {"error": error, "run": run})

    def read_unit(self, i: int, *names: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
        """(unit, run, arrays of these names where the unit has them) of a finished unit."""
        with self._opened(i) as file:
            said, kept = file.metadata() or {}, set(file.keys())
            return json.loads(said["unit"]), json.loads(said["run"]), {n: file.get_tensor(n) for n in names if n in kept}

    @contextmanager
    def _opened(self, i: int) -> Iterator[Any]:
        """The file of a finished unit; ValueError with its name for a damaged one."""
        try:
            with safe_open(self.unit_path(i), "np") as file:
                yield file
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.unit_path(i)} cannot be read ({error}). Expected a whole unit; delete the file to compute it again."
            ) from error

    def shape(self, i: int, name: str) -> tuple[int, ...]:
        """Of an array of a finished unit."""
        with self._opened(i) as file:
            return tuple(file.get_slice(name).get_shape())

    def read_failure(self, i: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """(error, run) of a unit that failed."""
        document = read_json(self.failure_path(i))
        return document["error"], document["run"]

    def read_plan(self) -> dict[str, Any]:
        """What the folder's audit is of; raises FileNotFoundError where there is none."""
        if not (self.path / PLAN).is_file():
            raise FileNotFoundError(f"{self.path} holds no {PLAN}. Expected a folder that an audit wrote.")
        return read_json(self.path / PLAN)

    def clean(self) -> None:
        """Removes what killed processes left: files that are half written, claims of what is finished."""
        try:
            self.claims.forget(self._is_over)
        except OSError as error:
            raise self.stopped(error, self.claims.folder) from error
        partials = list(self._partials())
        living = self.claims.living() if partials else set()
        for partial in partials:
            if partial.name.split(".")[-2] not in living:
                _unlink(partial)

    def _is_over(self, name: str) -> bool:
        return (self.path / PLAN).exists() if name == "plan" else name.isdigit() and self.state(int(name)) is not None

    def _partials(self) -> Iterator[Path]:
        for folder in (self.path, self.path / "units", self.path / "images"):
            yield from folder.glob(".*.partial")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON document; ValueError with its name for a damaged one."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Expected what an audit wrote.") from error


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a folder that cannot be written cannot be cleaned; the next run does it
        return
