"""A fleet that another process owns: snapshots come from the owner over HTTP; requests go directly to the engines."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from pydantic import TypeAdapter, ValidationError

from millrace import arguments
from millrace.engines.reach import Address, reach
from millrace.errors import (
    EngineError,
    EngineFailed,
    EngineRefused,
    EngineTimeout,
    EngineUnreachable,
    LocalError,
    OwnerError,
    PublishError,
)
from millrace.fleet.client import FleetClient
from millrace.fleet.event_log import EventLog
from millrace.fleet.labels import Label
from millrace.fleet.replica_state import MAX_FAILURES, Answered, CallFailed, Phase, ReplicaState, Snapshot, after
from millrace.fleet.replicas import ReplicaSet
from millrace.http.client import HttpClient
from millrace.http.hosts import require_known
from millrace.http.local import raise_file_limit
from millrace.types import EngineInfo, FinishReason, GenerateRequest, Generation, Health, MemoryTag, RoutingContext

POLL_SECONDS = 20.0  # for which the owner delays its answer while nothing changes
ANSWER_DEADLINE = 10.0  # seconds for the owner to answer
RETRY_SECONDS = 0.5  # after a failed poll
CONNECTED_AT_ONCE = 32  # engines
DEMAND_SECONDS = 1.0  # between two reports of the requests that wait

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetState:
    """The state of a fleet that its owner sends to its followers.

    `owner`: distinguishes this owner from an earlier one at the same URL. `number` and `members` are those of its
    snapshot. `version`: the last published version. `labels`: the labels of the published versions. `elastic`: whether
    engines are started when requests wait. `last_info`: what the last engine reported, while there is none.
    """

    owner: str
    number: int
    version: int | None
    labels: Mapping[int, Label]
    members: tuple[ReplicaState, ...]
    coming: tuple[str, ...]
    asleep: tuple[MemoryTag, ...]
    engines: tuple[Address, ...]
    elastic: bool = False
    last_info: EngineInfo | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """The number of a follower's requests that wait for an engine. `process` identifies the follower."""

    process: str
    waiting: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A follower's report of a call that failed through the engine's own fault."""

    engine: str
    reason: str


class Followed(ReplicaSet):
    """The replicas as the owner at `url` last reported them. Routing uses this while the owner does not answer.

    `version`: the last version that the owner published.
    """

    def __init__(self, url: str, key: str) -> None:
        super().__init__(Snapshot(-1, ()), {})
        self.version: int | None = None
        self._owner = HttpClient("the fleet's owner", url, api_key=key)
        self._owner_id = ""
        self._addresses: dict[str, Address] = {}  # of the engines in `by_name`
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

    async def leaves(self, name: str) -> bool:
        with suppress(EngineError):  # the owner does not answer, which `follow` logs
            await self.refresh()
        return await super().leaves(name)

    async def refresh(self, *, changed: bool = False) -> None:
        """Fetch the owner's state. With `changed`, wait until it differs from the last one, for POLL_SECONDS at most.

        The state of a new owner replaces that of the one before.
        """
        path, deadline = "/state", ANSWER_DEADLINE
        if changed:
            path, deadline = f"/state?after={self.snapshot.number}&owner={self._owner_id}", deadline + POLL_SECONDS
        answer = await self._owner.control("GET", path, deadline=deadline, repeatable=True)
        try:
            received = self._state.validate_python(answer)
        except ValidationError as error:
            reason = f"its answer is not the state of a fleet: {error.errors()[0]['msg']}"
            raise EngineFailed(self._owner.name, reason) from None
        async with self._fetching:
            if received.owner == self._owner_id and received.number < self.snapshot.number:
                return
            await self._connect(received.engines)
            self.coming, self.asleep = set(received.coming), frozenset(received.asleep)
            self.elastic, self._last_info = received.elastic, received.last_info or self._last_info
            self._owner_id, self.version = received.owner, received.version
            for version, label in received.labels.items():  # those of an earlier owner stay
                self.labels.put(version, label)
            states = tuple(state for state in received.members if state.name in self.by_name)
            await self.show(Snapshot(received.number, states))

    async def follow(self) -> None:
        """Fetch the owner's state whenever it changes, until cancelled."""
        silent = False
        while True:
            try:
                await self.refresh(changed=True)
                silent = False
            except EngineError as error:
                if not silent:
                    logger.warning("routing continues with the last known state of the fleet: %s", error)
                silent = True
                await self._recheck()
                await asyncio.sleep(RETRY_SECONDS)

    async def tell_demand(self, waiting: Callable[[], int]) -> None:
        """Tell the owner of an elastic fleet how many requests wait here for an engine, until cancelled."""
        process, told = secrets.token_hex(8), 0
        while True:
            now = waiting() if self.elastic else 0
            if now or told:
                with suppress(EngineError):  # `follow` logs that the owner is silent
                    body = {"process": process, "waiting": now}
                    await self._owner.control("POST", "/demand", body, deadline=ANSWER_DEADLINE, repeatable=True)
                    told = now
            await asyncio.sleep(DEMAND_SECONDS)

    async def _recheck(self) -> None:
        """Send requests again to suspect engines that are ready, since no owner probes them."""
        for name in [state.name for state in self.snapshot.replicas if state.phase is Phase.SUSPECT]:
            if await self.by_name[name].engine.health() is Health.READY:
                states = (after(s, Answered()) if s.name == name else s for s in self.snapshot.replicas)
                await self.show(Snapshot(self.snapshot.number, tuple(states)))

    async def close(self) -> None:
        """Close the connections to the engines and to the owner."""
        await asyncio.gather(*(replica.end() for replica in self.by_name.values()))
        await self._owner.close()

    async def _connect(self, addresses: tuple[Address, ...]) -> None:
        """Connect to the engines that are new or have a new address, and disconnect from those that have left."""
        wanted = {address.name: address for address in addresses}
        for name in list(self.by_name):
            if wanted.get(name) != self._addresses[name]:
                await self.forget(name).end()
        free = asyncio.Semaphore(CONNECTED_AT_ONCE)

        async def connect(address: Address) -> None:
            try:
                async with free:
                    self.by_name[address.name] = await reach(address)
                self._addresses[address.name] = address
            except EngineError as error:
                logger.warning("no requests are sent to %s for now, since it can't be reached: %s", address.name, error)

        async with asyncio.TaskGroup() as group:
            for name in wanted.keys() - self.by_name.keys():
                group.create_task(connect(wanted[name]))


