"""Commands in a namespace that has no network but the loopback.

    unshare ... python -m tests.gateway.agents.alone FOLDER COMMAND [ARGUMENT ...]

replaces itself with the command there. FOLDER is for files of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

AGENTS = Path(os.environ.get("MILLRACE_AGENTS", "no-agents"))  # as `make test-agents` sets it
ALONE = ["unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]


def missing() -> str | None:
    """Returns why the tests of agents can't run here."""
    if not (AGENTS / "node_modules").is_dir():
        return "no agents are installed: make test-agents"
    if shutil.which("unshare") is None or subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        return "this user may not make namespaces (unshare)"
    return None


REASON = missing()
NEEDS_AGENTS = pytest.mark.skipif(REASON is not None, reason=REASON or "")


def isolate(folder: Path) -> None:
    """Prepares the namespace: its loopback, and a server of names of its own."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    file = folder / "resolv.conf"
    file.write_text("nameserver 127.0.0.1\noptions attempts:1 timeout:1\n")
    subprocess.run(["mount", "--bind", str(file), str(Path("/etc/resolv.conf").resolve())], check=True)


if __name__ == "__main__":
    isolate(Path(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
