"""The events of a streamed answer in OpenAI's responses, in the order of OpenAI's own API."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import orjson

from millrace.gateway.answer import Answer, Delta, Finish, Usage
from millrace.gateway.call import Choice, ModelCall, Tool, ToolUse
from millrace.gateway.protocols.base import RequestError, event
from millrace.gateway.protocols.response_items import (
    Item,
    call_item,
    logprobs_of,
    message_item,
    reasoning_item,
    text_part,
)


class ResponseStream:
    """The events of one answer: an item is added, grows, and is done before the next one."""

    def __init__(self, call: ModelCall, model: str) -> None:
        self._call, self._model = call, call.model or model
        self._id, self._created = "", 0
        self._number = 0  # of the next event
        self._items: list[Item] = []  # that are done
        self._open: _Text | None = None

    def begin(self, answer_id: str, created: int) -> bytes:
        self._id, self._created = answer_id, created
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, delta: Delta) -> bytes:
        made = b""
        if delta.reasoning:
            made += self._grow(_Reasoning, delta.reasoning)
        if delta.content:
            made += self._grow(_Message, delta.content)
        if delta.call:
            made += self._close() + self._called(delta.call)
        return made

    def end(self, answer: Answer) -> bytes:
        (one,) = answer.alternatives
        cut = one.finish is Finish.LENGTH
        made = b""
        if not one.turn.calls and not isinstance(self._open, _Message):
            made += self._grow(_Message, "")
        if self._call.logprobs and isinstance(self._open, _Message):
            self._open.logprobs = logprobs_of(one)
        made += self._close("incomplete" if cut else "completed")
        status = "incomplete" if cut else "completed"
        return made + self._event(f"response.{status}", response=self._response(status, answer.usage))

    def ping(self) -> bytes:
        return b": ping\n\n"

    def error(self, error: RequestError) -> bytes:
        code = error.code if error.status < 500 else "server_error"
        response = self._response("failed") | {"error": {"code": code, "message": str(error)}}
        return self._event("response.failed", response=response)

    def _response(self, status: str, usage: Usage | None = None) -> dict[str, object]:
        return response_of(self._call, self._model, self._id, self._created, status, self._items, usage)

    def _event(self, kind: str, **fields: object) -> bytes:
        made = event(orjson.dumps({"type": kind, "sequence_number": self._number, **fields}), kind)
        self._number += 1
        return made

    def _grow(self, kind: "type[_Text]", text: str) -> bytes:
        """Return the events for text of an item of a kind, which is opened if another kind is open."""
        made = b""
        if not isinstance(self._open, kind):
            made = self._close()
            self._open = kind(self._id, len(self._items), summary=self._call.summary)
            made += self._events(self._open.added())
        assert self._open is not None
        self._open.text += text
        return made + (self._events(self._open.grown(text)) if text else b"")

    def _close(self, status: str = "completed") -> bytes:
        """Return the events that end the open item, if there is one."""
        if self._open is None:
            return b""
        item, self._open = self._open, None
        made = self._events(item.done(status))
        self._items.append(item.item(status))
        return made

    def _called(self, use: ToolUse) -> bytes:
        place = len(self._items)
        item_id = f"fc_{self._id}_{place}"
        where: Item = {"item_id": item_id, "output_index": place}
        done = call_item(self._call, item_id, use)
        added = call_item(self._call, item_id, use, "", "in_progress")
        self._items.append(done)
        return self._events(
            [
                ("output_item.added", {"output_index": place, "item": added}),
                ("function_call_arguments.delta", {**where, "delta": use.arguments}),
                ("function_call_arguments.done", {**where, "name": done["name"], "arguments": use.arguments}),
                ("output_item.done", {"output_index": place, "item": done}),
            ]
        )

    def _events(self, events: "Sequence[_Event]") -> bytes:
        return b"".join(self._event(f"response.{kind}", **fields) for kind, fields in events)


_Event = tuple[str, Item]  # the name without `response.`, and the fields


class _Text(ABC):
    """An item of text that grows."""

    prefix = ""

    def __init__(self, answer_id: str, place: int, *, summary: bool) -> None:
        self.id, self.place, self.summary = f"{self.prefix}_{answer_id}_{place}", place, summary
        self.text = ""
        self.logprobs: list[Item] = []

    @abstractmethod
    def item(self, status: str) -> Item:
        """Return the whole item."""

    @abstractmethod
    def added(self) -> list[_Event]:
        """Return the events that open it."""

    @abstractmethod
    def grown(self, delta: str) -> list[_Event]:
        """Return the events for a piece of its text."""

    @abstractmethod
    def done(self, status: str) -> list[_Event]:
        """Return the events that end it."""

    def _at(self, **fields: object) -> Item:
        return {"item_id": self.id, "output_index": self.place, "content_index": 0, **fields}

    def _at_summary(self, **fields: object) -> Item:
        return {"item_id": self.id, "output_index": self.place, "summary_index": 0, **fields}


class _Message(_Text):
    prefix = "msg"

    def item(self, status: str) -> Item:
        return message_item(self.id, [text_part(self.text, self.logprobs)], status)

    def added(self) -> list[_Event]:
        return [
            ("output_item.added", {"output_index": self.place, "item": message_item(self.id, [], "in_progress")}),
            ("content_part.added", self._at(part=text_part("", []))),
        ]

    def grown(self, delta: str) -> list[_Event]:
        return [("output_text.delta", self._at(delta=delta, logprobs=[]))]

    def done(self, status: str) -> list[_Event]:
        return [
            ("output_text.done", self._at(text=self.text, logprobs=self.logprobs)),
            ("content_part.done", self._at(part=text_part(self.text, self.logprobs))),
            ("output_item.done", {"output_index": self.place, "item": self.item(status)}),
        ]


class _Reasoning(_Text):
    prefix = "rs"

    def item(self, status: str) -> Item:
        return reasoning_item(self.id, self.text, summary=self.summary, status=status)

    def added(self) -> list[_Event]:
        item = reasoning_item(self.id, None, summary=self.summary, status="in_progress")
        made: list[_Event] = [("output_item.added", {"output_index": self.place, "item": item})]
        if self.summary:
            part = {"type": "summary_text", "text": ""}
            made.append(("reasoning_summary_part.added", self._at_summary(part=part)))
        return [*made, ("content_part.added", self._at(part={"type": "reasoning_text", "text": ""}))]

    def grown(self, delta: str) -> list[_Event]:
        short = [("reasoning_summary_text.delta", self._at_summary(delta=delta))] if self.summary else []
        return [*short, ("reasoning_text.delta", self._at(delta=delta))]

    def done(self, status: str) -> list[_Event]:
        made: list[_Event] = []
        if self.summary:
            part = {"type": "summary_text", "text": self.text}
            made.append(("reasoning_summary_text.done", self._at_summary(text=self.text)))
            made.append(("reasoning_summary_part.done", self._at_summary(part=part)))
        made.append(("reasoning_text.done", self._at(text=self.text)))
        made.append(("content_part.done", self._at(part={"type": "reasoning_text", "text": self.text})))
        return [*made, ("output_item.done", {"output_index": self.place, "item": self.item(status)})]


def response_of(
    call: ModelCall,
    model: str,
    answer_id: str,
    created: int,
    status: str,
    items: Sequence[Item],
    usage: Usage | None,
) -> dict[str, object]:
    """Return a response object, with the settings of the request in it."""
    text = {"type": "text"} if call.schema is None else {"type": "json_schema", "name": "schema", "schema": call.schema}
    return {
        "id": f"resp_{answer_id}",
        "object": "response",
        "created_at": created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "max_output_tokens": call.wanted.max_tokens,
        "metadata": {},
        "model": model,
        "output": list(items),
        "parallel_tool_calls": call.choice.parallel,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": call.wanted.temperature,
        "text": {"format": text},
        "tool_choice": _choice(call.choice),
        "tools": [_tool(tool) for tool in call.tools],
        "top_p": call.wanted.top_p,
        "truncation": "disabled",
        "usage": None if usage is None else _usage(usage),
    }


def _usage(counts: Usage) -> dict[str, object]:
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
        "output_tokens": counts.output,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.prompt + counts.output,
    }


def _choice(choice: Choice) -> object:
    if choice.name is not None:
        return {"type": "function", "name": choice.name}
    return "required" if choice.required else "auto" if choice.allowed else "none"


def _tool(tool: Tool) -> Mapping[str, object]:
    function = tool["function"]
    assert isinstance(function, Mapping)
    return {"type": "function", **function, "strict": False}
