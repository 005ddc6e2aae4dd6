"""Runs the commands of agents as processes of this host."""

import asyncio
import sys
from collections.abc import Sequence

from millrace.agents import confine
from millrace.agents.base import AgentCommand
from millrace.errors import LaunchError
from millrace.http.local import lacking
from millrace.launch.process import guarded, open_private


class LocalRunner:
    """Runs each command below a guard (`millrace.launch.guard`), which ends all of its processes when it ends, when it
    is cancelled, and when the trainer dies."""

    async def run(self, command: AgentCommand) -> int:
        """Run a command, as `AgentRunner.run` says."""
        starting = asyncio.ensure_future(self._start(command))
        try:
            process = await asyncio.shield(starting)
            return await process.wait()
        finally:
            process = await starting
            assert process.stdin is not None
            process.stdin.close()  # the lifeline: the guard ends what still runs
            await process.wait()

    async def _start(self, command: AgentCommand) -> asyncio.subprocess.Process:
        try:
            with open_private(command.log) as log:
                return await asyncio.create_subprocess_exec(
                    *guarded(_confined(command), grace=command.grace),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=command.folder,
                    env=command.environment,
                    start_new_session=True,  # Ctrl-C goes only to the trainer, which ends its agents in order
                )
        except (OSError, ValueError) as error:
            reason = lacking(error) if isinstance(error, OSError) else None
            raise LaunchError(f"the agent of {command.name} could not be started: {reason or error}") from error


def _confined(command: AgentCommand) -> Sequence[str]:
    if command.memory is None and command.processes is None:
        return command.command
    limits = [str(command.memory or 0), str(command.processes or 0)]
    return [sys.executable, "-I", "-S", confine.__file__, *limits, *command.command]
