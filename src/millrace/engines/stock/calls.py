"""The generations that an adapter has under way: held back while the server must not see them, interrupted by updates
and continued, ended by aborts."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from millrace.continuation import Continuation, call_id
from millrace.engines.stock.state import TORN, ServerState
from millrace.errors import EngineRefused, EngineTimeout
from millrace.types import GenerateRequest


@dataclass(slots=True)
class Call:
    """A generation under way, in one or more requests to the server."""

    continuation: Continuation
    turn: int = 0  # makes the id of each request to the server a new one
    sent: bool = False  # the server has it now
    interrupted: bool = False  # by an update, after which it goes on
    aborted: bool = False  # by somebody who wants it to end

    @property
    def request_id(self) -> str:
        return self.continuation.request.request_id

    @property
    def served_as(self) -> str:
        """The id of the current request to the server."""
        return call_id(self.request_id, self.turn)

    @property
    def rest(self) -> GenerateRequest:
        return replace(self.continuation.rest, request_id=self.served_as)


class Calls:
    """All of one adapter's. `state` is what the adapter has brought its server into."""

    def __init__(self, engine: str) -> None:
        self.state = ServerState()
        self._engine = engine
        self._calls: dict[str, Call] = {}
        self._turns = itertools.count()
        self._changed = asyncio.Condition()

    @contextmanager
    def register(self, request: GenerateRequest) -> Iterator[Call]:
        """Raises EngineRefused where a request of that name is under way: an abort could not tell them apart."""
        if request.request_id in self._calls:
            raise EngineRefused(self._engine, f"request {request.request_id} is in flight already")
        call = self._calls[request.request_id] = Call(Continuation(request))
        try:
            yield call
        finally:
            del self._calls[request.request_id]

    @property
    def sent(self) -> Sequence[str]:
        """What the server has, by the server's names."""
        return [call.served_as for call in self._calls.values() if call.sent]

    async def go_on(self, call: Call, end: float) -> bool:
        """Whether there is (more) to ask of the server. Waits until `end` (time.monotonic) as long as the server must
        not see a request; raises EngineTimeout then, and EngineRefused where its weights are of no version."""
        call.sent = False
        if call.continuation.parts:
            if not (call.continuation.aborted and call.interrupted):
                return False
            call.interrupted = False
        if self.state.held:
            await self._until_released(call, end)
        if self.state.torn:
            raise EngineRefused(self._engine, f"request {call.request_id}: {TORN}")
        call.turn = next(self._turns)
        call.sent = not call.aborted
        return call.sent

    async def _until_released(self, call: Call, end: float) -> None:
        try:
            async with asyncio.timeout(end - time.monotonic()), self._changed:
                await self._changed.wait_for(lambda: call.aborted or not self.state.held)
        except TimeoutError:
            raise EngineTimeout(
                self._engine, f"request {call.request_id} waited until its deadline: {self.state.describe()}"
            ) from None

    async def enter(self, state: ServerState) -> None:
        self.state = state
        async with self._changed:
            self._changed.notify_all()

    async def abort(self, request_id: str | None) -> Sequence[str]:
        """Ends what waits here. Returns what the server has, by the server's names: that the server must end."""
        chosen = [call for name, call in self._calls.items() if request_id in (None, name)]
        for call in chosen:
            call.aborted = True
        await self.enter(self.state)
        return [call.served_as for call in chosen if call.sent]

    def rewrite(self, rule: Callable[[GenerateRequest], GenerateRequest]) -> None:
        """Changes what has not come back yet, from its next request to the server on."""
        for call in self._calls.values():
            call.continuation.request = rule(call.continuation.request)

    def interrupt(self) -> None:
        """What the server has is about to come back in part, and is to go on later."""
        for call in self._calls.values():
            call.interrupted = call.sent
