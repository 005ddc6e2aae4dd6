"""The queue of a fleet's requests: each leaves it for the engine that suits it best, once that engine has room."""

import asyncio
import itertools
import logging
import time
from bisect import insort
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter

from millrace.engines.start import Replica
from millrace.errors import EngineError, EngineTimeout, NoEngineError
from millrace.fleet.event_log import EventLog
from millrace.fleet.headroom import Correction, Flight, Forecast, Held, OutputLengths, Survival, compared, most_requests
from millrace.fleet.replicas import ReplicaSet
from millrace.fleet.routing import Choice, RoutingPolicy, admissible
from millrace.types import EngineLoad, FinishReason, GenerateRequest, Generation, RoutingContext

REPORT_SECONDS = 0.5  # between two reports of an engine's load, while requests run or wait
REPORT_DEADLINE = 2.0  # seconds for one report
SURVIVAL_SECONDS = 0.25  # for which the shares of longer outputs are used again: they change slowly
TIMED = 64  # newest finished requests of an engine that give its speed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A request's place on an engine. size: the tokens of its prompt and its room for output."""

    engine: str
    flight: Flight
    size: int


@dataclass(slots=True)
class _Room:
    """What this process knows of the room on one engine, in one of its lives."""

    replica: Replica
    places: dict[Place, Flight] = field(default_factory=dict)  # in the order in which they were taken
    alike: Counter[int] = field(default_factory=Counter)  # of these, by their prompts
    worst: int = 0  # tokens of the flights if all make the most that they may
    most: int = 1  # the largest limit on output tokens so far
    load: EngineLoad | None = None
    read: float = 0.0  # when the load was asked for (time.monotonic)
    correction: Correction = field(default_factory=Correction)
    timed: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=TIMED))
    forecast: Forecast | None = None  # None: it must be computed again
    refused: Flight | None = None  # did not fit, and the forecast has not become better since
    survival: Survival | None = None
    survival_at: float = 0.0  # when it was computed (time.monotonic)

    @property
    def speed(self) -> float:
        """The output tokens per second of one request by those that have finished; 0 if none has."""
        return sum(made for made, _ in self.timed) / max(sum(seconds for _, seconds in self.timed), 1e-6)

    @property
    def capacity(self) -> int | None:
        """The tokens of its KV cache; None if the engine does not say."""
        return self.load.max_tokens if self.load is not None else self.replica.info.cache_tokens

    def held(self, now: float) -> list[Held]:
        """Return what all requests on the engine hold, those of other clients included."""
        fix = self.correction
        speed = self.speed if fix.speed is None else fix.speed
        own = [one.held(now, speed, self.alike[one.key], fix.less) for one in self.places.values()]
        return own + [Held(fix.tokens, 0.0, self.most)] * fix.others

    def candidate(self, flight: Flight) -> Held:
        """Return what a request would hold at its start. A prompt that is there already takes no room."""
        prompt = 0 if self.alike[flight.key] else flight.prompt
        return replace(flight, prompt=prompt).held(flight.sent, 0.0, less=self.correction.less)

    def fits(self, flight: Flight, lengths: OutputLengths) -> bool:
        """Return whether there is room for a request. An engine without requests has room for any."""
        others = self.correction.others
        running = len(self.places) + others
        if not running:
            return True
        if running >= most_requests(self.replica.info.max_running, self.load):
            return False
        if (capacity := self.capacity) is None:
            return True
        if not others and self.worst + flight.worst <= capacity:
            return True
        last, shared = self.refused, bool(self.alike[flight.key])
        if last is not None and not shared and last.prompt <= flight.prompt and last.most <= flight.most:
            return False
        if flight.before + flight.most > self.most:
            self.most = flight.before + flight.most
            self.change()
        fits = self.forecasted(capacity, lengths).admits(self.candidate(flight))
        if not fits and not shared:
            self.refused = flight
        return fits

    def forecasted(self, capacity: int, lengths: OutputLengths) -> Forecast:
        """Return the forecast of what its requests will hold."""
        if self.forecast is None:
            now = time.monotonic()
            running = self.held(now)
            if self.survival is None or now - self.survival_at > SURVIVAL_SECONDS:
                self.survival, self.survival_at = lengths.survival(running, self.most), now
            self.forecast = Forecast(capacity, self.survival, self.most, running)
        return self.forecast

    def change(self) -> None:
        """Record that there may be more room than the forecast says, or less."""
        self.forecast = self.refused = None

    def add(self, place: Place) -> None:
        """Count a request that was sent."""
        flight = place.flight
        if flight.before + flight.most > self.most:
            self.most = flight.before + flight.most
            self.change()
        if self.forecast is not None:
            self.forecast.add(self.candidate(flight))
        self.places[place] = flight
        self.alike[flight.key] += 1
        self.worst += flight.worst

    def drop(self, place: Place, made: Generation | None) -> None:
        """Forget a request that has ended, and learn its speed."""
        flight = self.places.pop(place)
        self.alike -= Counter([flight.key])
        self.worst -= flight.worst
        self.change()
        if not self.places and not self.correction.others:
            self.load, self.correction = None, Correction()  # it has no queue any more
        if made is not None:
            self.timed.append((len(made.output_ids), time.monotonic() - flight.sent))

    async def report(self) -> None:
        """Read the engine's load. Without an answer, the last one counts."""
        asked, on_engine = time.monotonic(), len(self.places)
        self.read = asked
        try:
            async with asyncio.timeout(REPORT_DEADLINE):
                load = await self.replica.engine.loads()
        except (EngineError, TimeoutError) as error:
            logger.debug("admission continues without a report of the load: %s", error)
            return
        now, flights = time.monotonic(), list(self.places.values())
        self.correction = compared(
            flights, self.alike, load, asked=asked, on_engine=on_engine, now=now, speed=self.speed
        )
        self.load = load
        self.change()


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request in the queue. turn: is set to its place, or to None if no engine may serve it any more."""

    request: GenerateRequest
    routing: RoutingContext
    key: int
    order: tuple[bool, int]
    turn: asyncio.Future[Place | None]

    def flight(self, context_length: int) -> Flight:
        """Return the request as it would be sent now."""
        tokens, sampling = len(self.request.input_ids), self.request.sampling
        certain = sampling.ignore_eos and not (sampling.stop or sampling.stop_token_ids)
        most = max(min(sampling.max_new_tokens, context_length - tokens), 1)
        return Flight(tokens, self.key, self.request.continued_tokens, most, certain, time.monotonic())


class Admission:
    """Decides when and where the requests of this process run. All methods belong to one event loop.

    outstanding: by engine, the tokens of its running requests (prompts, and room for output).
    """

    def __init__(self, replicas: ReplicaSet, router: RoutingPolicy, event_log: EventLog) -> None:
        self.outstanding: Counter[str] = Counter()
        self._replicas, self._router, self._event_log = replicas, router, event_log
        self._rooms: dict[str, _Room] = {}
        self._lengths = OutputLengths()
        self._queue: list[_Waiting] = []
        self._unplaced = 0  # requests that no engine may serve now
        self._numbers = itertools.count()
        self._reading: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """The number of requests that wait for room on an engine."""
        return len(self._queue)

    @property
    def demand(self) -> int:
        """The number of requests that one more engine could serve: those that wait for room, and while no engine takes
        requests, those that wait for one."""
        return len(self._queue) + (0 if self._replicas.snapshot.routable else self._unplaced)

    def running(self, name: str) -> int:
        """Return the number of this process's requests on the engine."""
        return len(self._room(name).places)

    def headroom(self, name: str) -> int | None:
        """Return the tokens of the engine's KV cache that its requests will leave free; None if it does not say."""
        room = self._room(name)
        capacity = room.capacity
        return None if capacity is None else int(room.forecasted(capacity, self._lengths).headroom)

    async def enter(self, request: GenerateRequest, routing: RoutingContext, deadline: float) -> Place:
        """Wait for an engine that may serve the request and has room for it. Requests that continue a session go first.

        Raises NoEngineError as `ReplicaSet.until` does, and EngineTimeout if no engine has room by the deadline.
        """
        started, number, key = time.monotonic(), next(self._numbers), hash(request.input_ids)
        while True:
            left = deadline - (time.monotonic() - started)
            admits = partial(self._admits, routing)
            self._unplaced += 1
            try:
                await self._replicas.until(admits, left, routing.describe())
            finally:
                self._unplaced -= 1
            new = request.continued_tokens == 0 and self._router.home(routing) is None
            turn: asyncio.Future[Place | None] = asyncio.get_running_loop().create_future()
            waiting = _Waiting(request, routing, key, (new, number), turn)
            insort(self._queue, waiting, key=attrgetter("order"))
            self._admit()
            try:
                async with asyncio.timeout(None if turn.done() else max(left, 0.0)):
                    place = await turn
            except TimeoutError:
                self._give_up(waiting)
                raise self._no_room(routing, deadline) from None
            except BaseException:
                self._give_up(waiting)
                raise
            if place is not None:
                self._event_log.waited(time.monotonic() - started)
                return place
            if self._replicas.closed:
                raise NoEngineError.closed()

    def leave(self, place: Place, made: Generation | None) -> None:
        """End a request's stay on its engine. made: its result; None if it failed."""
        flight, room = place.flight, self._rooms.get(place.engine)
        self.outstanding[place.engine] -= place.size
        if room is not None and place in room.places:  # otherwise the engine was started again
            room.drop(place, made)
        if made is not None and not flight.certain:
            self._lengths.add(flight.before + len(made.output_ids), ended=made.finish_reason is FinishReason.STOP)
        self._admit()

    async def close(self) -> None:
        """End the reading of reports."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    def _admits(self, routing: RoutingContext) -> bool:
        return bool(admissible(self._replicas.snapshot, routing))

    def _give_up(self, waiting: _Waiting) -> None:
        """Take a request out whose caller has stopped waiting."""
        if waiting in self._queue:
            self._queue.remove(waiting)
            self._admit()
        elif not waiting.turn.cancelled() and (place := waiting.turn.result()) is not None:
            self.leave(place, None)

    def _no_room(self, routing: RoutingContext, deadline: float) -> EngineTimeout:
        names = ", ".join(admissible(self._replicas.snapshot, routing)) or "of the fleet"
        running = sum(len(room.places) for room in self._rooms.values())
        return EngineTimeout(
            names,
            f"no room for the request within {deadline:.0f} s: {running} requests of this process run, and "
            f"{len(self._queue)} more wait for room",
        )

    def _admit(self) -> None:
        """Send every request whose turn it is. A request waits if one before it waits for the same engines."""
        context_length = min((one.info.context_length for one in self._replicas.by_name.values()), default=0)
        full: set[str] = set()
        gone: set[_Waiting] = set()
        for waiting in self._queue:
            if waiting.turn.done():  # its caller has stopped waiting, and will take it out
                continue
            engines = admissible(self._replicas.snapshot, waiting.routing)
            if not engines or self._replicas.closed:
                waiting.turn.set_result(None)
                gone.add(waiting)
                continue
            candidates, flight = engines.keys() - full, waiting.flight(context_length)
            fitting = {name for name in candidates if self._room(name).fits(flight, self._lengths)}
            choice = self._router.choose(
                self._replicas.snapshot, self.outstanding, waiting.request, waiting.routing, among=fitting
            )
            if choice is not None:
                size = flight.prompt + waiting.request.sampling.max_new_tokens
                waiting.turn.set_result(self._take(choice, Place(choice.engine, flight, size)))
                gone.add(waiting)
                continue
            home = self._router.home(waiting.routing)
            full |= {home} if fitting and home is not None else candidates
            if full >= self._replicas.snapshot.routable.keys():
                break
        if gone:
            self._queue = [waiting for waiting in self._queue if waiting not in gone]
        self._read_while_busy()

    def _take(self, choice: Choice, place: Place) -> Place:
        self._event_log.routed(choice.why)
        self._room(choice.engine).add(place)
        self.outstanding[choice.engine] += place.size
        return place

    def _room(self, name: str) -> _Room:
        """Return what this process knows of an engine. A restarted engine gets a new, empty record."""
        replica, room = self._replicas.by_name[name], self._rooms.get(name)
        if room is None or room.replica is not replica:
            room = self._rooms[name] = _Room(replica)
        return room

    def _read_while_busy(self) -> None:
        busy = bool(self._queue) or any(room.places for room in self._rooms.values())
        if busy and self._reading is None:
            self._reading = asyncio.create_task(self._read())
        elif not busy and self._reading is not None:
            self._reading.cancel()
            self._reading = None

    async def _read(self) -> None:
        """Read the engines' loads again and again, and admit what fits then, or when the fleet has changed."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_SECONDS), self._replicas.changed:
                    await self._replicas.changed.wait()
            old = time.monotonic() - REPORT_SECONDS
            routable = self._replicas.snapshot.routable
            self._rooms = {name: room for name, room in self._rooms.items() if name in routable or room.places}
            rooms = [room for name, room in self._rooms.items() if name in routable and room.read < old]
            await asyncio.gather(*(room.report() for room in rooms))
            self._admit()
