"""Retries after an engine failure: the tokens so far are kept, and another engine generates the rest."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from millrace.continuation import Continuation, call_id, generate_in_parts
from millrace.errors import EngineFailed, EngineUnreachable, LocalError
from millrace.fleet.event_log import EventLog
from millrace.types import FinishReason, GenerateRequest, Generation

Send = Callable[[GenerateRequest], Awaitable[Generation]]
Open = Callable[[GenerateRequest], AsyncGenerator[Generation, None]]


@dataclass(slots=True)
class Attempts:
    """The retries of one request or one sample. `left`: how many remain. `used`: how many were needed. Each goes to
    `event_log`."""

    left: int
    event_log: EventLog
    used: int = 0

    def spend(self, error: Exception | None, *, continued: bool) -> bool:
        """Count a retry. Return False if none is left.

        error: what failed; None for an abort. continued: whether the tokens so far are kept.
        """
        if not self.left:
            return False
        self.left -= 1
        self.used += 1
        engine = error.engine if isinstance(error, EngineUnreachable | EngineFailed) else None
        self.event_log.retried(engine, attempt=self.used, continued=continued)
        return True


async def generate_whole(
    request: GenerateRequest, send: Send, attempts: Attempts, *, interrupted: Callable[[], bool] = lambda: False
) -> Generation:
    """Generate, and continue on another engine if one dies or aborts the request.

    Each failure costs a retry. Without one left, an error is raised, and an aborted generation is returned. An abort
    while `interrupted()` is expected and costs none.
    """
    sent = 0

    async def call(rest: GenerateRequest) -> Generation | None:
        nonlocal sent
        if sent:
            rest = replace(rest, request_id=call_id(request.request_id, sent))
        sent += 1
        try:
            return await send(rest)
        except (EngineUnreachable, EngineFailed, LocalError) as error:
            if not attempts.spend(error, continued=True):
                raise
            return None

    return await generate_in_parts(request, call, goes_on=lambda: interrupted() or attempts.spend(None, continued=True))


async def stream_whole(
    request: GenerateRequest, open_stream: Open, attempts: Attempts, *, interrupted: Callable[[], bool] = lambda: False
) -> AsyncGenerator[Generation, None]:
    """Stream the cumulative output, and continue on another engine as `generate_whole` does."""
    continuation, sent = Continuation(request), 0
    while True:
        rest = continuation.rest
        part: Generation | None = None
        failed: Exception | None = None
        try:
            async with aclosing(
                open_stream(replace(rest, request_id=call_id(request.request_id, sent)) if sent else rest)
            ) as stream:
                async for part in stream:
                    if part.finish_reason is FinishReason.ABORT:
                        yield continuation.with_part(part)
        except (EngineUnreachable, EngineFailed, LocalError) as error:
            failed = error
        sent += 1
        if part is not None:
            continuation.add(part if failed is None else replace(part, finish_reason=FinishReason.ABORT))
        if part is not None and not continuation.aborted:
            yield continuation.result
            return
        if (failed is not None or not interrupted()) and not attempts.spend(failed, continued=True):
            if failed is not None:
                raise failed
            yield continuation.result
            return