class Follower(FleetClient):
    """A client of a fleet that another process owns. Open one with `millrace.follow_fleet`.

    It sends requests to the engines. Only the owner can publish, put engines to sleep, wake, start and end them.
    """

    def __init__(self, followed: Followed, url: str, event_log: EventLog, seed: int) -> None:
        super().__init__(followed, event_log, seed)
        self._followed, self._url = followed, url
        self._newest = -1  # the newest version that this process has seen in a generation

    @property
    def version(self) -> int | None:
        return self._followed.version

    async def _generate(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> Generation:
        made = await super()._generate(request, routing, deadline)
        newest = max((span.version for span in made.version_spans if span.version is not None), default=-1)
        unknown = newest > max(self._newest, -1 if self.version is None else self.version)
        self._newest = max(self._newest, newest)
        if unknown or made.finish_reason is FinishReason.ABORT:
            with suppress(EngineError):  # the owner does not answer, which `follow` logs
                # So that `asleep` shows whether the owner aborted it, and `labels` has the label of its version.
                await self._followed.refresh()
        return made

    async def publish(self, *args: object, **kwargs: object) -> NoReturn:  # noqa: ARG002
        """Raise PublishError: only the process that owns the fleet can publish."""
        raise PublishError(
            f"this process follows the fleet at {self._url} and can't publish; publish in the process that owns the "
            "fleet, which opened it with open_fleet"
        )

    async def publish_lora(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise PublishError: only the process that owns the fleet can publish."""
        await self.publish(*args, **kwargs)


@asynccontextmanager
async def follow_fleet(
    url: str, key: str, *, event_log: EventLog | None = None, seed: int | None = None
) -> AsyncIterator[Follower]:
    """Follow a fleet that another process shares (`Fleet.share`), while the context is open.

    The follower sends its requests directly to the engines. If the owner ends, the follower continues with the last
    known state of the engines, until an owner answers at the same URL with the same key. This process's soft limit of
    open files is raised to its hard limit (docs/faults.md).

    Args:
        url: The URL of the shared fleet.
        key: The key of the shared fleet.
        event_log: The event log of this process, which the caller closes. By default events are only counted.
        seed: Decides between equal engines. By default it differs between processes.

    Raises:
        OwnerError: No owner of a fleet answers at `url`, or it refuses the key.
        ConfigError: `url` is not a server's URL, or its host is unknown.
        ArgumentError: Another argument has the wrong type.

    Example:

        async with follow_fleet("http://10.0.0.5:9200", key) as fleet:
            await fleet.reached(version, deadline=60.0)
            generation = await fleet.generate(request, deadline=120.0)
    """
    url, key = arguments.text("url", url), arguments.text("key", key)
    seed = secrets.randbits(32) if seed is None else arguments.whole("seed", seed)
    await require_known("url", [url])
    raise_file_limit()
    followed = Followed(url, key)
    tasks: list[asyncio.Task[None]] = []
    try:
        try:
            await followed.refresh()
        except EngineError as error:
            raise not_owner(url, error) from error
        follower = Follower(followed, url, event_log if event_log is not None else EventLog(), seed)
        tasks.append(asyncio.create_task(followed.follow()))
        tasks.append(asyncio.create_task(followed.tell_demand(lambda: follower._admission.demand)))
        try:
            yield follower
        finally:
            followed.closed = True
            await follower._admission.close()
    finally:
        followed.closed = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await followed.close()


def not_owner(url: str, error: EngineError) -> OwnerError:
    """Return the error for a URL at which a fleet can't be followed. `error` is that of the first call."""
    reason = str(error).removeprefix(f"engine {error.engine}: ")
    match error:
        case LocalError():
            return OwnerError(f"the fleet at {url} can't be followed: {error.reason}")
        case EngineRefused() if "HTTP 401" in reason:
            return OwnerError(f"the owner of the fleet at {url} refuses the key; pass the key of its Fleet.share")
        case EngineUnreachable() | EngineTimeout():
            return OwnerError(f"no owner of a fleet answers at {url} ({reason}); share a fleet there first")
    return OwnerError(f"the server at {url} is not the owner of a fleet: {reason}")
