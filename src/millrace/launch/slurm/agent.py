"""What a step runs, as its only task: a node of an engine, which the driver calls through srun.

    python -m millrace.launch.slurm.agent

Slurm announces the end of a step by SIGTERM, some time before SIGKILL. The agent tells the driver, and runs on. It ends
its server and itself when its standard input closes, as it does when srun's owner ends. If srun itself was killed,
Slurm lets the step run on and keeps its input open. So the driver writes an empty line every few seconds, and the agent
ends when there is none.
"""

import asyncio
import contextlib
import os
import signal
import sys
from typing import BinaryIO

from millrace.launch.calls import Answerer, lines
from millrace.launch.remote import RemoteNode

BEAT_SECONDS = 5.0  # between the driver's empty lines
SILENT_SECONDS = 60  # without a line until the agent ends


class Agent(RemoteNode, Answerer):
    """Answers the calls, and says how the server stands."""

    def __init__(self, out: BinaryIO) -> None:
        RemoteNode.__init__(self)
        Answerer.__init__(self, out, "a step's agent")
        self._silent = 0
        self._watch: asyncio.Task[None] | None = None

    async def start(
        self, name: str, command: list[str], log_path: str, env: dict[str, str], leftovers: list[str]
    ) -> None:
        """Start the server, and say from now on how it stands."""
        await super().start(name, command, log_path, env, leftovers)
        self._watch = asyncio.create_task(self._follow())

    async def end(self) -> None:
        """End the server. Its last state has been said when this returns."""
        await super().end()
        if self._watch is not None:
            await self._watch

    async def run(self) -> None:
        """Answer calls until the input ends or is silent."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: self.say(signalled=True))
        step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
        self.say(step=step, **await self.where())
        reading, silence = asyncio.create_task(self._read()), asyncio.create_task(self._until_silent())
        try:
            await asyncio.wait({reading, silence}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reading, silence):
                task.cancel()
            await asyncio.gather(reading, silence, return_exceptions=True)
            await self.end()

    async def _read(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            async for line in lines():
                self._silent = 0
                if line.strip():
                    tasks.create_task(self.answer(line))

    async def _until_silent(self) -> None:
        """Count seconds without a line. A step that is suspended does not count them."""
        while self._silent < SILENT_SECONDS:
            await asyncio.sleep(1.0)
            self._silent += 1

    async def _follow(self) -> None:
        told, running = "", True
        while running:
            running, end, tail = await self.watch()
            if tail != told or not running:
                self.say(running=running, end=end, tail=tail)
            told = tail


def main() -> None:
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with contextlib.suppress(BrokenPipeError):
        asyncio.run(Agent(out).run())


if __name__ == "__main__":
    main()
