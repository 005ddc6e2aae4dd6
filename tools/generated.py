"""Files that a program generates."""

import sys
from pathlib import Path


def write_or_check(target: Path, text: str) -> int:
    """Write a generated file or, with `--check` on the command line, say whether it is as it should be.

    Returns the exit status of the program.
    """
    if "--check" not in sys.argv[1:]:
        target.write_text(text)
        return 0
    if target.exists() and target.read_text() == text:
        return 0
    print(f"{target} is not up to date; run python {sys.argv[0]}", file=sys.stderr)
    return 1
