"""A fleet that another process owns: its snapshots come over HTTP, and requests go straight to its engines."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from millrace.engines.reach import Address, reach
from millrace.errors import EngineError, EngineFailed
from millrace.fleet.client import FleetClient
from millrace.fleet.event_log import EventLog
from millrace.fleet.replica_state import MAX_FAILURES, CallFailed, ReplicaState, Snapshot, after
from millrace.fleet.replicas import ReplicaSet
from millrace.http.client import HttpClient
from millrace.http.hosts import require_known
from millrace.http.local import raise_file_limit
from millrace.types import ANYWHERE, FinishReason, GenerateRequest, Generation, MemoryTag, RoutingContext

POLL_SECONDS = 20.0  # that the owner keeps a question when nothing changes
ANSWER_DEADLINE = 10.0
RETRY_SECONDS = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FleetState:
    """What the owner of a fleet tells those that follow it. `number` is its snapshot's."""

    number: int
    members: tuple[ReplicaState, ...]
    coming: tuple[str, ...]
    asleep: tuple[MemoryTag, ...]
    engines: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that failed by the engine's own fault."""

    engine: str
    reason: str


class Followed(ReplicaSet):
    """What the owner at `url` said last. It goes on routing from that while the owner does not answer."""

    def __init__(self, url: str, key: str) -> None:
        super().__init__(Snapshot(-1, ()), {})
        self._owner = HttpClient("the fleet's owner", url, api_key=key)
        self._state = TypeAdapter(FleetState)
        self._fetching = asyncio.Lock()

    async def suspect(self, name: str, error: EngineError) -> None:
        """Tells the owner, who judges. While that does not answer, nothing more is sent to the engine."""
        body = {"engine": name, "reason": str(error)}
        try:
            await self._owner.control("POST", "/failure", body, deadline=ANSWER_DEADLINE, repeatable=True)
            await self.refresh()
        except EngineError as silence:
            logger.warning("%s is suspect, and %s", name, silence)
            members = (
                after(m, CallFailed(str(error), MAX_FAILURES)) if m.name == name else m for m in self.snapshot.members
            )
            await self.show(Snapshot(self.snapshot.number, tuple(members)))

    async def answered(self, name: str) -> None:
        """The owner asks by itself."""

    async def refresh(self, *, since: int = -1) -> None:
        """What the owner says now, or as soon as it has more than snapshot number `since`."""
        deadline = ANSWER_DEADLINE + (POLL_SECONDS if since >= 0 else 0.0)
        said = await self._owner.control("GET", f"/state?after={since}", deadline=deadline, repeatable=True)
        try:
            state = self._state.validate_python(said)
        except ValidationError as error:
            reason = f"what it answers is no fleet's state: {error.errors()[0]['msg']}"
            raise EngineFailed(self._owner.name, reason) from None
        async with self._fetching:
            if state.number < self.snapshot.number:
                return
            await self._know(state.engines)
            self.coming, self.asleep = set(state.coming), frozenset(state.asleep)
            known = tuple(member for member in state.members if member.name in self.replicas)
            await self.show(Snapshot(state.number, known))

    async def follow(self) -> None:
        """For ever."""
        silent = False
        while True:
            try:
                await self.refresh(since=self.snapshot.number)
                silent = False
            except EngineError as error:
                if not silent:
                    logger.warning("routing goes on as it was: %s", error)
                silent = True
                await asyncio.sleep(RETRY_SECONDS)

    async def close(self) -> None:
        await asyncio.gather(*(replica.end() for replica in self.replicas.values()))
        await self._owner.close()

    async def _know(self, addresses: tuple[Address, ...]) -> None:
        """Connects to the engines that are new, or have been started anew elsewhere."""
        wanted = {address.name: address for address in addresses}
        for name, replica in list(self.replicas.items()):
            if name not in wanted or wanted[name].url != replica.engine.url:
                await self.replicas.pop(name).end()
        for name in wanted.keys() - self.replicas.keys():
            try:
                self.replicas[name] = await reach(wanted[name])
            except EngineError as error:
                logger.warning("%s is left out for now: %s", name, error)


class Follower(FleetClient):
    """Made by `Follower.open`. What it can't: publish, sleep, wake, start and end engines, which is its owner's."""

    def __init__(self, followed: Followed, event_log: EventLog, seed: int) -> None:
        super().__init__(followed, event_log, seed)
        self._followed = followed

    @classmethod
    @asynccontextmanager
    async def open(
        cls, url: str, key: str, *, event_log: EventLog | None = None, seed: int = 0
    ) -> "AsyncIterator[Follower]":
        """Follows the fleet whose owner answers at `url` to those who know `key` (`millrace.serve.owner`). Raises
        EngineError where it does not, and ConfigError where the host of `url` is not known."""
        await require_known("url", [url])
        raise_file_limit()
        followed = Followed(url, key)
        following: asyncio.Task[None] | None = None
        try:
            await followed.refresh()
            following = asyncio.create_task(followed.follow())
            yield cls(followed, event_log if event_log is not None else EventLog(), seed)
        finally:
            followed.closed = True
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
            await followed.close()

    async def generate(
        self, request: GenerateRequest, *, deadline: float, routing: RoutingContext = ANYWHERE
    ) -> Generation:
        made = await super().generate(request, deadline=deadline, routing=routing)
        if made.finish_reason is FinishReason.ABORT:
            with suppress(EngineError):  # the owner is silent, which `follow` tells
                await self._followed.refresh()  # so that `asleep` says whether the owner wanted it
        return made

    async def reached(self, version: int, *, deadline: float) -> None:
        """Waits until an engine serves `version` or a later one."""
        wanted = RoutingContext(min_version=version)
        await self.members.until(
            lambda: any(wanted.admits(m.version) for m in self.snapshot.routable.values()), deadline, wanted.describe()
        )
