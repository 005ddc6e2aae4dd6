"""A transport for a trainer and engines at different sites, through a store.

The trainer writes each version to the store once, usually as a delta. A sidecar on each host of engines builds the
whole version from it, and its engines read that from their own disk.
"""

import asyncio
import itertools
import secrets
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from millrace.buckets import Changes, DiskBucket, RankAnswers
from millrace.errors import DataError, EngineError, EngineFailed, EngineTimeout, PublishError
from millrace.http.client import HttpClient
from millrace.types import Capability
from millrace.weights.chain import digest_of
from millrace.weights.mirror import CheckpointMirror
from millrace.weights.sidecar.asking import ask
from millrace.weights.sidecar.messages import Answers, AnswersBody, BringBody, BroughtVersion
from millrace.weights.store import VersionStore
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket, Transport, TransportContext
from millrace.weights.transports.sidecars import EngineSidecars, reason_of

T = TypeVar("T")


class Sidecar(ABC):
    """A sidecar that brings versions to one host. Its errors name it."""

    name: str

    @abstractmethod
    async def bring(self, version: int, ranks: int, *, deadline: float) -> BroughtVersion:
        """Bring the version to the host for engines with this number of ranks in all. Raises EngineError."""

    @abstractmethod
    async def answers(self, start: int, ranks: int, *, deadline: float) -> Sequence[bytes]:
        """Return what the ranks of an engine have answered, of which the first has this number. Raises EngineError."""

    @abstractmethod
    async def close(self) -> None: ...


class RemoteSidecar(Sidecar):
    """A client of the `millrace sidecar` at `url`."""

    def __init__(self, url: str, key: str | None) -> None:
        self.name = f"sidecar {url}"
        self._http = HttpClient(self.name, url, api_key=key)
        self._session = secrets.token_hex(8)

    async def bring(self, version: int, ranks: int, *, deadline: float) -> BroughtVersion:
        body = BringBody(session=self._session, version=version, ranks=ranks)
        return await ask(self._http, "/bring", body, BroughtVersion, deadline, repeatable=True)

    async def answers(self, start: int, ranks: int, *, deadline: float) -> Sequence[bytes]:
        body = AnswersBody(session=self._session, slot=0, start=start, ranks=ranks)
        return (await ask(self._http, "/answers", body, Answers, deadline)).texts

    async def close(self) -> None:
        await self._http.close()


class LocalSidecar(Sidecar):
    """A sidecar in this process, for engines on the trainer's host if that host has no sidecar. Useful for trials."""

    name = "this host's own sidecar"

    def __init__(self, store_url: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="millrace-replica-")
        self._mirror = CheckpointMirror(store_url, Path(self._folder.name))
        self._bringing = _Thread()

    async def bring(self, version: int, ranks: int, *, deadline: float) -> BroughtVersion:  # noqa: ARG002
        try:
            async with asyncio.timeout(deadline):
                path, digest = await self._bringing.run(lambda: self._mirror.bring(version))
        except TimeoutError:
            raise EngineTimeout(self.name, f"it did not bring version {version} within {deadline:.1f} s") from None
        except (PublishError, DataError) as error:
            raise EngineFailed(self.name, str(error)) from error
        changes, base = self._mirror.changes(version)
        return BroughtVersion(path=str(path), digest=digest, changes=changes, base=base)

    async def answers(self, start: int, ranks: int, *, deadline: float) -> Sequence[bytes]:
        raise NotImplementedError("the engines answer to this process")

    async def close(self) -> None:
        await self._bringing.ended()
        self._mirror.close()
        self._folder.cleanup()


