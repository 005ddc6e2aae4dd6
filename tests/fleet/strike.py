"""Engines of a fleet that are killed, or stopped in the middle."""

import os
import signal
from pathlib import Path

from millrace.fleet.fleet import Fleet
from millrace.launch.process import ServerProcess


def strike(fleet: Fleet, name: str, number: signal.Signals = signal.SIGKILL) -> None:
    """A signal to the engine's own process, which is its guard's only child."""
    process = fleet.replicas.by_name[name].process
    assert isinstance(process, ServerProcess)
    guard = process._process.pid
    [engine] = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
    os.kill(int(engine), number)
