"""Starts the server of a stock engine: one process, or one for each of its nodes."""

import asyncio
import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from millrace.config.models import StockEngineConfig
from millrace.engines.stock.arguments import Node
from millrace.errors import DataError, EngineError, LaunchError, LocalError
from millrace.http import HttpClient
from millrace.launch.account import account_name
from millrace.launch.nodes import Nodes
from millrace.launch.process import ServerProcess
from millrace.model_config import compute_dtype

StockConfig = TypeVar("StockConfig", bound=StockEngineConfig)

PROBE_DEADLINE = 10.0  # of one GET /health; SGLang's generates a token: a second on a quiet CPU


def new_keys(api_key: str | None = None) -> tuple[str, str]:
    """One for generating and one for control, known to nobody else. A router that knows no key of each engine wants the
    same `api_key` for all."""
    return api_key or secrets.token_urlsafe(24), secrets.token_urlsafe(24)


async def with_dtype(config: StockConfig, model_path: Path) -> StockConfig:
    """The settings with `auto` replaced by the folder's dtype, or on a GPU by bfloat16 where the folder is in float32:
    SGLang's kernels have no float32. The engines' own `auto` is another: of a float32 folder, SGLang makes float16 and
    vLLM bfloat16. Raises LaunchError where the folder has no config that can be read."""
    try:
        dtype = await asyncio.to_thread(compute_dtype, config.dtype, model_path)
    except DataError as error:
        raise LaunchError(str(error)) from error
    if config.dtype == "auto" and config.device == "cuda" and dtype == "float32":
        dtype = "bfloat16"
    return config.model_copy(update={"dtype": dtype})


async def start_nodes(
    name: str,
    planned: Sequence[Node],
    *,
    python: Path,
    serve: Path,
    log_dir: Path,
    leftovers: Sequence[str],
    deadline: float,
) -> ServerProcess | Nodes:
    """Runs the program `serve` with the interpreter `python` for each node and waits until all that answer HTTP are
    healthy. The logs are `NAME.log`, or `NAME-nodeN.log` for each node.

    Raises LaunchError, with the end of the server's log, when it does not come up; nothing is left running then.
    """
    interpreter, path = programs_of(python)
    # What torch has compiled stays from one start to the next, though the server's own temporary folder does not.
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{account_name()}")
    processes: list[ServerProcess] = []
    clients: list[HttpClient] = []
    try:
        for node in planned:
            label = name if len(planned) == 1 else f"{name}-node{node.rank}"
            processes.append(
                await ServerProcess.start(
                    label,
                    [str(interpreter), str(serve), *node.arguments],
                    log_dir / f"{label}.log",
                    env={"PATH": path, "TORCHINDUCTOR_CACHE_DIR": compiled, **node.environment},
                    leftovers=leftovers,
                )
            )
            if node.url is not None:
                clients.append(HttpClient(label, node.url))
        server = processes[0] if len(processes) == 1 else Nodes(name, processes)

        async def healthy() -> bool:  # a port may have been taken by another server, which answers for a dead one
            return await all_healthy(clients) and server.running

        await server.until_healthy(healthy, deadline=deadline)
        return server
    except BaseException:
        await Nodes(name, processes).end()
        raise
    finally:
        for client in clients:
            await client.close()


def programs_of(python: Path) -> tuple[Path, str]:
    """The interpreter's path, and a PATH on which its own programs come first: kernels are compiled with its ninja."""
    interpreter = python.absolute()  # a link stays one: what it leads to knows nothing of the virtual environment
    return interpreter, f"{interpreter.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


async def all_healthy(clients: Sequence[HttpClient]) -> bool:
    for client in clients:
        try:
            await client.control("GET", "/health", deadline=PROBE_DEADLINE)
        except LocalError:
            raise
        except EngineError:
            return False  # it is starting; when it can't, its process ends or the caller's deadline passes
    return True