class DeltaTransport(Transport):
    """A transport that writes versions to the store, from which a sidecar brings them to each host of engines.

    sidecars: the URL of each engine's sidecar, by the engine's name; None for engines that this process itself brings
        versions to.
    key: the API key of the sidecars.
    spare: the URLs of further sidecars, for engines that join.
    """

    needs = frozenset({Capability.UPDATE_FROM_DISK})

    @classmethod
    def create(cls, context: TransportContext) -> Self:
        if context.store is None or context.sidecars is None:
            raise PublishError("the transport delta needs a store; set publish.folder, or pass folder to open_fleet")
        return cls(context.store, context.sidecars, key=context.sidecar_key, spare=context.spare_sidecars)

    def __init__(
        self, store: VersionStore, sidecars: Mapping[str, str | None], *, key: str | None, spare: Sequence[str] = ()
    ) -> None:
        self._store = store
        self._sidecars: dict[str | None, Sidecar] = {
            url: LocalSidecar(store.url) if url is None else RemoteSidecar(url, key)
            for url in {*sidecars.values(), *spare}
        }
        self._sidecar_of = EngineSidecars({name: self._sidecars[url] for name, url in sidecars.items()}, self._sidecars)
        self._securing = _Thread()
        self._version, self._digest = 0, ""
        # By engine: its sidecar, what it has brought, and the number of the engine's first rank there.
        self._brought: dict[str, tuple[Sidecar, BroughtVersion, int]] = {}

    async def open(
        self,
        targets: Sequence[PublishTarget],
        version: int,
        *,
        deadline: float,
    ) -> Mapping[str, EngineError]:
        """Wait until the store has the version before. Raises PublishError if that takes longer than `deadline`."""
        try:
            async with asyncio.timeout(deadline):
                await self._securing.ended()
        except TimeoutError:
            raise PublishError(f"the store did not finish the version before {version}") from None
        self._version, self._brought = version, {}
        return await self._sidecar_of.place(targets)

    def staged(self, buckets: Iterator[NamedTensors]) -> Iterator[StagedBucket]:
        """Yield one bucket, after the whole version was written to this host. Raises PublishError if it can't be
        written."""
        written = self._store.write(self._version, buckets)
        for _ in buckets:  # if the version was written before: the publisher samples the tensors that pass through
            pass
        self._digest = digest_of(written.checksums)
        yield StagedBucket(self._bucket_for, written.checksums, tuple(written.checksums), written.nbytes)

    async def deliver(self, targets: Sequence[PublishTarget], *, deadline: float) -> Mapping[str, EngineError]:
        """Write the version to the store, and have all sidecars bring it at the same time. If a sidecar fails, the
        engines of its host fail. Raises PublishError if the store does not take the version."""
        version, ends = self._version, asyncio.get_running_loop().time() + deadline
        try:
            async with asyncio.timeout(deadline):
                await self._securing.run(lambda: self._store.secure(version))
        except TimeoutError:
            raise PublishError(f"the store did not take version {version} within {deadline:.1f} s") from None
        failed: dict[Sidecar, str] = {}

        async def bring(sidecar: Sidecar, here: Sequence[PublishTarget]) -> None:
            try:
                left = ends - asyncio.get_running_loop().time()
                ranks = [target.info.ranks for target in here]
                found = await sidecar.bring(version, sum(ranks), deadline=left)
            except EngineError as error:
                failed[sidecar] = reason_of(error)
                return
            if found.digest != self._digest:
                failed[sidecar] = f"the version {version} in its store has other weights"
            starts = itertools.accumulate(ranks, initial=0)
            self._brought |= {t.engine.name: (sidecar, found, start) for t, start in zip(here, starts, strict=False)}

        at: dict[Sidecar, list[PublishTarget]] = {}
        for target in targets:
            at.setdefault(self._sidecar_of[target.engine.name], []).append(target)
        async with asyncio.TaskGroup() as group:
            for sidecar, here in at.items():
                group.create_task(bring(sidecar, here))
        unreached: dict[str, EngineError] = {}
        for target in targets:
            name = target.engine.name
            if (reason := failed.get(sidecar := self._sidecar_of[name])) is not None:
                unreached[name] = EngineFailed(name, f"{sidecar.name} did not bring version {version}: {reason}")
        return unreached

    def _bucket_for(self, target: PublishTarget) -> DiskBucket:
        sidecar, found, start = self._brought[target.engine.name]
        ranks = target.info.ranks

        async def read(deadline: float) -> Sequence[bytes]:
            return await sidecar.answers(start, ranks, deadline=deadline)

        changes = Changes(found.changes, found.base) if found.changes else None
        answers = RankAnswers(found.answers[start : start + ranks], read) if found.answers else None
        return DiskBucket(found.path, found.digest, changes, answers)

    async def close(self) -> None:
        """Close the clients. The versions stay in the store and on the hosts of the sidecars."""
        await self._securing.ended()
        await asyncio.gather(*(sidecar.close() for sidecar in self._sidecars.values()))


class _Thread:
    """Runs one function at a time in a thread. A function runs to its end, even if the waiting task is cancelled."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` after the earlier work has ended, and return its result."""
        await self.ended()
        task = self._task = asyncio.create_task(asyncio.to_thread(work))
        return await asyncio.shield(task)

    async def ended(self) -> None:
        """Wait until the work has ended. Its exception is not raised."""
        if self._task is not None:
            await asyncio.wait([self._task])
