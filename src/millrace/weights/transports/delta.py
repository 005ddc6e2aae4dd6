"""Trainer and engines at different sites, with a store between them: a version goes there once, mostly as what changed,
and a sidecar on each engine's host makes the whole of it, which its engines read from their own disk."""

import asyncio
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from millrace.errors import DataError, EngineError, EngineFailed, EngineTimeout, PublishError
from millrace.http.client import HttpClient
from millrace.types import Capability, DiskBucket
from millrace.weights.chain import digest_of
from millrace.weights.mirror import CheckpointMirror
from millrace.weights.store import VersionStore
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket, Transport, TransportContext
from millrace.weights.transports.sidecars import reason_of

T = TypeVar("T")


class Sidecar(ABC):
    """Who brings versions to one host. Errors name it."""

    name: str

    @abstractmethod
    async def bring(self, version: int, *, deadline: float) -> tuple[str, str]:
        """The version's folder there, and its digest. Raises EngineError."""

    @abstractmethod
    async def close(self) -> None: ...


class RemoteSidecar(Sidecar):
    """`millrace sidecar` at `url`."""

    def __init__(self, url: str, key: str | None) -> None:
        self.name = f"sidecar {url}"
        self._http = HttpClient(self.name, url, api_key=key)

    async def bring(self, version: int, *, deadline: float) -> tuple[str, str]:
        body = {"version": version}
        match await self._http.control("POST", "/bring", body, deadline=deadline, repeatable=True):
            case {"path": str(path), "digest": str(digest)}:
                return path, digest
            case answer:
                raise EngineFailed(self.name, f"it answered {answer!r}")

    async def close(self) -> None:
        await self._http.close()


class LocalSidecar(Sidecar):
    """For engines of the trainer's own host that have no sidecar: good for trying the others' way."""

    name = "this host's own sidecar"

    def __init__(self, store_url: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="millrace-replica-")
        self._replica = CheckpointMirror(store_url, Path(self._folder.name))
        self._bringing = _Thread()

    async def bring(self, version: int, *, deadline: float) -> tuple[str, str]:
        try:
            async with asyncio.timeout(deadline):
                path, digest = await self._bringing.run(lambda: self._replica.bring(version))
        except TimeoutError:
            raise EngineTimeout(self.name, f"it did not bring version {version} within {deadline:.1f} s") from None
        except (PublishError, DataError) as error:
            raise EngineFailed(self.name, str(error)) from error
        return str(path), digest

    async def close(self) -> None:
        await self._bringing.ended()
        self._replica.close()
        self._folder.cleanup()


class DeltaTransport(Transport):
    """Changes go to the store, and a sidecar on each host of engines makes whole versions of them. `sidecars`: the URL
    of each engine's, by the engine's name; None for the engines that this process serves itself."""

    needs = frozenset({Capability.UPDATE_FROM_DISK})

    @classmethod
    def create(cls, context: TransportContext) -> Self:
        if context.store is None or context.sidecars is None:
            raise PublishError("publish.transport is delta, and publish.folder names no store")
        return cls(context.store, context.sidecars, key=context.sidecar_key)

    def __init__(self, store: VersionStore, sidecars: Mapping[str, str | None], *, key: str | None) -> None:
        self._store = store
        self._sidecars: dict[str | None, Sidecar] = {
            url: LocalSidecar(store.url) if url is None else RemoteSidecar(url, key) for url in set(sidecars.values())
        }
        self._sidecar_of = {engine: self._sidecars[url] for engine, url in sidecars.items()}
        self._securing = _Thread()
        self._version, self._digest = 0, ""
        self._folders: dict[Sidecar, str] = {}

    async def open(
        self,
        targets: Sequence[PublishTarget],  # noqa: ARG002 (asked when there is something to bring)
        version: int,
        *,
        deadline: float,
    ) -> Mapping[str, EngineError]:
        """Raises PublishError where the store is still taking what it was given before."""
        try:
            async with asyncio.timeout(deadline):
                await self._securing.ended()
        except TimeoutError:
            raise PublishError(f"the store did not take the version before {version} to its end") from None
        self._version, self._folders = version, {}
        return {}

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        """One, when all is written on this host. Raises PublishError where it can't be."""
        written = self._store.write(self._version, buckets)
        for _ in buckets:  # of a version that was written before: the publisher samples what goes by
            pass
        self._digest = digest_of(written.checksums)
        yield StagedBucket(self._bucket_for, written.checksums, tuple(written.checksums), written.nbytes)

    async def deliver(self, targets: Sequence[PublishTarget], *, deadline: float) -> Mapping[str, EngineError]:
        """To the store, and from there by all sidecars at once. Raises PublishError where the store does not take it;
        what a sidecar can't do fails the engines of its host."""
        version, ends = self._version, asyncio.get_running_loop().time() + deadline
        try:
            async with asyncio.timeout(deadline):
                await self._securing.run(lambda: self._store.secure(version))
        except TimeoutError:
            raise PublishError(f"the store did not take version {version} within {deadline:.1f} s") from None
        failed: dict[Sidecar, str] = {}

        async def bring(sidecar: Sidecar) -> None:
            try:
                left = ends - asyncio.get_running_loop().time()
                folder, digest = await sidecar.bring(version, deadline=left)
            except EngineError as error:
                failed[sidecar] = reason_of(error)
                return
            if digest != self._digest:
                failed[sidecar] = f"its store has another version {version}"
            self._folders[sidecar] = folder

        async with asyncio.TaskGroup() as group:
            for sidecar in {self._sidecar_of[target.engine.name] for target in targets}:
                group.create_task(bring(sidecar))
        unreached: dict[str, EngineError] = {}
        for target in targets:
            name = target.engine.name
            if (reason := failed.get(sidecar := self._sidecar_of[name])) is not None:
                unreached[name] = EngineFailed(name, f"{sidecar.name} did not bring version {version}: {reason}")
        return unreached

    def _bucket_for(self, target: PublishTarget) -> DiskBucket:
        return DiskBucket(self._folders[self._sidecar_of[target.engine.name]])

    async def send(self, staged: StagedBucket) -> None:  # noqa: ARG002 (the engines read by themselves)
        return

    async def close(self) -> None:
        """The versions stay in the store and with the sidecars."""
        await self._securing.ended()
        await asyncio.gather(*(sidecar.close() for sidecar in self._sidecars.values()))


class _Thread:
    """A thread's work that may outlast whoever waits for it."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns. One that was given up goes to its end first."""
        await self.ended()
        task = self._task = asyncio.create_task(asyncio.to_thread(work))
        return await asyncio.shield(task)

    async def ended(self) -> None:
        """Returns when it has, whatever came of it."""
        if self._task is not None:
            await asyncio.wait([self._task])
