"""A fleet on this host: starts its engines, proves what they hold, and ends them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from millrace.config.models import EmbeddedEngineConfig
from millrace.engines.embedded.launch import launch
from millrace.fleet.fleet import Fleet, Replica
from millrace.weights.folder import folder_checksums


@asynccontextmanager
async def open_fleet(
    config: EmbeddedEngineConfig, model_path: Path, *, log_dir: Path, version: int = 0, seed: int = 0
) -> AsyncIterator[Fleet]:
    """Launches `config.replicas` engines that serve the model in `model_path` as weight version `version`.

    In rotation are those whose weights have the folder's checksums. Logs go to `log_dir`. Raises LaunchError when an
    engine does not come up (the others are ended) and DataError when the folder is not a model's.
    """
    from millrace.weights.transports.shared_memory import SharedMemoryTransport  # imports torch

    checksums = await asyncio.to_thread(folder_checksums, model_path)
    starts = [
        asyncio.create_task(launch(config, model_path, replica=i, log_dir=log_dir, version=version, seed=seed))
        for i in range(config.replicas)
    ]
    try:
        started = await asyncio.gather(*starts)
    except BaseException:
        for start in starts:
            start.cancel()
        for result in await asyncio.gather(*starts, return_exceptions=True):
            if not isinstance(result, BaseException):
                engine, _, process = result
                await engine.close()
                await process.end()
        raise
    replicas = [Replica(engine, info, process) for engine, info, process in started]
    async with Fleet.open(replicas, SharedMemoryTransport()) as fleet:
        await fleet.attest(checksums, version)
        yield fleet
