"""Several processes form one server. When one ends, all end."""

import asyncio
import sys
from pathlib import Path

import pytest

from millrace.errors import LaunchError
from millrace.launch.nodes import Nodes
from millrace.launch.process import ServerProcess

WAITS = "import time; print('node waits', flush=True); time.sleep(600)"


async def start(folder: Path, *programs: str) -> tuple[Nodes, list[ServerProcess]]:
    processes = [
        await ServerProcess.start(f"two-node{rank}", [sys.executable, "-c", program], folder / f"{rank}.log")
        for rank, program in enumerate(programs)
    ]
    return Nodes("two", processes), processes


async def speaks(*logs: Path) -> bool:
    return all(log.read_text() for log in logs)


async def test_the_end_of_one_node_ends_the_others(tmp_path: Path) -> None:
    nodes, processes = await start(tmp_path, WAITS, "print('node 1 is broken'); raise SystemExit(5)")
    try:
        async with asyncio.timeout(20):
            await nodes.wait()
        assert not nodes.running
        assert not any(process.running for process in processes)
        assert nodes.describe_end() == "two-node1 ended with status 5"
        assert "node 1 is broken" in nodes.log_tail()
        assert "node waits" not in nodes.log_tail()
    finally:
        await nodes.end()


async def test_a_node_that_ended_before_anyone_waited_is_the_one_that_is_named(tmp_path: Path) -> None:
    nodes, processes = await start(tmp_path, WAITS, "raise SystemExit(5)")
    try:
        async with asyncio.timeout(20):
            await processes[1].wait()
        assert not nodes.running
        assert nodes.describe_end() == "two-node1 ended with status 5"
    finally:
        await nodes.end()
    assert nodes.describe_end() == "two-node1 ended with status 5"


async def test_nodes_that_are_ended_end_together(tmp_path: Path) -> None:
    nodes, processes = await start(tmp_path, WAITS, WAITS)
    try:
        await nodes.until_healthy(lambda: speaks(tmp_path / "0.log", tmp_path / "1.log"), deadline=20)
        assert nodes.running
        assert nodes.describe_end() == "two runs"
        assert str(tmp_path / "0.log") in nodes.log_tail()
        assert str(tmp_path / "1.log") in nodes.log_tail()
        waiting = asyncio.create_task(nodes.wait())
    finally:
        await nodes.end()
    async with asyncio.timeout(5):
        await waiting
    assert not any(process.running for process in processes)
    await nodes.end()


async def test_a_node_that_dies_at_start_is_reported_at_once(tmp_path: Path) -> None:
    nodes, _ = await start(tmp_path, WAITS, "raise SystemExit('no GPU 4 here')")

    async def never() -> bool:
        return False

    try:
        with pytest.raises(LaunchError, match=r"(?s)two-node1 ended with status 1.*no GPU 4 here"):
            await nodes.until_healthy(never, deadline=20)
    finally:
        await nodes.end()


async def test_a_cancelled_wait_ends_nothing(tmp_path: Path) -> None:
    nodes, _ = await start(tmp_path, WAITS, WAITS)
    try:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await nodes.wait()
        assert nodes.running
    finally:
        await nodes.end()
