"""An audit of the bundled digits under faults and under load: what is lost, doubled or changed; memory; throughput.

    python benchmarks/audit_faults.py                   # 300 units, about ten minutes on two cores; needs Linux and root
    python benchmarks/audit_faults.py --smoke           # a few units, without the throughput

One audit runs undisturbed on one process. Another one takes its plan.json and two processes. It is killed (SIGKILL) at random
moments, most of them while a unit's file is half written; then its disk is full (the folder is on a tmpfs that is made smaller),
cannot be written (the tmpfs is remounted read-only), and both processes are interrupted (SIGINT). What comes out must be the same
files with the same bytes apart from ``run``, and no finished unit may have been written again. Then: units that raise, a model
whose weights are NaN, peak memory over the number of units, and two processes against one, in turns, each pinned to a core.
"""

import argparse
import functools
import json
import os
import platform
import random
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path

import torch
from audit_workers import INTERRUPTED, OPTIONS, STOPPED, Disk, Worker, differences, half_written, marks, units_in, wait_for
from diffusers import DDPMPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_geometry import audit_model
from diffusers_geometry.bundled import DIGITS

RESULTS = Path(__file__).parent / "results"
CORES = [min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))]


def undisturbed(folder, units):
    """One process, no fault; its peak memory in MiB."""
    worker = Worker(folder, units)
    assert worker.wait() == 0, worker.said
    return worker.said[-1]


class Disturbed:
    """An audit by two processes that is kept from finishing, again and again."""

    def __init__(self, disk, plan, units, seed):
        self.disk, self.folder, self.units, self.chance = disk, disk.path / "audit", units, random.Random(seed)
        self.folder.mkdir()
        shutil.copy(plan, self.folder)
        self.kept = {}
        self.start()

    def start(self):
        """Two new workers."""
        self.begun = len(units_in(self.folder))
        self.workers = [Worker(self.folder, self.units, core) for core in CORES]

    def check(self):
        """No finished unit was lost or written again since the last look."""
        before, self.kept = self.kept, marks(self.folder)
        changed = [name for name, mark in before.items() if self.kept.get(name) != mark]
        assert not changed, f"finished units were lost or computed again: {changed}"

    def reach(self, share):
        """Waits until this share of the units is finished, with some to spare."""
        wait_for(self.folder, max(int(share * (self.units - 8)), self.begun + 2), self.workers)

    def kills(self, count):
        """SIGKILL of one of two workers, at moments spread over the first half of the audit."""
        midst = 0
        for moment in sorted(self.chance.uniform(0.02, 0.55) for _ in range(count)):
            self.reach(moment)
            if self.chance.random() < 0.7:
                midst += half_written(self.folder)
            else:
                time.sleep(self.chance.uniform(0, 0.5))
            victim = self.chance.randrange(2)
            self.workers[victim].kill()
            self.check()
            self.workers[victim] = Worker(self.folder, self.units, CORES[victim])
        return f"{count} times, {midst} of them while a unit's file was half written"

    def stop(self, share, break_it, mend, status, word):
        """Breaks something; both workers must end with this status and say why; mends it and starts two new ones."""
        self.reach(share)
        break_it()
        statuses = [worker.wait() for worker in self.workers]
        assert statuses == [status, status], statuses
        assert all(word in " ".join(map(str, worker.said)) for worker in self.workers), [worker.said for worker in self.workers]
        mend()
        self.check()
        done = len(units_in(self.folder))
        self.start()
        return f"both workers stopped with {done} of {self.units} units finished" + (f', saying "{word}"' if word else "")

    def interrupt(self):
        """Ctrl-C for both workers."""
        for worker in self.workers:
            worker.signal(signal.SIGINT)

    def finish(self, reference):
        """Lets the workers finish, and compares."""
        statuses = [worker.wait() for worker in self.workers]
        assert statuses == [0, 0], [worker.said for worker in self.workers]
        self.check()
        differing = differences(reference, self.folder)
        assert not differing, f"the audits differ in {differing}"
        processes = json.loads((self.folder / "audit.json").read_text())["run"]["processes"]
        return f"all {self.units} units and every file the same bit for bit; finished by {processes} processes"


def faults(scratch, reference, units, kills):
    """Rows (fault, what happened) of one audit that goes through all of them."""
    with Disk(scratch / "disk") as disk:
        room = int(1.5 * statistics.mean(path.stat().st_size for path in units_in(reference)))
        run = Disturbed(disk, reference / "plan.json", units, seed=0)
        return [
            ("kill -9 of one of two workers", run.kills(kills)),
            ("disk full", run.stop(0.62, lambda: disk.fill(room), disk.free, STOPPED, "No space left on device")),
            ("read-only output", run.stop(0.74, disk.lock, disk.free, STOPPED, "Read-only file system")),
            ("Ctrl-C", run.stop(0.86, run.interrupt, lambda: None, INTERRUPTED, "")),
            ("after all of this", run.finish(reference)),
        ]


def poisoned_pipeline(seeds):
    """The bundled digits; a call with one of these seeds raises, as a prompt does that a tokenizer cannot take."""
    call = DDPMPipeline.__call__

    @functools.wraps(call)
    def poisoned(self, *args, generator=None, **kwargs):
        if generator.initial_seed() in seeds:
            raise ValueError(f"poison {generator.initial_seed()}")
        return call(self, *args, generator=generator, **kwargs)

    members = {"__call__": poisoned, "__module__": DDPMPipeline.__module__}
    return type("DDPMPipeline", (DDPMPipeline,), members).from_pretrained(DIGITS, use_safetensors=True)


