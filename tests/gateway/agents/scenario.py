"""What a test of an agent consists of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.gateway.gateway import OpenEpisode
from tests.gateway.qwen import answered, last_question, results, said_in, turn
from tests.gateway.scripted import Script

SHELL = "Run three commands."
DELEGATE = "Let an agent work."


@dataclass(frozen=True, slots=True)
class Place:
    """Where an agent runs. home: its home, an empty folder. installed: the folder with the agents."""

    home: Path
    installed: Path
    opened: OpenEpisode

    def command(self, name: str) -> str:
        """Returns the path of an agent's program."""
        return str(self.installed / "node_modules" / ".bin" / name)


@dataclass(frozen=True, slots=True)
class Scenario:
    """An agent with a script for its model.

    commands: what is run, one after the other. environment: its variables besides PATH and HOME. files: its
    configuration, by path below its home.
    """

    script: Script
    commands: Callable[[Place], Sequence[Sequence[str]]]
    environment: Callable[[Place], Mapping[str, str]]
    files: Callable[[Place], Mapping[str, str]] = lambda _: {}


def shell_and_sub_agent(shell: Callable[[str], str], delegate: str) -> Script:
    """Returns a script of three parallel commands for SHELL, and of a sub-agent for DELEGATE, which runs one command.

    shell: the call that says a word in a shell. delegate: the call that starts the sub-agent with a SUBTASK.
    """

    def script(prompt: str) -> str:
        said = said_in(prompt)
        last, done = last_question(said), answered(said)
        if "SUBTASK" in last:
            return turn("It said so.") if done else turn("", shell("sub"))
        if DELEGATE in last and not done:
            return turn("", delegate)
        if SHELL in last and not done:
            return turn("Let me run them.", *(shell(str(i)) for i in range(3)))
        return turn(f"Done after {results(said)} results.")

    return script
