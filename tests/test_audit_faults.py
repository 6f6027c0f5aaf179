"""The benchmark of an audit under faults runs, with few units: killed, full, read-only, interrupted, it comes out the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "audit_faults.py"


def test_an_audit_goes_through_every_fault_unchanged(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(BENCHMARK), "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    table = (tmp_path / "audit_faults.md").read_text()
    said = dict(re.findall(r"^\| (.*?) \| (.*) \|$", table, re.MULTILINE))
    assert said["kill -9 of one of two workers"].startswith("2 times, ")
    assert "No space left on device" in said["disk full"]
    assert "Read-only file system" in said["read-only output"]
    assert said["after all of this"].startswith("all 24 units and every file the same bit for bit")
    assert said["a unit that raises"].startswith("2 of 3 units recorded as failed")
    assert said["a model of NaN"].startswith("3 of 3 units recorded as FloatingPointError, health not ok")
