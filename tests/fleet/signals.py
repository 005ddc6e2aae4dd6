"""Signals to the engine processes of a fleet."""

import os
import signal
from pathlib import Path

from millrace.fleet.fleet import Fleet
from millrace.launch.process import ServerProcess


def kill_engine(fleet: Fleet, name: str) -> None:
    send_signal(fleet, name, signal.SIGKILL)


def send_signal(fleet: Fleet, name: str, number: signal.Signals) -> None:
    """Sends a signal to the engine's own process, which is the only child of its guard."""
    process = fleet.replicas.by_name[name].process
    assert isinstance(process, ServerProcess)
    guard = process._process.pid
    [engine] = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
    os.kill(int(engine), number)
