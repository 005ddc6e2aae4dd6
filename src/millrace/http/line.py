"""The queue of one client's calls that wait for a connection."""

import asyncio
from collections import deque

POLL_SECONDS = 0.1  # how often waiting calls try whether the missing resource is available again


class Line:
    """A first-in, first-out queue of calls that wait for a connection.

    When a call ends, its connection is free and the next call in line tries. A timer lets further calls try, twice as
    many each time, until one of them fails.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._burst = 1

    def __bool__(self) -> bool:
        """Whether any call is waiting."""
        return bool(self._waiting)

    async def wait(self, seconds: float, *, again: bool) -> None:
        """Wait until it is the caller's turn to try. Raises TimeoutError after `seconds`.

        A call that has tried and failed passes `again`, and gets the first place in line.
        """
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        if again:
            self._burst = 1
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        if self._timer is None:
            self._timer = loop.call_later(POLL_SECONDS, self._poll)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException:
            if turn.done() and not turn.cancelled():  # it was admitted but gives up, so the next one goes
                self.admit()
            raise

    def admit(self, count: int = 1) -> None:
        """Let the first `count` calls try."""
        while count > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                count -= 1

    def close(self) -> None:
        """Release all waiting calls. Their client is closed, and refuses them."""
        self.admit(len(self._waiting))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _poll(self) -> None:
        self._timer = None
        self.admit(self._burst)
        self._burst *= 2
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(POLL_SECONDS, self._poll)
        else:
            self._burst = 1
