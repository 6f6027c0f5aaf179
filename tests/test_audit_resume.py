"""Killed, interrupted, out of space, shared: an audit goes on, and then it is the undisturbed one bit for bit."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from audit_tiny import assert_same, audit_vectors, run_vectors, vector_pipeline, workers

from diffusers_geometry import Audit
from diffusers_geometry import claims as claims_module
from diffusers_geometry.audit_folder import AuditFolder, AuditStopped
from diffusers_geometry.claims import Claims

COUNT = 18


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return audit_vectors(tmp_path_factory.mktemp("whole") / "audit", COUNT)


@pytest.fixture
def started(whole, tmp_path):
    """A folder with the plan of the undisturbed audit, so that timings in it are the same."""
    (tmp_path / "audit").mkdir()
    shutil.copy(whole.folder / "plan.json", tmp_path / "audit")
    return tmp_path / "audit"


def units(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "units").glob("*.safetensors")}


def until(condition, what, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.004)


def start(folder, **options):
    process = workers().Process(target=run_vectors, args=(str(folder), {"count": COUNT, **options}))
    process.start()
    return process


def test_killed_at_any_moment_nothing_is_lost_or_computed_again(whole, started):
    """Killed before the first unit, three times between, and while the summary is written."""
    kept = {}
    for least, delay in ((0, 0.0), (1, 0.0), (9, 0.031), (COUNT, 0.0)):
        process = start(started)
        if least == 0:
            until(lambda: (started / "claims").exists(), "no claim was made")
        until(lambda least=least: len(units(started)) >= least, f"no {least} units")
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = units(started)
        assert least <= len(found) <= COUNT
        assert kept.items() <= found.items(), "a finished unit was computed again"
        kept = found
    (started / "units" / ".00017.safetensors.123-abc.partial").write_bytes(b"cut short")
    (started / "claims" / "00000.3").write_text("")  # as of a process that was killed after its unit was written
    audit = audit_vectors(started, COUNT)
    assert kept.items() <= units(started).items()
    assert_same(whole.folder, started)
    assert {p.name for p in started.iterdir()} == {p.name for p in whole.folder.iterdir()}
    assert sorted(p.name for p in (started / "units").iterdir()) == [f"{i:05d}.safetensors" for i in range(COUNT)]
    assert list((started / "claims").iterdir()) == []
    assert audit.document["run"]["processes"] > 1


def test_two_processes_started_by_hand_share_the_units(whole, started):
    processes = [start(started), start(started)]
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert_same(whole.folder, started)
    run = Audit.from_folder(started).document["run"]
    assert run["processes"] == 2
    assert list((started / "claims").iterdir()) == []


def test_a_unit_that_another_finishes_meanwhile_is_left(whole, started, monkeypatch):
    """Between the look and the claim: it is not computed again."""
    take = AuditFolder.take

    def late(folder, name):
        if name.isdigit():
            (started / "units").mkdir(exist_ok=True)
            shutil.copy(whole.folder / "units" / f"{name}.safetensors", started / "units")
        return take(folder, name)

    monkeypatch.setattr(AuditFolder, "take", late)
    audit_vectors(started, COUNT)
    assert Audit.from_folder(started).document["run"]["unit_seconds"] == whole.document["run"]["unit_seconds"]
    assert_same(whole.folder, started)


def test_a_launch_of_two_processes(whole, started, tmp_path):
    """torchrun, which accelerate launch is on accelerators: both take part, each unit is computed once, by one of them."""
    script = tmp_path / "run.py"
    script.write_text(f"from audit_tiny import run_vectors\nrun_vectors({str(started)!r}, {{'count': {COUNT}}})\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(launch, check=True, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert_same(whole.folder, started)
    folder = AuditFolder(started)
    made_by = [folder.read_unit(i)[1]["process"] for i in range(COUNT)]
    assert len(set(made_by)) == 2
    assert made_by[0] != made_by[1]


def test_interrupted_by_the_keyboard(whole, started):
    process = start(started)
    until(lambda: len(units(started)) >= 3, "no 3 units")
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode not in (0, None)
    before = units(started)
    assert len(before) < COUNT
    assert Claims(started / "claims").living() == set()
    assert not list(started.rglob("*.partial"))
    audit_vectors(started, COUNT)
    assert before.items() <= units(started).items()
    assert_same(whole.folder, started)


def test_interrupted_in_a_session_that_goes_on(whole, started):
    """As in a notebook: the process lives, its claims do not."""
    pipe, seen = vector_pipeline(), []

    def interrupt(*_):
        seen.append(len(units(started)))
        if seen[-1] == 5:
            raise KeyboardInterrupt

    hook = pipe.network.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        audit_vectors(started, COUNT, pipe=pipe)
    hook.remove()
    assert len(units(started)) == 5
    audit_vectors(started, COUNT, pipe=pipe)
    assert_same(whole.folder, started)


def limited(folder, size, result):
    """A worker that may write files of ``size`` bytes: the disk is full in the middle of one."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        audit_vectors(folder, COUNT)
    except AuditStopped as error:
        os.write(result, str(error).encode())


