"""This host's node of an engine over several hosts, for as long as the engine lives."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from millrace.engines.kinds import launch
from millrace.engines.spec import LaunchSpec
from millrace.engines.stock.interpreter import StockConfig
from millrace.errors import ConfigError, LaunchError
from millrace.launch.ports import listens, parted
from millrace.launch.process import Server

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
MAX_FAILURES = 5  # that many seconds without node 0 are its end, and not a lost packet


async def join(
    config: StockConfig,
    model_path: Path,
    *,
    log_dir: Path,
    seed: int,
    ready: Callable[[], None],
) -> None:
    """Starts node `config.node_rank` and stays until the engine ends; calls `ready` when it has found the others.

    Node 0, which answers HTTP, is started by `open_fleet` on its own host, with the same seed: ranks of vLLM that share
    a request draw its tokens each for itself. Raises ConfigError for settings that are not those of such a node, and
    LaunchError when the engine ends, with what ended it.
    """
    if not config.node_rank or config.dist_init_addr is None:
        raise ConfigError(
            "set engine.nnodes, engine.node_rank (1 or more) and engine.dist_init_addr for a node to join"
        )
    host, port = parted(config.dist_init_addr)
    launched = await launch(config, LaunchSpec(model_path=model_path, log_dir=log_dir, seed=seed))
    try:
        # A node of SGLang's was healthy when all ranks had met. One of vLLM's has no HTTP, and tells nothing.
        await launched.process.until_healthy(lambda: listens(host, port), deadline=config.start_timeout)
        ready()
        ended = asyncio.create_task(launched.process.wait())
        lost = asyncio.create_task(_until_gone(host, port))
        try:
            await asyncio.wait((ended, lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            lost.cancel()
        raise LaunchError(_describe(launched.process, config.dist_init_addr))
    finally:
        await launched.process.end()


def _describe(process: Server, rendezvous: str) -> str:
    if process.running:
        return f"node 0 is gone: nothing answers at {rendezvous}"
    return f"{process.describe_end()}\n{process.log_tail()}"


async def _until_gone(host: str, port: int) -> None:
    """Returns when nothing has listened there for a while. The ranks' meeting point is open as long as node 0 lives."""
    failures = 0
    while failures < MAX_FAILURES:
        try:
            failures = 0 if await listens(host, port) else failures + 1
        except LaunchError as error:  # this host's own trouble says nothing about node 0
            logger.warning("%s", error)
        await asyncio.sleep(WATCH_SECONDS)
