"""Memory that torch shares by name, and the files that torch's helper process keeps open."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARE = """
import os, sys
from millrace.weights.transports.torch_storage import SharedStorage
reading, writing = os.pipe()
os.set_inheritable(writing, True)  # as are a process group's connections
storage = SharedStorage(64)
print(storage.manager.decode(), file=sys.stderr)
holders = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    except OSError:
        continue
    if held & {os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2, writing)}:
        holders.append(open(f"/proc/{pid}/comm").read().strip())
assert os.get_inheritable(writing)
print(holders)
"""


@pytest.mark.parametrize("length", [0, 90])
def test_the_helper_holds_no_file_of_ours_and_starts_below_any_tmpdir(length: int, tmp_path: Path) -> None:
    place = tmp_path / ("x" * length)
    place.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", SHARE],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TMPDIR": str(place)},
    )
    assert done.returncode == 0, done.stderr
    assert "manager.sock" in done.stderr
    assert "shm" not in done.stdout
    assert "python" in done.stdout
