"""Run this host's node of an engine that spans several hosts."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from millrace.engines.kinds import launch
from millrace.engines.spec import LaunchSpec
from millrace.engines.stock.interpreter import StockConfig
from millrace.errors import ConfigError, LaunchError
from millrace.launch.ports import listens, parted
from millrace.launch.process import Server, until_healthy

logger = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
MAX_FAILURES = 5  # this many seconds without an answer mean that node 0 is gone, not that a packet was lost


async def join(
    config: StockConfig,
    model_path: Path,
    *,
    log_dir: Path,
    seed: int,
    ready: Callable[[], None],
) -> None:
    """Start node `config.node_rank` and run until the engine ends. Call `ready` when the node has found the others.

    `open_fleet` starts node 0, which answers HTTP, on its own host. Its seed must be the same, because each vLLM rank
    samples a request's tokens itself.

    Raises:
        ConfigError: the settings are not those of such a node.
        LaunchError: the engine ended. The message has the reason.
    """
    if not config.node_rank or config.dist_init_addr is None:
        raise ConfigError(
            "a node that joins needs engine.nnodes, engine.node_rank (1 or more) and engine.dist_init_addr"
        )
    host, port = parted(config.dist_init_addr)
    launched = await launch(config, LaunchSpec(model_path=model_path, log_dir=log_dir, seed=seed))
    try:
        # An SGLang node is healthy only after all ranks have met. A vLLM node has no HTTP, so this waits for node 0.
        await until_healthy(launched.process, lambda: listens(host, port), deadline=config.start_timeout)
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
    """Return when nothing has listened at the ranks' rendezvous for MAX_FAILURES seconds.

    The rendezvous is open as long as node 0 runs.
    """
    failures = 0
    while failures < MAX_FAILURES:
        try:
            failures = 0 if await listens(host, port) else failures + 1
        except LaunchError as error:  # a fault of this host, not of node 0
            logger.warning("%s", error)
        await asyncio.sleep(WATCH_SECONDS)
