"""The answers of Anthropic's messages: whole, as events, and errors."""

from collections.abc import Mapping

import orjson

from millrace.gateway.answer import Alternative, Answer, Delta, Finish, Usage
from millrace.gateway.call import ModelCall, ToolUse
from millrace.gateway.protocols.base import ContextFull, RequestError, event

REASONS = {
    Finish.STOP: "end_turn", Finish.STOP_TEXT: "stop_sequence", Finish.LENGTH: "max_tokens",
    Finish.TOOL_CALLS: "tool_use",
}  # fmt: skip
ERRORS = {
    401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
    529: "overloaded_error",
}  # fmt: skip
SIGNATURE = "bWlsbHJhY2U="  # of thinking: agents drop thinking without one


class AnthropicStream:
    """The events of one answer: a block starts, grows, and stops before the next one."""

    def __init__(self, call: ModelCall, model: str) -> None:
        self._call, self._model = call, call.model or model
        self._place = -1  # of the last block
        self._open: str | None = None  # the type of the block that grows
        self._said = False  # whether there is a block besides the reasoning

    def begin(self, answer_id: str, created: int) -> bytes:  # noqa: ARG002
        message = {**_head(answer_id, self._model), "content": [], **_stopped(None), "usage": usage_of(Usage())}
        return _event("message_start", message=message)

    def delta(self, delta: Delta) -> bytes:
        made = b""
        if delta.reasoning and self._call.reasoning:
            made += self._grow("thinking", "thinking_delta", delta.reasoning)
        if delta.content:
            made += self._grow("text", "text_delta", delta.content)
        if delta.call:
            made += self._called(delta.call)
        return made

    def end(self, answer: Answer) -> bytes:
        (one,) = answer.alternatives
        made = self._close()
        if not self._said:
            made += self._start({"type": "text", "text": ""}) + self._close()
        changes = _stopped(one)
        made += _event("message_delta", delta=changes, usage=usage_of(answer.usage))
        return made + _event("message_stop")

    def ping(self) -> bytes:
        return _event("ping")

    def error(self, error: RequestError) -> bytes:
        return event(orjson.dumps(error_of(error)), "error")

    def _start(self, block: Mapping[str, object]) -> bytes:
        self._place += 1
        self._open = str(block["type"])
        self._said = self._said or self._open != "thinking"
        return _event("content_block_start", index=self._place, content_block=block)

    def _grow(self, block: str, delta: str, text: str) -> bytes:
        """Return the events for text of a type of block, which is started if another one grows."""
        made = b""
        if self._open != block:
            empty = {"signature": ""} if block == "thinking" else {}
            made = self._close() + self._start({"type": block, block: "", **empty})
        return made + _event("content_block_delta", index=self._place, delta={"type": delta, block: text})

    def _called(self, use: ToolUse) -> bytes:
        made = self._close() + self._start({"type": "tool_use", "id": use.id, "name": use.name, "input": {}})
        delta = {"type": "input_json_delta", "partial_json": use.arguments}
        return made + _event("content_block_delta", index=self._place, delta=delta) + self._close()

    def _close(self) -> bytes:
        block, self._open = self._open, None
        if block is None:
            return b""
        made = b""
        if block == "thinking":
            signed = {"type": "signature_delta", "signature": SIGNATURE}
            made = _event("content_block_delta", index=self._place, delta=signed)
        return made + _event("content_block_stop", index=self._place)


def answer_of(call: ModelCall, answer: Answer) -> dict[str, object]:
    """Return the body of an answer."""
    (one,) = answer.alternatives
    head = _head(answer.id, call.model or answer.model)
    return {**head, "content": _blocks(call, one), **_stopped(one), "usage": usage_of(answer.usage)}


def usage_of(counts: Usage) -> dict[str, object]:
    """Return token counts in Anthropic's form, where `input_tokens` leaves out those of the cache."""
    return {
        "input_tokens": counts.prompt - counts.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.output,
        "output_tokens_details": {"thinking_tokens": counts.reasoning},
    }


def error_of(error: RequestError) -> dict[str, object]:
    """Return the body of an error."""
    kind = ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    text = str(error)
    if isinstance(error, ContextFull):  # agents look for these words
        text = f"prompt is too long: {error.tokens} tokens > {error.limit} maximum"
    return {"type": "error", "error": {"type": kind, "message": text}}


def _blocks(call: ModelCall, one: Alternative) -> list[dict[str, object]]:
    """Return the blocks of a turn. A turn without calls has a text, even if it is empty."""
    turn = one.turn
    blocks: list[dict[str, object]] = []
    if turn.reasoning and call.reasoning:
        blocks.append({"type": "thinking", "thinking": turn.reasoning, "signature": SIGNATURE})
    if turn.content or not turn.calls:
        blocks.append({"type": "text", "text": turn.content})
    blocks.extend(
        {"type": "tool_use", "id": use.id, "name": use.name, "input": orjson.loads(use.arguments)} for use in turn.calls
    )
    return blocks


def _head(answer_id: str, model: str) -> dict[str, object]:
    return {"id": f"msg_{answer_id}", "type": "message", "role": "assistant", "model": model}


def _stopped(one: Alternative | None) -> dict[str, object]:
    """Return why an answer ended; None: it has not."""
    return {
        "stop_reason": REASONS[one.finish] if one else None,
        "stop_sequence": one.stop_text if one and one.finish is Finish.STOP_TEXT else None,
    }


def _event(kind: str, **fields: object) -> bytes:
    return event(orjson.dumps({"type": kind, **fields}), kind)
