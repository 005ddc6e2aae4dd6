"""The port to a protocol of agents: how requests are read, and how answers are written."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from millrace.errors import MillraceError
from millrace.gateway.answer import Answer, Delta
from millrace.gateway.call import ModelCall


class RequestError(MillraceError):
    """A request can't be answered.

    status: of the HTTP response. code: the machine-readable reason, such as `context_length_exceeded`.
    """

    def __init__(self, message: str, *, status: int = 400, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ContextFull(RequestError):
    """The prompt leaves no room for an answer. tokens: of the prompt. limit: the context length."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. Your messages have {tokens} tokens.",
            code="context_length_exceeded",
        )
        self.tokens = tokens
        self.limit = limit


class Stream(Protocol):
    """Writes the events of one streamed answer."""

    def begin(self, answer_id: str, created: int) -> bytes:
        """Return the events before the first token."""
        ...

    def delta(self, delta: Delta) -> bytes:
        """Return the events for what the stream adds."""
        ...

    def end(self, answer: Answer) -> bytes:
        """Return the events after the last token."""
        ...

    def ping(self) -> bytes:
        """Return an event without meaning, which keeps the connection open."""
        ...

    def error(self, error: RequestError) -> bytes:
        """Return the events for an error after the stream has begun."""
        ...


class AgentProtocol(Protocol):
    """One protocol, such as OpenAI's chat completions."""

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> ModelCall:
        """Return the request of a body. Raises RequestError."""
        ...

    def answer(self, call: ModelCall, answer: Answer) -> Mapping[str, object]:
        """Return the body of an answer."""
        ...

    def stream(self, call: ModelCall, model: str) -> Stream:
        """Return what writes a streamed answer to the request."""
        ...

    def error(self, error: RequestError) -> Mapping[str, object]:
        """Return the body of an error."""
        ...


def event(data: bytes, name: str | None = None) -> bytes:
    """Return a server-sent event."""
    return (b"event: " + name.encode() + b"\n" if name else b"") + b"data: " + data + b"\n\n"


def dropped(body: Mapping[str, Any], known: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the fields that a request has and the gateway does not know."""
    return tuple(sorted(key for key, value in body.items() if key not in known and value is not None))
