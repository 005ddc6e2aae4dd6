"""Traces of samples and publishes (docs/monitoring.md). Without `open_tracing`, all of this does nothing.

The code says what happens, in contexts that nest:

    with trace("sample", {"millrace.sample": "p7-0"}, ratio_by="p7-0"):
        with span("tool", {"millrace.tool": "calculator"}) as traced:
            ...
            traced.set({"millrace.failed": True})

A span belongs to the trace of its task, which the tasks that it starts inherit. No attribute contains a text of a
prompt, of the model or of an error, or a key.
"""

import asyncio
import time
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Protocol, Self

from millrace.config.tracking import TracingConfig
from millrace.imports import needs_extra

CLOSE_SECONDS = 10.0  # at the end of the run, for spans that are not sent yet

Attributes = Mapping[str, str | bool | int | float | Sequence[str] | Sequence[int]]


class Span:
    """A span that is recorded nowhere. Those of `Tracer` are."""

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the span. What an error of the block says is not recorded, only its type."""


class Tracer(Protocol):
    """What records spans (`millrace.tracing.otel`)."""

    ratio: float

    def begin(self, name: str, attributes: Attributes, parent: Span | None) -> Span:
        """Return a span that begins now, and ends with its context."""

    def add(self, name: str, attributes: Attributes, parent: Span, started: int, ended: int) -> None:
        """Add a span that has ended. Its times are in nanoseconds since 1970."""


class _Root(Span):
    """The first span of a trace, below which all others of the task are."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer, self._span = tracer, span

    def set(self, attributes: Attributes) -> None:
        self._span.set(attributes)

    def __enter__(self) -> Self:
        self._span.__enter__()
        self._token = _trace.set((self._tracer, self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _trace.reset(self._token)
        self._span.__exit__(kind, error, traceback)


Trace = tuple[Tracer, Span]
OFF = Span()
_tracer: ContextVar[Tracer | None] = ContextVar("tracer", default=None)
_trace: ContextVar[Trace | None] = ContextVar("trace", default=None)


def trace(name: str, attributes: Attributes, *, ratio_by: str | None = None) -> AbstractContextManager[Span]:
    """Return the context of a trace. ratio_by: an id, by which the trace is among the share that is recorded or not."""
    tracer = _tracer.get()
    if tracer is None or (ratio_by is not None and zlib.crc32(ratio_by.encode()) >= tracer.ratio * 2**32):
        return OFF
    return _Root(tracer, tracer.begin(name, attributes, None))


def span(name: str, attributes: Attributes | None = None) -> AbstractContextManager[Span]:
    """Return the context of a part of this task's trace. It is recorded if the trace is."""
    if (found := _trace.get()) is None:
        return OFF
    tracer, parent = found
    return tracer.begin(name, attributes or {}, parent)


def current_trace() -> Trace | None:
    """Return this task's trace, for `within`."""
    return _trace.get()


@contextmanager
def within(trace: Trace | None) -> Iterator[None]:
    """Add spans of the block, and of tasks that it starts, to the trace of another task."""
    token = _trace.set(trace)
    try:
        yield
    finally:
        _trace.reset(token)


def add_span(name: str, started: float, seconds: float, attributes: Attributes) -> None:
    """Add a part of this task's trace that has ended. started: by `time.monotonic()`."""
    if (found := _trace.get()) is None:
        return
    tracer, parent = found
    began = time.time_ns() - int((time.monotonic() - started) * 1e9)
    tracer.add(name, attributes, parent, began, began + int(seconds * 1e9))


@contextmanager
def traced_by(tracer: Tracer) -> Iterator[None]:
    """Record what this task and those below it trace in the block."""
    token = _tracer.set(tracer)
    try:
        yield
    finally:
        _tracer.reset(token)


@asynccontextmanager
async def open_tracing(config: TracingConfig | None, run: str, rank: int) -> AsyncIterator[None]:
    """Record what this task and those below it trace in the block, and send it to the collector of the settings.

    Raises ConfigError if OpenTelemetry's SDK is not installed.
    """
    if config is None:
        yield
        return
    with needs_extra("tracing"):
        from millrace.tracing.otel import OtelTracer
    tracer = OtelTracer.sending(config, run, rank)
    try:
        with traced_by(tracer):
            yield
    finally:
        closed = asyncio.Event()
        loop = asyncio.get_running_loop()
        tracer.close(lambda: loop.call_soon_threadsafe(closed.set))
        with suppress(TimeoutError):  # what is not sent by then is lost
            async with asyncio.timeout(CLOSE_SECONDS):
                await closed.wait()
