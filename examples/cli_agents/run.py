"""Runs a command line agent on the task in row.json, and writes to reward.json whether the row's test passes.

    python run.py COMMAND [ARGUMENT ...]

Variables in the arguments, such as $MILLRACE_PROMPT, are replaced by their values. The agent works in an empty folder,
and the test is in no file meanwhile. The exit status is the agent's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

TEST_SECONDS = 60


def passes(test: str, work: Path) -> bool:
    try:
        return subprocess.run([sys.executable, "-c", test], cwd=work, timeout=TEST_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main() -> int:
    row, work = Path("row.json"), Path("work")
    test = json.loads(row.read_text())["test"]
    row.unlink()
    work.mkdir()
    command = [os.path.expandvars(word) for word in sys.argv[1:]]
    status = subprocess.run(command, cwd=work, stdin=subprocess.DEVNULL).returncode
    Path("reward.json").write_text(json.dumps(float(passes(test, work))))
    return status


if __name__ == "__main__":
    sys.exit(main())
