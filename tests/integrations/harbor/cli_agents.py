"""Plays a trial by one of Harbor's agents that runs inside the environment, in a namespace that has the loopback only.

The test starts it there: `unshare ... python -m tests.integrations.harbor.cli_agents NAME FOLDER`.
"""

import asyncio
import json
import sys
from pathlib import Path

from tests.gateway.agents.alone import isolate
from tests.gateway.qwen import call, results, said_in, turn
from tests.integrations.harbor.test_harbor import agent_config, play, task

COMMAND = "echo 7 > answer.txt"
CALLS = {  # by the agent's name, the call that runs the command
    "claude-code": call("Bash", command=COMMAND, description="Writes."),
    "codex": call("exec_command", cmd=COMMAND),
    "opencode": call("bash", command=COMMAND, description="Writes."),
    "qwen-coder": call("run_shell_command", command=COMMAND, is_background=False),
}


async def main(name: str, folder: Path) -> None:
    """Play, and print what came of it as JSON."""
    isolate(folder)
    task(folder)
    config = agent_config(folder, {"name": name, "kwargs": {"skip_install": True}}, "--gateway", "localhost")

    def script(prompt: str) -> str:
        return turn("Done.") if results(said_in(prompt)) else turn("I write it.", CALLS[name])

    played = await play(folder, config, script)
    print(json.dumps([played.reward, played.episode.turns, len(played.branches)]))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
