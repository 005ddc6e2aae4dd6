"""Stores the versions that a fleet publishes, if a store is configured."""

import asyncio
import logging
from typing import TYPE_CHECKING

from millrace.errors import PublishError
from millrace.weights.plan import buckets
from millrace.weights.source import WeightSource

if TYPE_CHECKING:
    from millrace.weights.store import VersionStore

STORE_DEADLINE = 120.0  # seconds for the store to make a version durable

logger = logging.getLogger(__name__)


class Storing:
    """Writes each version to `store`, and makes it durable in the background. Without a store, it does nothing."""

    def __init__(self, store: "VersionStore | None") -> None:
        self._store = store
        self._securing: asyncio.Task[None] | None = None  # makes the last version durable

    async def close(self) -> None:
        """Wait until the last version is durable, and close the store."""
        try:
            await self.secured()
        except PublishError as error:
            logger.error("%s", error)
        if self._store is not None:
            self._store.close()

    def require_twice(self, source: WeightSource) -> None:
        """Raise PublishError if the tensors can be read only once, and would be needed for the store too."""
        if self._store is not None and source.once:
            raise PublishError(
                "versions are stored (publish.folder), which needs the tensors twice, and an iterator can be read only "
                "once; publish list(model.named_parameters())"
            )

    async def ready(self, deadline: float) -> str | None:
        """Make the store ready for the next version. Return what `secured` does."""
        unstored = await self.secured(deadline)
        if self._store is not None:
            await asyncio.to_thread(self._store.discard)  # an unfinished version of a failed publish
        return unstored

    async def keep(self, version: int, source: WeightSource, bucket_bytes: int) -> str | None:
        """Write the version, and make it durable in the background. Return the reason if that failed."""
        if self._store is None:
            return None
        try:
            await asyncio.to_thread(self._store.write, version, buckets(source, bucket_bytes))
        except PublishError as error:
            logger.error("version %d is not stored: %s", version, error)
            return str(error)
        self._securing = asyncio.create_task(asyncio.to_thread(self._store.secure, version))
        return None

    async def secured(self, deadline: float = STORE_DEADLINE) -> str | None:
        """Wait until the last version is durable. Return the reason if that failed.

        Raises PublishError if it takes longer than `deadline` seconds; the store can't be used until then.
        """
        if self._securing is None:
            return None
        try:
            async with asyncio.timeout(deadline):
                await asyncio.shield(self._securing)
        except TimeoutError:
            raise PublishError(f"the store is still busy with the last version after {deadline:.0f} s") from None
        except PublishError as error:
            logger.error("%s", error)
            self._securing = None
            return str(error)
        self._securing = None  # not earlier, since this wait may be cancelled
        return None
