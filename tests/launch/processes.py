"""The processes of this machine, by their command lines."""

import os
from pathlib import Path


def processes_with(text: str, *, without: str = "\0") -> list[int]:
    """Returns the processes, other than this one, whose command line has the one text and not the other."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has ended
            if text in command and without not in command and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def variables_of(pid: int) -> dict[str, str]:
    """The environment of a process."""
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def alive(pid: int) -> bool:
    """Whether a process runs: it exists, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
