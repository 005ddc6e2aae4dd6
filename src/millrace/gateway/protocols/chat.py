"""OpenAI's chat completions: `/v1/chat/completions`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from millrace.gateway.answer import Alternative, Answer, Delta, Finish, Usage
from millrace.gateway.call import Choice, ModelCall, Tool, ToolUse
from millrace.gateway.lineage import lineage_of
from millrace.gateway.protocols.base import RequestError, dropped, event
from millrace.gateway.protocols.fields import (
    arguments_of,
    checked,
    content_of,
    function_tool,
    listed,
    model_of,
    nested,
    turn_of,
    unknown,
    wanted_of,
    whole,
)
from millrace.rollout.sample import Message

KNOWN = (
    "model", "messages", "tools", "tool_choice", "parallel_tool_calls", "max_tokens", "max_completion_tokens",
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "logit_bias", "n", "stream", "stream_options", "logprobs", "response_format",
)  # fmt: skip
STREAM = ("include_usage", "include_obfuscation")
WITHOUT_MEANING = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
FINISHES = {
    Finish.STOP: "stop", Finish.STOP_TEXT: "stop", Finish.LENGTH: "length", Finish.TOOL_CALLS: "tool_calls"
}  # fmt: skip


class ChatCompletions:
    """The protocol."""

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> ModelCall:
        tools, hosted = tools_of(listed(body, "tools"))
        longest = whole(body, "max_completion_tokens")
        call = ModelCall(
            messages=tuple(message_of(one) for one in listed(body, "messages")),
            tools=tools,
            choice=replace(choice_of(body.get("tool_choice")), parallel=body.get("parallel_tool_calls") is not False),
            wanted=wanted_of(body, whole(body, "max_tokens") if longest is None else longest, body.get("stop")),
            n=whole(body, "n") or 1,
            stream=bool(body.get("stream")),
            logprobs=bool(body.get("logprobs")),
            schema=schema_of(body.get("response_format")),
            lineage=lineage_of(headers),
            model=model_of(body),
            dropped=(*dropped(body, (*KNOWN, *WITHOUT_MEANING)), *unknown(body, "stream_options", STREAM), *hosted),
            stream_usage=bool(nested(body, "stream_options").get("include_usage")),
        )
        return checked(call)

    def answer(self, call: ModelCall, answer: Answer) -> Mapping[str, object]:
        choices = [
            {
                "index": index,
                "message": _message(one),
                "finish_reason": FINISHES[one.finish],
                "logprobs": _logprobs(one) if call.logprobs else None,
            }
            for index, one in enumerate(answer.alternatives)
        ]
        return {
            "id": f"chatcmpl-{answer.id}",
            "object": "chat.completion",
            "created": answer.created,
            "model": call.model or answer.model,
            "choices": choices,
            "usage": usage(answer.usage),
        }

    def stream(self, call: ModelCall, model: str) -> "ChatStream":
        return ChatStream(call, model)

    def error(self, error: RequestError) -> Mapping[str, object]:
        return openai_error(error)


class ChunkStream:
    """What the streams of chat completions and completions share: all chunks of one begin with the same fields."""

    def __init__(self, call: ModelCall, model: str) -> None:
        self._call, self._model = call, call.model or model
        self._head: dict[str, object] = {}

    def ping(self) -> bytes:
        return b": ping\n\n"

    def error(self, error: RequestError) -> bytes:
        return event(orjson.dumps(openai_error(error)))

    def _event(self, *choices: Mapping[str, object], **fields: object) -> bytes:
        return event(orjson.dumps({**self._head, "choices": choices, **fields}))

    def _closed(self, chunks: Sequence[bytes], counts: Usage) -> bytes:
        """Return the last chunks, with the token counts if the request asks for them, and the end of the stream."""
        counted = [self._event(usage=usage(counts))] if self._call.stream_usage else []
        return b"".join([*chunks, *counted, b"data: [DONE]\n\n"])


class ChatStream(ChunkStream):
    """The events of one answer."""

    def begin(self, answer_id: str, created: int) -> bytes:
        self._head = {
            "id": f"chatcmpl-{answer_id}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": self._model,
        }
        return b"".join(self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self._call.n))

    def delta(self, delta: Delta) -> bytes:
        made: dict[str, object] = {}
        if delta.reasoning:
            made |= {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
        if delta.content:
            made["content"] = delta.content
        if delta.call:
            made["tool_calls"] = [{"index": delta.call_index, **delta.call.message}]
        return self._chunk(delta.index, made)

    def end(self, answer: Answer) -> bytes:
        chunks = [
            self._chunk(index, {}, FINISHES[one.finish], _logprobs(one) if self._call.logprobs else None)
            for index, one in enumerate(answer.alternatives)
        ]
        return self._closed(chunks, answer.usage)

    def _chunk(
        self, index: int, delta: Mapping[str, object], finish: str | None = None, logprobs: object = None
    ) -> bytes:
        return self._event({"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs})


def message_of(message: Any) -> Message:
    """Return a chat message in the gateway's form. Raises RequestError."""
    match message:
        case {"role": "system" | "developer", "content": content}:
            return {"role": "system", "content": content_of(content)}
        case {"role": "user", "content": content}:
            return {"role": "user", "content": content_of(content)}
        case {"role": "tool", "content": content, "tool_call_id": str(call_id)}:
            return {"role": "tool", "content": content_of(content), "tool_call_id": call_id}
        case {"role": "assistant"}:
            thought = message.get("reasoning_content") or message.get("reasoning")
            calls = [_tool_use(call) for call in listed(message, "tool_calls")]
            return turn_of(content_of(message.get("content"), ""), thought if isinstance(thought, str) else "", calls)
        case {"role": str(role)}:
            raise RequestError(f"a message of the role {role!r} is not supported, or lacks a field")
    raise RequestError("each message needs a role and a content")


