"""One node of an engine, in a process on its host that another process calls. A cluster starts that process."""

import asyncio
import os
import sys
from pathlib import Path

from millrace.launch.ports import free_block
from millrace.launch.process import ServerProcess

WATCH_SECONDS = 1.0


class RemoteNode:
    """One node. The guard ends its server when this process ends."""

    def __init__(self) -> None:
        self._process: ServerProcess | None = None

    async def where(self) -> dict[str, str | None]:
        """Return the assigned GPUs, and the interpreter."""
        return {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "python": sys.executable}

    async def free_ports(self, host: str, count: int) -> int:
        """Return the first of `count` consecutive free ports. Raises LaunchError."""
        return free_block(host, count)

    async def start(
        self, name: str, command: list[str], log_path: str, env: dict[str, str], leftovers: list[str]
    ) -> None:
        """Start the server. Raises LaunchError if it can't be started."""
        self._process = await ServerProcess.start(name, command, Path(log_path), env=env, leftovers=leftovers)

    async def watch(self) -> tuple[bool, str, str]:
        """Wait for the end of the server, or a second. Returns whether it runs, how it ended, and the log's end."""
        assert self._process is not None
        try:
            async with asyncio.timeout(WATCH_SECONDS):
                await self._process.wait()
        except TimeoutError:
            pass  # it runs
        return self._process.running, self._process.describe_end(), self._process.log_tail()

    async def end(self) -> None:
        """End the server. Raises LaunchError if it does not end."""
        if self._process is not None:
            await self._process.end()
