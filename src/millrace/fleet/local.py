"""A fleet on this host: starts its engines, proves what they hold, and ends them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.config.models import EngineConfig
from millrace.engines.start import Started, start
from millrace.fleet.fleet import Fleet
from millrace.types import Capability
from millrace.weights.folder import folder_checksums

if TYPE_CHECKING:
    from millrace.weights.transports.base import Transport


@asynccontextmanager
async def open_fleet(
    config: EngineConfig, model_path: Path, *, log_dir: Path, version: int = 0, seed: int = 0
) -> AsyncIterator[Fleet]:
    """Launches `config.replicas` engines that serve the model in `model_path` as weight version `version`, or attaches
    to those that the config names.

    In rotation are those whose weights have the folder's checksums or, where an engine can't tell, that were started
    from this folder; another serves after its first publish. Logs go to `log_dir`. Raises LaunchError when an engine
    does not come up (the others are ended) and DataError when the folder is not a model's.
    """
    checksums = await asyncio.to_thread(folder_checksums, model_path)
    starts = [
        asyncio.create_task(start(config, model_path, replica=i, log_dir=log_dir, version=version, seed=seed))
        for i in range(config.replicas)
    ]
    try:
        started = await asyncio.gather(*starts)
    except BaseException:
        for task in starts:
            task.cancel()
        for result in await asyncio.gather(*starts, return_exceptions=True):
            if not isinstance(result, BaseException):
                await _end(result)
        raise
    async with Fleet.open(started, transport_for(started)) as fleet:
        await fleet.attest(checksums, version, model_path)
        yield fleet


def transport_for(engines: list[Started]) -> "Transport | None":
    """How this process hands tensors to these engines; None where there is no way that all of them have."""
    # Not before it is needed: these import torch.
    common = frozenset.intersection(*(one.info.capabilities for one in engines))
    if Capability.UPDATE_FROM_SHARED_MEMORY in common:
        from millrace.weights.transports.shared_memory import SharedMemoryTransport

        return SharedMemoryTransport()
    if Capability.UPDATE_FROM_CUDA_IPC in common:
        import torch

        from millrace.weights.transports.cuda_ipc import CudaIpcTransport

        return CudaIpcTransport(torch.device("cuda", torch.cuda.current_device()))
    if Capability.UPDATE_FROM_TORCH_STORAGE in common:
        from millrace.weights.transports.torch_storage import TorchStorageTransport

        return TorchStorageTransport()
    return None


async def _end(started: Started) -> None:
    await started.engine.close()
    if started.process is not None:
        await started.process.end()
