"""For audit_faults.py: worker processes of an audit, a disk that fills up or turns read-only, and what two audits differ by.

Workers are forked from a process that has loaded everything, so that faults come in quick succession.
"""

import contextlib
import json
import multiprocessing
import os
import queue
import resource
import signal
import subprocess
import time

import torch
from safetensors import safe_open

from diffusers_geometry import audit_model
from diffusers_geometry.audit_folder import AuditStopped

FORK = multiprocessing.get_context("fork")
OPTIONS = {"call": {"num_inference_steps": 4}, "record_steps": [2], "progress": False}
STOPPED, INTERRUPTED = 3, 130


def work(folder, units, core, said, options):
    """What a worker process does; exits with 0, STOPPED (the folder cannot be written) or INTERRUPTED."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would their children
    try:
        if core is not None:
            os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
        audit_model(None, seeds=range(units), output_dir=folder, **OPTIONS | options)
        status = 0
    except AuditStopped as error:
        said.put(str(error))
        status = STOPPED
    except KeyboardInterrupt:
        status = INTERRUPTED
    said.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    said.close()
    said.join_thread()
    os._exit(status)


class Worker:
    """A process that works on an audit.

    Attributes:
        said: What it told: why it stopped, and its peak memory in MiB.
    """

    def __init__(self, folder, units, core=None, **options):
        self.queue, self.said = FORK.Queue(), []
        self.process = FORK.Process(target=work, args=(folder, units, core, self.queue, options), daemon=True)
        self.process.start()

    def signal(self, number):
        """Sends it a signal."""
        os.kill(self.process.pid, number)

    def kill(self):
        """SIGKILL; returns when it is gone."""
        self.signal(signal.SIGKILL)
        self.process.join()

    def wait(self):
        """Its exit status."""
        while self.process.is_alive():
            self._read()
        self.process.join()
        self._read()
        return self.process.exitcode

    def _read(self):
        with contextlib.suppress(queue.Empty):
            self.said.append(self.queue.get(timeout=0.05))


class Disk:
    """A small file system of its own (tmpfs), which can be made full and read-only; needs root."""

    def __init__(self, path):
        self.path = path
        path.mkdir()

    def __enter__(self):
        self.mount("-t", "tmpfs", "-o", "size=512m", "tmpfs")
        return self

    def __exit__(self, *exception):
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    def mount(self, *options):
        """Mounts it, or changes how it is mounted."""
        subprocess.run(["mount", *options, str(self.path)], check=True, capture_output=True)

    def fill(self, room):
        """Leaves so many bytes."""
        state = os.statvfs(self.path)
        self.mount("-o", f"remount,size={(state.f_blocks - state.f_bfree) * state.f_frsize + room}")

    def lock(self):
        """Makes it read-only, at a moment when no file is being written."""
        while True:
            try:
                return self.mount("-o", "remount,ro")
            except subprocess.CalledProcessError:  # busy
                time.sleep(0.001)

    def free(self):
        """Makes it large and writable again."""
        self.mount("-o", "remount,rw,size=512m")


def units_in(folder):
    return sorted((folder / "units").glob("[0-9]*"))


def wait_for(folder, count, workers):
    """Waits until so many units are finished."""
    while len(units_in(folder)) < count:
        for worker in workers:
            if not worker.process.is_alive():
                raise RuntimeError(f"a worker ended with {worker.wait()} before {count} units were finished: {worker.said}")
        time.sleep(0.01)


def half_written(folder):
    """Whether a file came in sight that is being written; gives up after two more units."""
    count = len(units_in(folder))
    while True:
        names = os.listdir(folder / "units")
        if any(name.startswith(".") for name in names):
            return True
        if len(names) > count + 2:
            return False


def marks(folder):
    """What the file of a unit would not keep if it were written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in units_in(folder)}


def differences(first, second):
    """Names of files that two audits do not share byte for byte; plan.json, and what stands under ``run``, apart."""
    ours, theirs = _contents(first), _contents(second)
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


def _contents(folder):
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "plan.json"):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":  # audit.json, and units that failed
            found[name] = json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "run"})
        elif name.startswith("units/"):
            with safe_open(path, "np") as file:
                found[name] = file.metadata()["unit"], [(k, file.get_tensor(k).tobytes()) for k in sorted(file.keys())]
        else:
            found[name] = path.read_bytes()
    return found
