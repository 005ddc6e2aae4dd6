"""Start the server of a stock engine: one process, or one process for each node."""

import asyncio
import os
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from millrace.config.engines import StockEngineConfig
from millrace.engines.stock.arguments import Node
from millrace.errors import DataError, EngineError, LaunchError, LocalError
from millrace.http import HttpClient
from millrace.launch.account import account_name
from millrace.launch.base import Place
from millrace.launch.local import LocalPlace
from millrace.launch.nodes import Nodes
from millrace.launch.process import Server, until_healthy
from millrace.model_config import compute_dtype

StockConfig = TypeVar("StockConfig", bound=StockEngineConfig)

EXTENSION = Path(__file__).parents[2] / "extension"  # not imported: it runs on the engines' interpreters
PROBE_DEADLINE = 10.0  # seconds for GET /health, for which SGLang generates a token: a second on an idle CPU


def new_keys(api_key: str | None = None) -> tuple[str, str]:
    """Return an API key and an admin key. Both are random, unless `api_key` is given.

    A router that has one key for all engines needs engines with the same `api_key`.
    """
    return api_key or secrets.token_urlsafe(24), secrets.token_urlsafe(24)


async def with_dtype(config: StockConfig, model_path: Path) -> StockConfig:
    """Return the settings with dtype `auto` replaced by the model folder's dtype.

    On a GPU, float32 becomes bfloat16, because SGLang's kernels have no float32. The engines' own `auto` differs: for
    a float32 folder SGLang takes float16 and vLLM bfloat16. Raises LaunchError if the folder's config can't be read.
    """
    try:
        dtype = await asyncio.to_thread(compute_dtype, config.dtype, model_path)
    except DataError as error:
        raise LaunchError(str(error)) from error
    if config.dtype == "auto" and config.device == "cuda" and dtype == "float32":
        dtype = "bfloat16"
    return config.model_copy(update={"dtype": dtype})


def with_extension(node: Node) -> Node:
    """Return the node with the folder of Millrace's extensions first on its PYTHONPATH."""
    path = node.environment.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
    path = f"{EXTENSION}{os.pathsep}{path}" if path else str(EXTENSION)
    return replace(node, environment={**node.environment, "PYTHONPATH": path})


async def start_nodes(
    name: str,
    planned: Sequence[Node],
    *,
    python: Path,
    serve: Path,
    log_dir: Path,
    leftovers: Sequence[str],
    deadline: float,
) -> Server:
    """Start the program `serve` on this host for each node. See `start_at`. python: the interpreter."""
    interpreter, path = programs_of(python)
    # Torch's compilation cache must outlive the server's own temporary folder.
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{account_name()}")
    env = {"PATH": path, "TORCHINDUCTOR_CACHE_DIR": compiled}
    return await start_at(
        name,
        [(LocalPlace(), replace(node, environment={**env, **node.environment})) for node in planned],
        lambda _: [str(interpreter), str(serve)],
        log_dir=log_dir,
        leftovers=leftovers,
        deadline=deadline,
    )


async def start_at(
    name: str,
    planned: Sequence[tuple[Place, Node]],
    program: Callable[[Place], Sequence[str]],
    *,
    log_dir: Path,
    leftovers: Sequence[str],
    deadline: float,
) -> Server:
    """Start each node at its place, and wait until all nodes that answer HTTP are healthy.

    The logs are `NAME.log`, or `NAME-nodeN.log` for each node. program: the command at a place, before the node's
    arguments. leftovers: patterns of the files in shared memory that a killed server leaves. deadline: seconds until it
    must be healthy.

    Raises LaunchError, with the end of the server's log, if it does not come up. No process is left then.
    """
    processes: list[Server] = []
    clients: list[HttpClient] = []
    try:
        for place, node in planned:
            label = name if len(planned) == 1 else f"{name}-node{node.rank}"
            command = [*program(place), *node.arguments]
            log = log_dir / f"{label}.log"
            processes.append(await place.start(label, command, log, env=node.environment, leftovers=leftovers))
            if node.url is not None:
                clients.append(HttpClient(label, node.url))
        server = processes[0] if len(processes) == 1 else Nodes(name, processes)

        async def healthy() -> bool:  # another server may have taken the port, and answer although ours is dead
            return await all_healthy(clients) and server.running

        await until_healthy(server, healthy, deadline=deadline)
        return server
    except BaseException:
        await Nodes(name, processes).end()
        raise
    finally:
        for client in clients:
            await client.close()


def programs_of(python: Path) -> tuple[Path, str]:
    """Return the interpreter's absolute path, and a PATH that finds its own programs first.

    Kernels are compiled with the `ninja` beside it.
    """
    interpreter = python.absolute()  # not resolved: the link's target is outside the virtual environment
    return interpreter, f"{interpreter.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


async def all_healthy(clients: Sequence[HttpClient]) -> bool:
    """Whether every server answers its health route."""
    for client in clients:
        try:
            await client.control("GET", "/health", deadline=PROBE_DEADLINE)
        except LocalError:
            raise
        except EngineError:
            return False  # it is still starting; if it fails, its process ends or the deadline passes
    return True
