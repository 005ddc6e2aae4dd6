"""Commands of agents as processes: their limits, and that nothing of them is left."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from millrace.agents import AgentCommand, LocalRunner
from millrace.errors import LaunchError
from tests.launch.test_process import STUBBORN_TREE, alive, read_pids, wait_until


def command(folder: Path, *words: str, **changes: Any) -> AgentCommand:
    environment = {"PATH": os.environ["PATH"]}
    return AgentCommand("sample", words, folder, environment, folder / "agent.log", **changes)


def python(folder: Path, code: str, **changes: Any) -> AgentCommand:
    return command(folder, sys.executable, "-c", textwrap.dedent(code), **changes)


async def run(asked: AgentCommand) -> tuple[int, str]:
    status = await LocalRunner().run(asked)
    return status, asked.log.read_text()


async def test_the_status_and_the_output_are_the_commands(tmp_path: Path) -> None:
    code = "import os, sys; print(sorted(os.environ), os.getcwd()); sys.stderr.write('bad'); sys.exit(7)"
    status, log = await run(python(tmp_path, code))
    assert status == 7
    assert "bad" in log
    assert f"'PATH', 'TMPDIR'] {tmp_path}" in log.replace("'LC_CTYPE', ", "")
    assert await run(python(tmp_path, "import os; os.kill(os.getpid(), 9)")) == (128 + 9, log)


async def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    status, log = await run(command(tmp_path, "no-such-program"))
    assert status == 127
    assert "no-such-program could not be started" in log
    with pytest.raises(LaunchError, match="the agent of sample could not be started"):
        await run(command(tmp_path / "missing", "true"))


@pytest.mark.parametrize("limits", [{}, {"processes": 20}])
async def test_cancelling_ends_the_whole_tree(tmp_path: Path, limits: dict[str, int]) -> None:
    script, pids = tmp_path / "tree.py", tmp_path / "pids"
    script.write_text(STUBBORN_TREE)
    running = asyncio.create_task(run(command(tmp_path, sys.executable, str(script), "2", str(pids), **limits)))
    await asyncio.to_thread(wait_until, lambda: len(read_pids(pids)) == 3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not any(alive(pid) for pid in read_pids(pids))


async def test_a_cancelled_command_may_clean_up(tmp_path: Path) -> None:
    code = """
        import signal, sys, time
        def clean(*_):
            time.sleep(3)
            sys.exit(print("cleaned", flush=True))
        signal.signal(signal.SIGTERM, clean)
        print("ready", flush=True)
        time.sleep(600)
    """
    asked = python(tmp_path, code, grace=30.0)
    running = asyncio.create_task(run(asked))
    await asyncio.to_thread(wait_until, lambda: asked.log.exists() and asked.log.read_text() == "ready\n")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert asked.log.read_text() == "ready\ncleaned\n"


def test_the_tree_ends_when_the_trainer_is_killed(tmp_path: Path) -> None:
    script, pids = tmp_path / "tree.py", tmp_path / "pids"
    script.write_text(STUBBORN_TREE)
    trainer = f"""
        import asyncio, os
        from pathlib import Path
        from millrace.agents import AgentCommand, LocalRunner
        words = {(sys.executable, str(script), "2", str(pids))!r}
        folder = Path({str(tmp_path)!r})
        asyncio.run(LocalRunner().run(AgentCommand("s", words, folder, dict(os.environ), folder / "log", processes=20)))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(trainer)])
    try:
        wait_until(lambda: len(read_pids(pids)) == 3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: not any(alive(pid) for pid in read_pids(pids)))


async def test_what_the_command_leaves_running_is_ended(tmp_path: Path) -> None:
    code = """
        import subprocess, sys
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        print(left.pid)
    """
    status, log = await run(python(tmp_path, code))
    assert status == 0
    assert not alive(int(log))


async def test_a_process_gets_no_more_memory_than_the_limit(tmp_path: Path) -> None:
    code = "print(len(bytearray(50 << 20)), flush=True); bytearray(500 << 20)"
    status, log = await run(python(tmp_path, code, memory=200 << 20))
    assert status == 1
    assert log.startswith(f"{50 << 20}\n")
    assert "MemoryError" in log
    assert await LocalRunner().run(python(tmp_path, code)) == 0


async def test_an_agent_with_too_many_processes_is_ended(tmp_path: Path) -> None:
    code = """
        import subprocess, sys, time
        for _ in range({}):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        time.sleep({})
    """
    status, log = await run(python(tmp_path, code.format(3, 600), processes=3))
    assert status == 125
    assert "it had more than 3 processes, and was ended (agent.limits.processes)" in log
    assert await LocalRunner().run(python(tmp_path, code.format(2, 1), processes=3)) == 0
