"""Who works on what, among processes that share a folder and nothing else: started together, by hand, or on several machines.

A claim on ``name`` is a file ``name.0`` that only one process can create (O_CREAT | O_EXCL). Its owner touches it every
``HEARTBEAT`` seconds. It is *dead* when its process is known to be gone (same machine, same processes in sight) or to have given it
up, or when nobody touched it for ``STALE`` seconds of the folder's own clock. A dead claim is never removed by those who want it,
which would be a race; the next claim is ``name.1``, and again only one process can create it. The claim with the highest number
counts.

A process that was only suspended may come back to a name that another took over. So what is done under a claim must be the same
whoever does it, and must be put in place whole: then such a name costs time and nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

HEARTBEAT = 5.0  # seconds between two touches
STALE = 60.0  # seconds without a touch after which an owner out of sight counts as dead


_OWN: set[Path] = set()  # claims that this process holds: it may live when an interrupted audit's claims do not
_LOCK = threading.Lock()  # among threads of this process


class Claims:
    """The claims of one process in one folder.

    Args:
        folder: Where the claims of all processes are; made when it is needed.

    Attributes:
        token: What tells this process's files from those of all others, in letters, digits and dashes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._held: dict[str, Path] = {}
        self._stop = threading.Event()

    def take(self, name: str) -> bool:
        """Claims ``name``; False while another process, or another of these objects, holds it."""
        with _LOCK:
            latest = max(self._numbers(name), default=-1)
            if latest >= 0 and self._is_alive(self._path(name, latest)):
                return False
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._create(name, self._path(name, latest + 1))

    def _create(self, name: str, path: Path) -> bool:
        """Makes the claim's file; False if another process was faster."""
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"token": self.token, "pid": os.getpid(), "born": _born(os.getpid()), "where": _where()}, file)
            if not self._held:
                self._stop = threading.Event()
                threading.Thread(target=self._beat, args=(self._stop,), daemon=True).start()
            self._held[name] = path
            _OWN.add(path.absolute())
        except BaseException:
            self._held.pop(name, None)
            _OWN.discard(path.absolute())
            self._stop.set()
            path.unlink(missing_ok=True)
            raise
        return True

    def release(self, name: str) -> None:
        """Gives ``name`` up, and removes what dead processes left of it before this claim; a later one is somebody else's."""
        path = self._held.pop(name)
        _OWN.discard(path.absolute())  # from here on it counts as dead, whatever interrupts this
        if not self._held:
            self._stop.set()
        mine = int(path.suffix[1:])
        for number in (n for n in self._numbers(name) if n <= mine):
            try:
                self._path(name, number).unlink(missing_ok=True)
            except OSError:  # where nothing can be removed any more, the claim is dead when this process is
                return

    def forget(self, is_over: Callable[[str], bool]) -> None:
        """Removes what dead processes left of names that nobody will claim again."""
        for path in self.folder.glob("*.*") if self.folder.is_dir() else ():
            if is_over(path.stem) and path.stem not in self._held:
                path.unlink(missing_ok=True)

    def living(self) -> set[str]:
        """The tokens of all processes that hold a claim."""
        found = [path for path in self.folder.glob("*.*")] if self.folder.is_dir() else []
        return {said["token"] for path in found if (said := _read(path)) and self._is_alive(path)}

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}.{number}"

    def _numbers(self, name: str) -> list[int]:
        return [int(path.suffix[1:]) for path in self.folder.glob(f"{name}.*") if path.suffix[1:].isdigit()]

    def _is_alive(self, path: Path) -> bool:
        said = _read(path)
        if said and said["where"] == _where():
            if said["pid"] == os.getpid():
                return path.absolute() in _OWN
            if _born(said["pid"]) != said["born"]:
                return False
        try:
            return self._now() - path.stat().st_mtime < STALE
        except FileNotFoundError:  # given up at this moment: whoever looks again finds it free, and only one does
            return True

    def _now(self) -> float:
        """The folder's clock, which may be another machine's."""
        with tempfile.NamedTemporaryFile(dir=self.folder) as file:
            return os.stat(file.name).st_mtime

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT):
            for path in list(self._held.values()):
                try:
                    os.utime(path)
                except OSError:  # a claim that cannot be touched becomes stale, and another process takes it over
                    continue


def _read(path: Path) -> dict | None:
    """What a claim says; None for one that is being written, or was cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _where() -> str:
    """What two processes must share to see one another's ids: machine, its start, and the table of processes."""
    parts = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if path.startswith("/proc/self") else Path(path).read_text().strip())
        except OSError:
            parts.append(f"unknown {os.getpid()}")  # never the same as another process's: its heartbeat decides
    return " ".join(parts)


def _born(pid: int) -> str | None:
    """When a process started, in the kernel's own ticks; None for one that is gone, or where this is not told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
