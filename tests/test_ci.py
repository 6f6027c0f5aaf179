"""What `.ci/run` says where it cannot do its work; it runs as a copy beside nothing."""

import shutil
import subprocess
from pathlib import Path

RUN = Path(__file__).parent.parent / ".ci" / "run"


def test_without_chromium_and_without_root_it_says_what_to_do_and_changes_nothing(tmp_path):
    tools, copy = tmp_path / "bin", tmp_path / "repository" / ".ci" / "run"
    copy.parent.mkdir(parents=True)
    tools.mkdir()
    (copy.parent.parent / ".venv").mkdir()
    shutil.copy(RUN, copy)
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "id").write_text("#!/bin/sh\necho 1000\n".replace("/bin/sh", shutil.which("bash")))
    (tools / "id").chmod(0o755)
    done = subprocess.run([shutil.which("bash"), copy], env={"PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "run 'apt-get install chromium' as root first, or .ci/run itself as root" in done.stderr
    assert done.stdout == ""
    assert (copy.parent.parent / ".venv").exists()
