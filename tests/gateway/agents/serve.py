"""Runs an agent against the gateway with a scripted fleet, in a namespace that has no network but the loopback.

The test starts it there: `unshare ... python -m tests.gateway.agents.serve NAME FOLDER AGENTS`. It writes what it saw
to `FOLDER/seen.json`.
"""

import asyncio
import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from millrace.gateway import serve_gateway
from millrace.gateway.control import sample_view, view
from tests.gateway.agents.alone import isolate
from tests.gateway.agents.scenario import Place, Scenario
from tests.gateway.formats import format_of
from tests.gateway.scripted import ScriptedFleet

TIMEOUT = 120.0  # seconds for a command


@dataclass(frozen=True, slots=True)
class Run:
    """A command that ended. output: what it wrote to stdout and stderr."""

    status: int | None
    output: str


class Names(asyncio.DatagramProtocol):
    """A server of names that knows none. asked: the names it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        labels, place = [], 12
        while length := data[place]:
            labels.append(data[place + 1 : place + 1 + length].decode("latin1"))
            place += 1 + length
        if (name := ".".join(labels)) not in self.asked:
            self.asked.append(name)
        unknown = data[:2] + b"\x81\x83" + data[4:6] + bytes(6) + data[12 : place + 5]
        self.transport.sendto(unknown, addr)


async def run(command: list[str], environment: Mapping[str, str], folder: Path) -> Run:
    """Runs a command to its end, or to the end of its time."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    reading = asyncio.create_task(process.communicate())
    done, _ = await asyncio.wait({reading}, timeout=TIMEOUT)
    if not done:
        process.kill()
    output, _ = await reading
    return Run(process.returncode if done else None, output.decode(errors="replace"))


async def play(scenario: Scenario, folder: Path, installed: Path) -> dict[str, object]:
    """Runs an agent on one episode, and returns what was seen."""
    turns = format_of("qwen3")
    fleet = ScriptedFleet(turns.chat.tokenizer, turns.stop_token_ids[0], scenario.script)
    _, names = await asyncio.get_running_loop().create_datagram_endpoint(Names, local_addr=("127.0.0.1", 53))
    async with serve_gateway(fleet, turns, key="key") as gateway:  # type: ignore[arg-type]
        opened = gateway.open_episode()
        place = Place(folder / "home", installed, opened)
        work = folder / "work"
        work.mkdir()
        for name, text in scenario.files(place).items():
            file = place.home / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        environment = {"PATH": os.environ["PATH"], "HOME": str(place.home), **scenario.environment(place)}
        runs = [await run(list(command), environment, work) for command in scenario.commands(place)]
        tree = opened.episode.tree
        return {
            "runs": [asdict(one) for one in runs],
            "episode": view(opened.episode),
            "samples": [sample_view(sample) for sample in opened.samples()],
            "asked": [[one.request.input_ids, one.output_ids] for one in fleet.asked],
            "prompts": [turns.chat.tokenizer.decode(list(one.request.input_ids)) for one in fleet.asked],
            "nodes": [{"reason": node.reason, "root": node.parent is None} for node in tree.nodes],
            "looked_up": names.asked,
        }


def main(name: str, folder: Path, installed: Path) -> None:
    """Plays the scenario of a module of this package."""
    isolate(folder)
    scenario = importlib.import_module(f"tests.gateway.agents.{name}").SCENARIO
    seen = asyncio.run(play(scenario, folder, installed))
    (folder / "seen.json").write_bytes(orjson.dumps(seen, option=orjson.OPT_SERIALIZE_NUMPY))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
