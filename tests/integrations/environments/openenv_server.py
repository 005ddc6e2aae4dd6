"""An OpenEnv server, in the environment that has OpenEnv: the package's own classes and server, and a small game."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from millrace.launch.ports import free_port
from tests.ports import listens

PYTHON = Path(os.environ.get("OPENENV_PYTHON", ".venv-openenv/bin/python"))  # as `make test-environments` sets it
START = 120.0  # seconds: the server imports Gradio
SERVER = """
import os, sys, time
import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_app

class Guess(Action):
    number: int

class Told(Observation):
    text: str

class Game(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, number=7, tries=3):
        self.number, self.tries = number, tries
        if number < 0:
            raise ValueError("a number is\\n0 or more")
        return Told(text="Guess my number.")

    def step(self, action, timeout_s=None):
        if action.number == 13:
            raise RuntimeError("unlucky\\nnumber")
        if action.number == 60:
            time.sleep(60)
        if action.number == 666:
            os._exit(1)
        self.tries -= 1
        right = action.number == self.number
        return Told(text="Yes." if right else "No.", done=right or not self.tries, reward=1.0 if right else -0.25)

    @property
    def state(self):
        return State()

app = create_app(Game, Guess, Told, env_name="game", max_concurrent_envs=4)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]))
"""


@asynccontextmanager
async def openenv_server(log: Path) -> AsyncIterator[str]:
    """Run the server while the block runs, and yield its URL."""
    port = free_port("127.0.0.1")
    with log.open("wb") as output:
        process = subprocess.Popen([PYTHON, "-c", SERVER, str(port)], stdout=output, stderr=output)  # noqa: ASYNC220
    try:
        async with asyncio.timeout(START):
            while not await listens(port):
                assert process.poll() is None, f"the server ended; see {log}"
                await asyncio.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
