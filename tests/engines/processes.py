"""The processes that a test has started, and their logs."""

import stat
import time
from pathlib import Path


def processes() -> dict[int, int]:
    """Returns the parent of every living process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended meanwhile
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    return parents


def below(ancestor: int) -> set[int]:
    parents = processes()
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {ancestor}


def until_ended(pids: set[int], deadline: float) -> None:
    end = time.monotonic() + deadline
    while alive := pids & processes().keys():
        assert time.monotonic() < end, f"{alive} live on"
        time.sleep(0.05)


def command_lines(pids: set[int]) -> str:
    return "".join(Path(f"/proc/{pid}/cmdline").read_text(errors="replace") for pid in pids)


def logs(folder: Path) -> dict[str, str]:
    """Returns every log by its name. Other users must not be able to read them."""
    found = {}
    for path in folder.glob("*.log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        found[path.name] = path.read_text()
    return found
