"""The generations that an adapter has in flight.

They wait while admission to the server is closed, continue after an update that interrupted them, and end on abort.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from millrace.continuation import Continuation, call_id
from millrace.engines.stock.state import TORN, ServerState
from millrace.errors import EngineRefused, EngineTimeout
from millrace.types import GenerateRequest


@dataclass(slots=True)
class Call:
    """A generation in flight, as one or more successive requests to the server."""

    continuation: Continuation
    turn: int = 0  # makes the id of each request to the server unique
    sent: bool = False  # the server has it now
    interrupted: bool = False  # by an update; it continues afterwards
    aborted: bool = False  # by a call of `abort`

    @property
    def request_id(self) -> str:
        return self.continuation.request.request_id

    @property
    def served_as(self) -> str:
        """The id of the current request on the server."""
        return call_id(self.request_id, self.turn)

    @property
    def rest(self) -> GenerateRequest:
        """The next request to the server."""
        return replace(self.continuation.rest, request_id=self.served_as)


class Calls:
    """The generations of one adapter. `state`: the state of its server, as its control calls left it."""

    def __init__(self, engine: str) -> None:
        self.state = ServerState()
        self._engine = engine
        self._calls: dict[str, Call] = {}
        self._turns = itertools.count()
        self._changed = asyncio.Condition()
        self._returned = asyncio.Event()  # set when the server has answered a request

    @contextmanager
    def register(self, request: GenerateRequest) -> Iterator[Call]:
        """Track a generation until the block ends.

        Raises EngineRefused if a request of that id is in flight: `abort` could not tell them apart.
        """
        if request.request_id in self._calls:
            raise EngineRefused(self._engine, f"request {request.request_id} is in flight already")
        call = self._calls[request.request_id] = Call(Continuation(request))
        try:
            yield call
        finally:
            del self._calls[request.request_id]
            self._returned.set()

    @property
    def sent(self) -> Sequence[str]:
        """The ids on the server of the requests that it has now."""
        return [call.served_as for call in self._calls.values() if call.sent]

    async def until_returned(self, served: Sequence[str], seconds: float) -> None:
        """Wait until the server has answered these requests, at most for some seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not set(served).isdisjoint(self.sent):
                    self._returned.clear()
                    await self._returned.wait()

    async def may_send(self, call: Call, end: float) -> bool:
        """Wait for admission, and return whether to send the (next) request to the server.

        Raises EngineTimeout if admission is still closed at `end` (time.monotonic), and EngineRefused if the server's
        weights are a mixture of versions.
        """
        call.sent = False
        self._returned.set()
        if call.continuation.parts:
            if not (call.continuation.aborted and call.interrupted):
                return False
            call.interrupted = False
        if self.state.admission_closed:
            await self._wait_until_admitted(call, end)
        if self.state.torn:
            raise EngineRefused(self._engine, f"request {call.request_id}: {TORN}")
        call.turn = next(self._turns)
        call.sent = not call.aborted
        return call.sent

    async def _wait_until_admitted(self, call: Call, end: float) -> None:
        try:
            async with asyncio.timeout(end - time.monotonic()), self._changed:
                await self._changed.wait_for(lambda: call.aborted or not self.state.admission_closed)
        except TimeoutError:
            raise EngineTimeout(
                self._engine, f"request {call.request_id} waited until its deadline: {self.state.describe()}"
            ) from None

    async def enter(self, state: ServerState) -> None:
        """Set the state, and wake the generations that wait for admission."""
        self.state = state
        async with self._changed:
            self._changed.notify_all()

    async def abort(self, request_id: str | None) -> Sequence[str]:
        """End the generations that wait here. Return the ids on the server of those that the server must abort."""
        chosen = [call for name, call in self._calls.items() if request_id in (None, name)]
        for call in chosen:
            call.aborted = True
        await self.enter(self.state)
        return [call.served_as for call in chosen if call.sent]

    def rewrite(self, rule: Callable[[GenerateRequest], GenerateRequest]) -> None:
        """Apply `rule` to every generation in flight. It takes effect with the next request to the server."""
        for call in self._calls.values():
            call.continuation.request = rule(call.continuation.request)

    def interrupt(self) -> None:
        """Mark the generations that the server has: they are about to return partial output and continue later."""
        for call in self._calls.values():
            call.interrupted = call.sent
