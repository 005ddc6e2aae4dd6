"""The Ray actor of one node of an engine. It starts the node's server below a guard, on the actor's host."""

import asyncio
import os
import sys
from pathlib import Path

import ray.util

from millrace.errors import LaunchError
from millrace.launch.ports import free_block
from millrace.launch.process import ServerProcess

WATCH_SECONDS = 1.0


class NodeActor:
    """One node. The guard ends its server when this process ends. Errors are returned as text."""

    def __init__(self) -> None:
        self._process: ServerProcess | None = None

    async def where(self) -> dict[str, str]:
        """Return the host's address, the assigned GPUs, and the interpreter."""
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return {"host": ray.util.get_node_ip_address(), "gpus": gpus, "python": sys.executable}

    async def free_ports(self, host: str, count: int) -> int | str:
        """Return the first of `count` consecutive free ports."""
        try:
            return free_block(host, count)
        except LaunchError as error:
            return str(error)

    async def start(
        self, name: str, command: list[str], log_path: str, env: dict[str, str], leftovers: list[str]
    ) -> str | None:
        """Start the server. Returns what is wrong if it can't be started."""
        try:
            self._process = await ServerProcess.start(name, command, Path(log_path), env=env, leftovers=leftovers)
        except LaunchError as error:
            return str(error)
        return None

    async def watch(self) -> tuple[bool, str, str]:
        """Wait for the end of the server, or a second. Returns whether it runs, how it ended, and the log's end."""
        assert self._process is not None
        try:
            async with asyncio.timeout(WATCH_SECONDS):
                await self._process.wait()
        except TimeoutError:
            pass  # it runs
        return self._process.running, self._process.describe_end(), self._process.log_tail()

    async def end(self) -> str | None:
        """End the server. Returns what is wrong if it does not end."""
        try:
            if self._process is not None:
                await self._process.end()
        except LaunchError as error:
            return str(error)
        return None
