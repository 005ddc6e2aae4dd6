"""A fleet that another process owns: snapshots come from the owner over HTTP; requests go directly to the engines."""

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
from millrace.types import FinishReason, GenerateRequest, Generation, MemoryTag, RoutingContext

POLL_SECONDS = 20.0  # for which the owner delays its answer while nothing changes
ANSWER_DEADLINE = 10.0  # seconds for the owner to answer
RETRY_SECONDS = 0.5  # after a failed poll

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FleetState:
    """The state of a fleet that its owner sends to its followers. `number` and `members` are those of its snapshot."""

    number: int
    members: tuple[ReplicaState, ...]
    coming: tuple[str, ...]
    asleep: tuple[MemoryTag, ...]
    engines: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A follower's report of a call that failed through the engine's own fault."""

    engine: str
    reason: str


class Followed(ReplicaSet):
    """The replicas as the owner at `url` last reported them. Routing uses this while the owner does not answer."""

    def __init__(self, url: str, key: str) -> None:
        super().__init__(Snapshot(-1, ()), {})
        self._owner = HttpClient("the fleet's owner", url, api_key=key)
        self._state = TypeAdapter(FleetState)
        self._fetching = asyncio.Lock()

    async def suspect(self, name: str, error: EngineError) -> None:
        """Report the failed call to the owner, which decides on the engine's state.

        If the owner does not answer, this process sends no more requests to the engine for now.
        """
        body = {"engine": name, "reason": str(error)}
        try:
            await self._owner.control("POST", "/failure", body, deadline=ANSWER_DEADLINE, repeatable=True)
            await self.refresh()
        except EngineError as silence:
            logger.warning(
                "no more requests are sent to %s for now, since its failure can't be reported: %s", name, silence
            )
            states = (
                after(state, CallFailed(str(error), MAX_FAILURES)) if state.name == name else state
                for state in self.snapshot.replicas
            )
            await self.show(Snapshot(self.snapshot.number, tuple(states)))

    async def answered(self, name: str) -> None:
        """Do nothing: the owner probes its engines itself."""

    async def refresh(self, *, since: int = -1) -> None:
        """Fetch the owner's state. With `since`, wait for a snapshot after that number, for POLL_SECONDS at most."""
        deadline = ANSWER_DEADLINE + (POLL_SECONDS if since >= 0 else 0.0)
        answer = await self._owner.control("GET", f"/state?after={since}", deadline=deadline, repeatable=True)
        try:
            received = self._state.validate_python(answer)
        except ValidationError as error:
            reason = f"its answer is not the state of a fleet: {error.errors()[0]['msg']}"
            raise EngineFailed(self._owner.name, reason) from None
        async with self._fetching:
            if received.number < self.snapshot.number:
                return
            await self._connect(received.engines)
            self.coming, self.asleep = set(received.coming), frozenset(received.asleep)
            states = tuple(state for state in received.members if state.name in self.by_name)
            await self.show(Snapshot(received.number, states))

    async def follow(self) -> None:
        """Fetch the owner's state whenever it changes, until cancelled."""
        silent = False
        while True:
            try:
                await self.refresh(since=self.snapshot.number)
                silent = False
            except EngineError as error:
                if not silent:
                    logger.warning("routing continues with the last known state of the fleet: %s", error)
                silent = True
                await asyncio.sleep(RETRY_SECONDS)

    async def close(self) -> None:
        """Close the connections to the engines and to the owner."""
        await asyncio.gather(*(replica.end() for replica in self.by_name.values()))
        await self._owner.close()

    async def _connect(self, addresses: tuple[Address, ...]) -> None:
        """Connect to the engines that are new or have a new URL, and disconnect from those that have left."""
        wanted = {address.name: address for address in addresses}
        for name, replica in list(self.by_name.items()):
            if name not in wanted or wanted[name].url != replica.engine.url:
                await self.by_name.pop(name).end()
        for name in wanted.keys() - self.by_name.keys():
            try:
                self.by_name[name] = await reach(wanted[name])
            except EngineError as error:
                logger.warning("no requests are sent to %s for now, since it can't be reached: %s", name, error)


class Follower(FleetClient):
    """A client of a fleet that another process owns. Open one with `Follower.open`.

    It sends requests to the engines. Only the owner can publish, put engines to sleep, wake, start and end them.
    """

    def __init__(self, followed: Followed, event_log: EventLog, seed: int) -> None:
        super().__init__(followed, event_log, seed)
        self._followed = followed

    @classmethod
    @asynccontextmanager
    async def open(
        cls, url: str, key: str, *, event_log: EventLog | None = None, seed: int = 0
    ) -> "AsyncIterator[Follower]":
        """Follow the fleet whose owner answers at `url`, while the context is open.

        Args:
            url: Where the owner answers (`millrace.serve.owner.own`).
            key: The owner's key.
            event_log: The event log of this process, which the caller closes. By default events are only counted.
            seed: Decides between equal engines. Give each process another one.

        Raises:
            EngineError: The owner does not answer, or refuses the key.
            ConfigError: The host of `url` is unknown.

        Example:

            async with Follower.open("http://10.0.0.5:9200", key, seed=rank) as follower:
                await follower.reached(version, deadline=60.0)
                generation = await follower.generate(request, deadline=120.0)
        """
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

    async def _generate(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> Generation:
        made = await super()._generate(request, routing, deadline)
        if made.finish_reason is FinishReason.ABORT:
            with suppress(EngineError):  # the owner does not answer, which `follow` logs
                await self._followed.refresh()  # so that `asleep` shows whether the owner aborted it
        return made

    async def reached(self, version: int, *, deadline: float) -> None:
        """Wait until an engine serves `version` or a later one.

        Raises NoEngineError if none does within `deadline` seconds, or if no engine is left.
        """
        wanted = RoutingContext(min_version=version)
        await self.replicas.until(
            lambda: any(wanted.admits(state.version) for state in self.snapshot.routable.values()),
            deadline,
            wanted.describe(),
        )
