"""The model thread, which owns the Core. The event loop sends it commands and gets results back."""

import asyncio
import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from millrace.engines.embedded.core import Core, Refused, Status
from millrace.engines.embedded.lora import Linears
from millrace.engines.embedded.runner import ModelInfo
from millrace.engines.embedded.scheduler import Output
from millrace.engines.embedded.weights import WeightStore

T = TypeVar("T")
STATUS_INTERVAL = 0.01  # seconds; the most that the status lags while only tokens change
BATCHING_DELAY = 0.002  # seconds that an idle engine waits for more requests, so that one pass prefills them together
CALL_DEADLINE = 30.0  # seconds; a command waits for one step, which takes seconds on a large model and a slow CPU


@dataclass(frozen=True, slots=True)
class Loaded:
    """The parts of a Core that other threads may use. See WeightStore for its own rules."""

    info: ModelInfo
    weights: WeightStore
    linears: Linears


class ModelThread:
    """The thread that steps the core while it has work, and runs commands between steps.

    deliver: called in the event loop with the outputs of a step. ended: called in the event loop when the thread has
    ended. The reason is on stderr by then.
    """

    def __init__(
        self,
        build: Callable[[], Core],
        loop: asyncio.AbstractEventLoop,
        *,
        deliver: Callable[[list[tuple[str, Output]]], None],
        ended: Callable[[], None],
    ) -> None:
        self.ready: asyncio.Future[Loaded] = loop.create_future()
        self._status: Status | None = None  # immutable; the model thread replaces it
        self._status_due = 0.0
        self._stopped = False
        self.alive = True
        self._build, self._loop, self._deliver, self._ended = build, loop, deliver, ended
        self._pending: set[asyncio.Future[Any]] = set()
        self._commands: queue.SimpleQueue[Callable[[Core], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step. Unfinished requests get no answer."""

        def run(core: Core) -> None:  # noqa: ARG001
            self._stopped = True

        self._commands.put(run)

    async def call(self, command: Callable[[Core], T], *, deadline: float = CALL_DEADLINE) -> T:
        """Run a command between two steps. Return its result or raise its exception.

        A command that has not begun by the deadline never begins. This call then raises Refused with status 503.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run(core: Core) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = command(core)
            except Exception as error:  # the caller gets it
                self._publish(core, changed=True)
                future.set_exception(error)
            else:
                self._publish(core, changed=True)
                future.set_result(result)

        answer = asyncio.wrap_future(future)
        self._pending.add(answer)
        self._commands.put(run)
        try:
            return await asyncio.wait_for(answer, deadline)
        except TimeoutError:
            raise Refused(f"the model thread has not answered within {deadline:.0f} s", status=503) from None
        finally:
            self._pending.discard(answer)

    def post(self, command: Callable[[Core], Any]) -> None:
        """Run a command between two steps, without waiting. It must not raise: that would end the thread."""

        def run(core: Core) -> None:
            command(core)

        self._commands.put(run)

    def current(self) -> Status:
        """Return the engine's state after its last step or command. Call it only after `ready` has a result."""
        assert self._status is not None
        return self._status

    def _main(self) -> None:
        try:
            core = self._build()
        except Exception as error:  # loading can raise anything; `ready` gets the reason
            self._loop.call_soon_threadsafe(self.ready.set_exception, error)
            return
        try:
            self._publish(core, changed=True)
            self._loop.call_soon_threadsafe(self.ready.set_result, Loaded(core.info, core.weights, core.linears))
            self._serve(core)
        finally:  # an exception propagates to threading's hook, which prints it
            with suppress(RuntimeError):  # the loop is closed when the process ends
                self._loop.call_soon_threadsafe(self._end)

    def _serve(self, core: Core) -> None:
        while not self._stopped:
            if not core.has_work:
                self._wait(core)
            while not self._commands.empty():
                self._commands.get()(core)
            if core.has_work:
                core.step()
            self._publish(core, changed=not core.has_work)

    def _wait(self, core: Core) -> None:
        self._commands.get()(core)
        if core.has_work:
            time.sleep(BATCHING_DELAY)

    def _publish(self, core: Core, *, changed: bool) -> None:
        """Publish the status and the outputs. changed: more than tokens has changed, so the status must be current."""
        now = time.monotonic()
        if changed or core.outbox or now >= self._status_due:
            self._status, self._status_due = core.status(), now + STATUS_INTERVAL
        if core.outbox:
            outbox, core.outbox = core.outbox, []
            self._loop.call_soon_threadsafe(self._deliver, outbox)

    def _end(self) -> None:
        self.alive = False
        for answer in self._pending:
            if not answer.done():
                answer.set_exception(Refused("the model thread has ended; the reason is in the log", status=500))
        self._ended()