def poison(scratch, units):
    """Units that raise are recorded, the others are as without them, and --retry-failed makes the audit whole."""
    bad = {1, units - 1}
    whole = audit_model(poisoned_pipeline(()), seeds=range(units), output_dir=scratch / "healthy", **OPTIONS)
    (scratch / "poisoned").mkdir()
    shutil.copy(scratch / "healthy" / "plan.json", scratch / "poisoned")
    arguments = {"seeds": range(units), "output_dir": scratch / "poisoned", **OPTIONS}
    found = audit_model(poisoned_pipeline(bad), **arguments).document["units"]
    assert {u["index"] for u in found if u["status"] == "failed"} == bad
    assert {u["error"]["message"] for u in found if u["error"]} == {f"poison {seed}" for seed in bad}
    good = [i for i in range(units) if i not in bad]
    assert [found[i] for i in good] == [whole.document["units"][i] for i in good]
    audit_model(poisoned_pipeline(()), retry_failed=True, **arguments)
    assert not differences(scratch / "healthy", scratch / "poisoned")
    return f"{len(bad)} of {units} units recorded as failed, the others bit for bit; after --retry-failed the whole audit"


def not_a_number(scratch, units):
    """A model whose weights are NaN is audited to the end; mended weights are another model."""
    shutil.copytree(DIGITS, scratch / "nan")
    path = scratch / "nan" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"].fill_(float("nan"))
    save_file(weights, path)
    arguments = {"seeds": range(units), "output_dir": scratch / "of-nan", **OPTIONS}
    document = audit_model(str(scratch / "nan"), **arguments).document
    assert [u["error"]["type"] for u in document["units"]] == ["FloatingPointError"] * units
    assert document["health"]["ok"] is False
    shutil.rmtree(scratch / "nan")
    shutil.copytree(DIGITS, scratch / "nan")
    refused = ""
    try:
        audit_model(str(scratch / "nan"), **arguments)
    except ValueError as error:
        refused = str(error)
    assert "holds another audit" in refused, "an audit was continued with other weights"
    return f"{units} of {units} units recorded as FloatingPointError, health not ok; mended weights are refused as another model"


def rate(folder, processes, units):
    """Units a second while all processes work: from when each has finished one to when the first has no more."""
    workers = [Worker(folder, units, core) for core in CORES[:processes]]
    assert [worker.wait() for worker in workers] == [0] * processes
    times = {}
    for path in units_in(folder):
        with safe_open(path, "np") as file:
            times.setdefault(json.loads(file.metadata()["run"])["process"], []).append(path.stat().st_mtime)
    assert len(times) == processes
    first, last = max(min(t) for t in times.values()), min(max(t) for t in times.values())
    return sum(first < t <= last for ts in times.values() for t in ts) / (last - first)


def throughput(scratch, units, rounds):
    """Two processes against one, in turns."""
    pairs, load = [], os.getloadavg()[0]
    for i in range(rounds):
        pairs.append([rate(scratch / f"rate-{i}-{n}", n, units) for n in (1, 2)])
        print(f"  {pairs[-1][0]:.2f} and {pairs[-1][1]:.2f} units a second, ratio {pairs[-1][1] / pairs[-1][0]:.2f}", flush=True)
    ratios = sorted(two / one for one, two in pairs)
    said = f"median of {rounds} rounds of {units} units, {ratios[0]:.2f} to {ratios[-1]:.2f}; load {load:.1f} before"
    one = statistics.median(one for one, _ in pairs)
    return f"one process {one:.2f} units a second; two processes {statistics.median(ratios):.2f} x ({said})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", choices=["faults", "throughput"], help="Of the rest earlier results are kept.")
    parser.add_argument("--work", type=Path, help="Folder of the undisturbed audit, so that it goes on after a stop.")
    parser.add_argument("--output", type=Path, help="Folder of audit_faults.md and .json; benchmarks/results if not --smoke.")
    args = parser.parse_args()
    output = args.output or (None if args.smoke else RESULTS)
    units, kills, few, counts = (24, 2, 3, ()) if args.smoke else (300, 10, 12, (30, 100))
    if args.smoke:
        OPTIONS.update(call={"num_inference_steps": 2}, record_steps=[1])
    kept = output / "audit_faults.json" if output else Path("no results")
    rows = json.loads(kept.read_text()) if args.only and kept.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        torch.set_num_threads(1)

        def said(name, text):
            rows[name] = text
            print(f"{name}: {text}", flush=True)

        if args.only != "throughput":
            reference = (args.work or scratch) / "reference"
            peaks = {units: undisturbed(reference, units)}
            for name, text in faults(scratch, reference, units, kills):
                said(name, text)
            said("a unit that raises", poison(scratch, few))
            said("a model of NaN", not_a_number(scratch, few))
            for count in counts:
                peaks[count] = undisturbed(scratch / f"of-{count}", count)
            grown = ", ".join(f"{count} units {peaks[count]:.0f} MiB" for count in sorted(peaks))
            said("peak memory of a process", grown)
            where = f"{len(set(CORES))} of {os.cpu_count()} cores, {platform.machine()}"
            said("faults and memory measured on", f"torch {torch.__version__}, both workers on {where}")
        if not args.smoke and args.only != "faults":
            said("throughput", throughput(scratch, 40, 5))
    if output is not None:
        output.mkdir(exist_ok=True)
        (output / "audit_faults.json").write_text(json.dumps(rows, indent=1) + "\n")
        title = f"# An audit under faults and load\n\n`python benchmarks/audit_faults.py`, {units} units.\n"
        table = ["| what | result |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows.items())]
        (output / "audit_faults.md").write_text("\n".join([title, *table]) + "\n")


if __name__ == "__main__":
    main()
