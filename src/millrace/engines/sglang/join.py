"""This host's node of an engine over several hosts, for as long as the engine lives."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from millrace.config.models import SGLangEngineConfig
from millrace.engines.sglang.launch import launch
from millrace.errors import ConfigError, LaunchError
from millrace.launch.ports import listens
from millrace.launch.process import Server

WATCH_SECONDS = 1.0
STRIKES = 5  # that many seconds without node 0 are its end, and not a lost packet


async def join(
    config: SGLangEngineConfig, model_path: Path, *, python: Path, log_dir: Path, ready: Callable[[], None]
) -> None:
    """Starts node `config.node_rank` and stays until the engine ends; calls `ready` when all ranks have met.

    Node 0, which answers HTTP, is started by `open_fleet` on its own host. Raises ConfigError for settings that are not
    those of such a node, and LaunchError when the engine ends, with what ended it.
    """
    if not config.node_rank or config.dist_init_addr is None:
        raise ConfigError(
            "set engine.nnodes, engine.node_rank (1 or more) and engine.dist_init_addr for a node to join"
        )
    launched = await launch(config, model_path, python=python, replica=0, log_dir=log_dir, version=0, seed=0)
    try:
        ready()
        ended = asyncio.create_task(launched.process.wait())
        lost = asyncio.create_task(until_gone(config.dist_init_addr))
        try:
            await asyncio.wait((ended, lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            lost.cancel()
        raise LaunchError(describe(launched.process, config.dist_init_addr))
    finally:
        await launched.process.end()


def describe(process: Server, rendezvous: str) -> str:
    if process.running:
        return f"node 0 is gone: nothing answers at {rendezvous}"
    return f"{process.describe_end()}\n{process.log_tail()}"


async def until_gone(address: str) -> None:
    """Returns when nothing has listened at `address` (host:port) for a while. The ranks' meeting point is open as long
    as node 0 lives."""
    host, _, port = address.rpartition(":")
    strikes = 0
    while strikes < STRIKES:
        strikes = 0 if await listens(host, int(port)) else strikes + 1
        await asyncio.sleep(WATCH_SECONDS)
