"""A sidecar on this host, for the benchmarks that need one."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sidecar(*arguments: str) -> Iterator[str]:
    """Starts a sidecar with these arguments and yields its URL."""
    command = [sys.executable, "-m", "millrace", "sidecar", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[0]
        finally:
            process.kill()
