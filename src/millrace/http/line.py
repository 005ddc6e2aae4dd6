"""The calls of one client that wait for a connection."""

import asyncio
from collections import deque

POLL_SECONDS = 0.1  # between two looks whether something else has given back what is lacking


class Line:
    """First come, first served. When a call ends, its connection is free and the next call in line tries. A timer lets
    further calls try, twice as many each time, until one of them is turned back."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._burst = 1

    def __bool__(self) -> bool:
        """Whether some wait."""
        return bool(self._waiting)

    async def wait(self, seconds: float, *, again: bool) -> None:
        """Returns when it is the caller's turn to try. A call that waits `again`, because it was turned back, gets the
        first place. Raises TimeoutError after `seconds`."""
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
            if turn.done() and not turn.cancelled():  # it was let through, and does not go
                self.admit()
            raise

    def admit(self, count: int = 1) -> None:
        """Lets the first `count` try."""
        while count > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                count -= 1

    def close(self) -> None:
        """Lets all try, which a closed client refuses."""
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
