"""A sidecar on this host, for the benchmarks that need one."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sidecar(device: str) -> Iterator[str]:
    """Starts a sidecar and yields its URL, for publish.transport ucx."""
    command = [sys.executable, "-m", "millrace", "sidecar", "--device", device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[0]
        finally:
            process.kill()
