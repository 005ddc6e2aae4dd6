"""A fleet on this host: starts its engines, proves what they hold, and ends them."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.config.models import EngineConfig, TransportName
from millrace.engines.start import Started, start
from millrace.errors import PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.journal import Journal
from millrace.launch.ports import is_here
from millrace.weights.folder import folder_checksums
from millrace.weights.transports.choice import Sight, choose, in_common, make

if TYPE_CHECKING:
    from millrace.weights.store import VersionStore
    from millrace.weights.transports.base import Transport

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_fleet(
    config: EngineConfig,
    model_path: Path,
    *,
    log_dir: Path,
    version: int = 0,
    seed: int = 0,
    transport: TransportName = "auto",
    folder: str | Path | None = None,
    keep: int = 2,
    couriers: Sequence[str] = (),
    restarts: int = 0,
    journal: Journal | None = None,
) -> AsyncIterator[Fleet]:
    """Launches `config.replicas` engines that serve the model in `model_path` as weight version `version`, or attaches
    to those that the config names.

    In rotation are those whose weights have the folder's checksums or, where an engine can't tell, that were started
    from this folder; another serves after its first publish. Logs go to `log_dir`. `transport` is how weights are
    published; in `folder`, a path or a URL of fsspec's, the last `keep` versions stay; `couriers` are for `delta` and
    `ucx`, and their key is read from MILLRACE_COURIER_KEY (docs/weights.md). An engine that dies, hangs or holds other
    weights than it should is started anew up to `restarts` times in a row (docs/faults.md).
    What happens is told to `journal` (docs/monitoring.md), which the caller closes.

    Raises LaunchError when an engine does not come up (the others are ended), DataError when the folder is not a
    model's or `folder` not a store, PublishError when the engines can't take weights by that transport, and ConfigError
    when what it needs is not installed.
    """
    checksums = await asyncio.to_thread(folder_checksums, model_path)
    store = None
    if folder is not None:
        from millrace.weights.store import ANCHOR_EVERY, VersionStore  # imports torch

        anchor_every = ANCHOR_EVERY if transport == "delta" else 1
        store = VersionStore(str(folder), model_path, keep=keep, anchor_every=anchor_every)

    async def start_one(replica: int) -> Started:
        return await start(config, model_path, replica=replica, log_dir=log_dir, version=version, seed=seed)

    starts = [asyncio.create_task(start_one(i)) for i in range(config.replicas)]
    try:
        started = await asyncio.gather(*starts)
    except BaseException:
        for task in starts:
            task.cancel()
        for result in await asyncio.gather(*starts, return_exceptions=True):
            if not isinstance(result, BaseException):
                await result.end()
        raise
    try:
        chosen = transport_for(transport, started, store, couriers)
    except BaseException:
        await asyncio.gather(*(one.end() for one in started))
        raise
    async with Fleet.open(started, chosen, store, start_one, restarts, journal) as fleet:
        await fleet.attest(checksums, version, model_path)
        yield fleet


def transport_for(
    wanted: TransportName, engines: Sequence[Started], store: "VersionStore | None", couriers: Sequence[str] = ()
) -> "Transport | None":
    """How this process hands tensors to these engines, which it logs; None where there is no way that all of them have.
    Raises PublishError where the one that is wanted is not possible."""
    import torch

    sights = [Sight(one.engine.name, is_here(one.engine.url), one.info.capabilities) for one in engines]
    if wanted == "auto" and couriers and store is not None:
        raise PublishError("couriers can bring weights by delta, from the store, and by ucx; say which it is to be")
    choice = choose(
        wanted,
        sights,
        trainer_has_gpu=torch.cuda.is_available(),
        folder=store is not None and store.shared,
        couriers=bool(couriers),
    )
    logger.info("weights go by %s: %s", choice.name, choice.why)
    if choice.name is None:
        return None
    if choice.name not in ("delta", "ucx"):
        if couriers:
            raise PublishError(f"couriers bring weights by delta or ucx, and they go by {choice.name}")
        return make(choice.name, in_common(sights), store=store)
    from millrace.weights.courier.server import COURIER_KEY
    from millrace.weights.transports.couriers import assign

    assigned = assign({one.engine.name: one.engine.url for one in engines}, couriers)
    key = os.environ.get(COURIER_KEY)
    return make(choice.name, in_common(sights), store=store, couriers=assigned, courier_key=key)
