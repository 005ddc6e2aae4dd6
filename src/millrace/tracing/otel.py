"""Spans by OpenTelemetry's SDK, sent by OTLP over HTTP. Only `open_tracing` imports this module."""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span as OpenSpan
from opentelemetry.trace import Status, StatusCode, set_span_in_context

from millrace import __version__
from millrace.config.tracking import TracingConfig
from millrace.tracing import Attributes, Span

logger = logging.getLogger(__name__)


class OtelSpan(Span):
    """A span that the SDK records."""

    def __init__(self, span: OpenSpan) -> None:
        self.span = span

    def set(self, attributes: Attributes) -> None:
        """See `Span.set`."""
        self.span.set_attributes(attributes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """See `Span.__exit__`."""
        if kind is not None:
            self.span.set_status(Status(StatusCode.ERROR, kind.__name__))
            self.span.set_attribute("error.type", kind.__name__)
        self.span.end()


class OtelTracer:
    """Records spans by a provider of its own, so that those of other libraries in this process stay apart.

    The SDK's processor has a queue of bounded length and a thread, so no caller waits. When it is full, spans are lost.
    """

    def __init__(self, provider: TracerProvider, ratio: float) -> None:
        self.ratio = ratio
        self._provider = provider
        self._tracer = provider.get_tracer("millrace", __version__)

    @classmethod
    def sending(cls, config: TracingConfig, run: str, rank: int) -> "OtelTracer":
        """Return a tracer that sends to the collector of the settings."""
        resource = Resource.create({"millrace.run": run, "millrace.rank": rank})
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # the environment names none
            resource = resource.merge(Resource({SERVICE_NAME: "millrace"}))
        # The SDK would log each batch that can't be sent; `_Warning` says it once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        exporter = OTLPSpanExporter(config.endpoint and f"{config.endpoint.rstrip('/')}/v1/traces")
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(_Warning(exporter, config.endpoint)))
        return cls(provider, config.ratio)

    def begin(self, name: str, attributes: Attributes, parent: Span | None) -> Span:
        """See `Tracer.begin`."""
        context = set_span_in_context(parent.span) if isinstance(parent, OtelSpan) else None
        return OtelSpan(self._tracer.start_span(name, context, attributes=attributes))

    def add(self, name: str, attributes: Attributes, parent: Span, started: int, ended: int) -> None:
        """See `Tracer.add`."""
        assert isinstance(parent, OtelSpan)
        context = set_span_in_context(parent.span)
        self._tracer.start_span(name, context, attributes=attributes, start_time=started).end(ended)

    def close(self, closed: Callable[[], object]) -> None:
        """Send what is not sent yet, in a thread, and then call `closed`."""

        def close() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the caller has waited long enough, and its event loop has ended
                closed()

        threading.Thread(target=close, name="closing-traces", daemon=True).start()


class _Warning(SpanExporter):
    """Passes spans on, and logs the first time that they can't be sent."""

    def __init__(self, exporter: SpanExporter, endpoint: str | None) -> None:
        self._exporter, self._warned = exporter, False
        self._where = endpoint or "the endpoint of OTEL_EXPORTER_OTLP_ENDPOINT, or http://localhost:4318"

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch."""
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS and not self._warned:
            self._warned = True
            logger.warning(
                "traces can't be sent to %s; check that a collector takes OTLP over HTTP there (tracing.endpoint). "
                "The run continues. The traces of this time are lost",
                self._where,
            )
        return result

    def shutdown(self) -> None:
        """End."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what waits."""
        return self._exporter.force_flush(timeout_millis)
