"""A server that outlives its launcher: as long as a process claims it, until another one ends it."""

import asyncio
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from millrace.launch.claims import claimed
from millrace.launch.process import ServerProcess
from millrace.launch.takeover import TakenOver, start_of
from tests.launch.test_process import alive, wait_until

CLAIM = f"millrace-test-{os.getpid()}"
LAUNCH = """
    import asyncio, sys
    from pathlib import Path
    from millrace.launch.process import ServerProcess

    async def main():
        process = await ServerProcess.start("kept", ["sleep", "600"], Path(sys.argv[1]))
        await process.keep(sys.argv[2], float(sys.argv[3]))
        print(process.pid, flush=True)
        await asyncio.sleep(600)

    asyncio.run(main())
"""


def launch_and_die(log: Path, seconds: float) -> tuple[int, str]:
    """Start a server in a process that is killed. Return the guard's id and start."""
    command = [sys.executable, "-c", textwrap.dedent(LAUNCH), str(log), CLAIM, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        started = start_of(pid)
        launcher.kill()
    assert started is not None
    return pid, started


async def test_a_server_runs_on_while_its_claim_is_held_and_ends_after_it(tmp_path: Path) -> None:
    with claimed(CLAIM, str):
        pid, started = launch_and_die(tmp_path / "log", 0.5)
        server = TakenOver.find("kept", pid, started, tmp_path / "log")
        assert server is not None
        with pytest.raises(TimeoutError):  # it is orphaned for longer than it may be without an owner
            async with asyncio.timeout(2.0):
                await server.wait()
        assert server.describe_end() == "kept runs"
    async with asyncio.timeout(30):
        await server.wait()
    assert not server.running
    await server.end()
    assert server.describe_end() == "kept ended"
    assert not alive(pid)


async def test_another_process_ends_it_in_order(tmp_path: Path) -> None:
    pid, started = launch_and_die(tmp_path / "log", 600.0)
    assert TakenOver.find("another", pid, f"{started}0", tmp_path / "log") is None
    server = TakenOver.find("kept", pid, started, tmp_path / "log")
    assert server is not None
    watching = asyncio.create_task(server.wait())
    await server.end()
    await server.end()
    await watching
    wait_until(lambda: not alive(pid))
    assert TakenOver.find("kept", pid, started, tmp_path / "log") is None
    assert str(tmp_path / "log") in server.log_tail()


async def test_its_launcher_ends_it_at_once(tmp_path: Path) -> None:
    process = await ServerProcess.start("kept", ["sleep", "600"], tmp_path / "log")
    await process.keep(CLAIM, 600.0)
    async with asyncio.timeout(30):
        await process.end()
    assert not process.running
