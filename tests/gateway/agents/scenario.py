"""What a test of an agent consists of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.gateway.gateway import OpenEpisode
from tests.gateway.scripted import Script


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