def tools_of(tools: Sequence[object]) -> tuple[tuple[Tool, ...], list[str]]:
    """Return the functions among the tools, and the names of other kinds of tools, which are dropped."""
    functions: list[Tool] = []
    hosted = []
    for tool in tools:
        match tool:
            case {"type": "function", "function": {"name": str(name), **rest}}:
                functions.append(function_tool(name, rest.get("description"), rest.get("parameters")))
            case {"type": str(kind)} if kind != "function":
                hosted.append(f"tool:{kind}")
            case _:
                raise RequestError("a tool needs a type, and a function with a name")
    return tuple(functions), hosted


def choice_of(choice: object) -> Choice:
    """Return which tools may be called. Raises RequestError."""
    match choice:
        case None | "auto":
            return Choice()
        case "none":
            return Choice(allowed=False)
        case "required" | "any":
            return Choice(required=True)
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return Choice(required=True, name=name)
    raise RequestError(f"tool_choice {choice!r} is not supported")


def schema_of(response_format: object) -> Mapping[str, object] | None:
    """Return the JSON schema that the answer must match. Raises RequestError."""
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}} | {
            "type": "json_schema",
            "schema": dict(schema),
        }:
            return schema
    raise RequestError("response_format is text, json_object or json_schema with a schema")


def usage(counts: Usage) -> dict[str, object]:
    """Return token counts in OpenAI's form."""
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.output,
        "total_tokens": counts.prompt + counts.output,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning},
    }


def openai_error(error: RequestError) -> dict[str, object]:
    """Return an error in OpenAI's form."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}


def _tool_use(call: object) -> ToolUse:
    match call:
        case {"id": str(call_id), "function": {"name": str(name), "arguments": arguments}}:
            return ToolUse(call_id, name, arguments_of(arguments))
    raise RequestError("a tool call needs an id and a function with name and arguments")


def _message(one: Alternative) -> dict[str, object]:
    message: dict[str, object] = {"role": "assistant", "content": one.turn.content or None, "refusal": None}
    if one.turn.reasoning:
        message |= {"reasoning_content": one.turn.reasoning, "reasoning": one.turn.reasoning}
    if one.turn.calls:
        message["tool_calls"] = [call.message for call in one.turn.calls]
    return message


def _logprobs(one: Alternative) -> dict[str, object]:
    content = [
        {"token": text, "logprob": float(logprob), "bytes": list(text.encode()), "top_logprobs": []}
        for text, logprob in zip(one.token_texts, one.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}