@pytest.mark.parametrize("size", [1500, 9000])
def test_no_space_left(whole, started, size, tmp_path):
    """The first unit does not fit, or the summary does not: one line says so, nothing half written is left, and it goes on."""
    (tmp_path / "said").touch()
    process = workers().Process(target=_limited_to_file, args=(str(started), size, str(tmp_path / "said")))
    process.start()
    process.join()
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"cannot write {started}/"), said
    assert "The units that are finished are kept. Expected a folder with free space" in said
    assert "\n" not in said
    assert len(units(started)) == (0 if size == 1500 else COUNT)
    assert not list(started.rglob("*.partial"))
    audit_vectors(started, COUNT)
    assert_same(whole.folder, started)


def _limited_to_file(folder, size, path):
    descriptor = os.open(path, os.O_WRONLY)
    limited(folder, size, descriptor)


def test_a_full_disk(whole, tmp_path):
    """A file system of 100 kB, where mounting one is permitted: ENOSPC itself."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        shutil.copy(whole.folder / "plan.json", disk)
        with pytest.raises(AuditStopped, match="No space left on device"):
            audit_vectors(disk, COUNT)
        kept = units(disk)
        assert 0 < len(kept) < COUNT
        assert not list(disk.rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(AuditStopped, match="Read-only file system"):
            audit_vectors(disk, COUNT)
        subprocess.run(["mount", "-o", "remount,rw,size=4m", str(disk)], check=True)
        audit_vectors(disk, COUNT)
        assert kept.items() <= units(disk).items()
        assert_same(whole.folder, disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "audit").write_text("no folder")
    with pytest.raises(AuditStopped, match=r"cannot write .*audit/claims: Not a directory"):
        audit_vectors(tmp_path / "audit", 2)


def test_a_damaged_unit_is_named(whole, started):
    shutil.copytree(whole.folder, started, dirs_exist_ok=True)
    path = started / "units" / "00003.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    (started / "audit.json").unlink()
    with pytest.raises(ValueError, match=r"00003.safetensors cannot be read.*delete the file to compute it again"):
        audit_vectors(started, COUNT)
    path.unlink()
    audit_vectors(started, COUNT)
    assert_same(whole.folder, started)


def test_memory_does_not_grow_with_units(tmp_path):
    """Resident memory after 30 and after 150 units."""
    import gc

    pipe, sizes = vector_pipeline(), []
    audit_vectors(tmp_path / "first", 20, pipe=pipe)
    for count in (30, 150):
        gc.collect()
        audit_vectors(tmp_path / str(count), count, pipe=pipe, record_steps=1, scores=())
        sizes.append(_resident())
    assert sizes[1] - sizes[0] < 6 * 2**20, f"{(sizes[1] - sizes[0]) / 2**20:.1f} MiB more for 120 more units"


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_only_one_of_many_gets_a_claim(tmp_path):
    """8 threads, each with claims of its own, 20 times each: never two at once."""
    inside, worst, done = [0], [0], [0]
    lock = threading.Lock()

    def worker(claims):
        mine = 0
        while mine < 20:
            if claims.take("unit"):
                with lock:
                    inside[0] += 1
                    worst[0] = max(worst[0], inside[0])
                time.sleep(0.0005)
                with lock:
                    inside[0] -= 1
                    done[0] += 1
                claims.release("unit")
                mine += 1
            time.sleep(0.001)

    threads = [threading.Thread(target=worker, args=(Claims(tmp_path),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (worst[0], done[0]) == (1, 160)
    assert list(tmp_path.iterdir()) == []


def claim_often(folder, inside, result):
    """A process that claims 40 times and says how often another was inside."""
    claims, violations = Claims(Path(folder)), 0
    for _ in range(40):
        while not claims.take("unit"):
            time.sleep(0.001)
        try:
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            violations += 1
        time.sleep(0.0003)
        Path(inside).unlink(missing_ok=True)
        claims.release("unit")
    Path(result).write_text(str(violations))


def test_only_one_of_several_processes_gets_a_claim(tmp_path):
    places = [(str(tmp_path / "claims"), str(tmp_path / "inside"), str(tmp_path / f"result-{i}")) for i in range(4)]
    processes = [workers().Process(target=claim_often, args=place) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [Path(result).read_text() for _, _, result in places] == ["0"] * 4


def test_a_claim_outlives_its_process_only_until_that_is_known(tmp_path):
    """On this machine a dead owner is seen at once; elsewhere its heartbeat tells."""
    code = "import sys, os; from pathlib import Path; from diffusers_geometry.claims import Claims\n"
    code += f"assert Claims(Path({str(tmp_path)!r})).take('unit'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["unit.0"]
    claims = Claims(tmp_path)
    assert claims.take("unit")
    assert {p.name for p in tmp_path.iterdir()} == {"unit.0", "unit.1"}
    assert claims.living() == {claims.token}
    claims.release("unit")
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_was_given_up_is_dead_in_a_process_that_is_not(tmp_path, monkeypatch):
    """Interrupted while it was removed."""
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.take("unit")
    assert not second.take("unit")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            first.release("unit")
    assert [p.name for p in tmp_path.iterdir()] == ["unit.0"]
    assert second.take("unit")
    second.release("unit")


def test_a_claim_of_another_machine_is_alive_while_it_is_touched(tmp_path):
    path = tmp_path / "unit.0"
    path.write_text(json.dumps({"token": "elsewhere", "pid": 1, "born": "5", "where": "another machine"}))
    claims = Claims(tmp_path)
    assert not claims.take("unit")
    assert claims.living() == {"elsewhere"}
    old = time.time() - claims_module.STALE - 5
    os.utime(path, (old, old))
    assert claims.living() == set()
    assert claims.take("unit")
    other = Claims(tmp_path)
    assert not other.take("unit")
    path.write_text("")  # cut short as it was created: nobody's word, so its age decides
    claims.release("unit")
    path.write_text("")
    assert not other.take("unit")


def test_a_held_claim_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "HEARTBEAT", 0.02)
    claims = Claims(tmp_path)
    assert claims.take("unit")
    path = tmp_path / "unit.0"
    os.utime(path, (0, 0))
    until(lambda: path.stat().st_mtime > 0, "no heartbeat", 10)
    claims.release("unit")
    claims.take("again")
    os.utime(tmp_path / "again.0", (0, 0))
    until(lambda: (tmp_path / "again.0").stat().st_mtime > 0, "no heartbeat after a release", 10)
    claims.release("again")
