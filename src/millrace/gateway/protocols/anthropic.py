"""Anthropic's messages: `/v1/messages`, and the answer of `/v1/messages/count_tokens`."""

from collections.abc import Mapping, Sequence
from typing import Any

from millrace.gateway.answer import Answer
from millrace.gateway.call import Choice, ModelCall, Tool
from millrace.gateway.lineage import lineage_of
from millrace.gateway.protocols.anthropic_blocks import messages_of, system_of
from millrace.gateway.protocols.anthropic_stream import AnthropicStream, answer_of, error_of
from millrace.gateway.protocols.base import RequestError, dropped
from millrace.gateway.protocols.fields import (
    checked,
    function_tool,
    listed,
    model_of,
    nested,
    unknown,
    wanted_of,
    whole,
)

KNOWN = (
    "model", "messages", "system", "tools", "tool_choice", "max_tokens", "temperature", "top_p", "top_k",
    "stop_sequences", "stream", "thinking", "output_config", "output_format",
)  # fmt: skip
WITHOUT_MEANING = ("metadata", "cache_control", "service_tier", "betas", "diagnostics")


class AnthropicMessages:
    """The protocol."""

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> ModelCall:
        return checked(self.read_prompt(body, headers))

    def read_prompt(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> ModelCall:
        """Return a request whose tokens are only counted: the last message may be the assistant's.

        Raises RequestError.
        """
        tools, others = tools_of(listed(body, "tools"))
        unread: list[str] = []
        return ModelCall(
            messages=(*system_of(body.get("system")), *messages_of(listed(body, "messages"), unread)),
            tools=tools,
            choice=choice_of(nested(body, "tool_choice")),
            wanted=wanted_of(body, whole(body, "max_tokens"), body.get("stop_sequences")),
            stream=bool(body.get("stream")),
            schema=schema_of(nested(body, "output_config").get("format") or body.get("output_format")),
            lineage=lineage_of(headers),
            model=model_of(body),
            dropped=(
                *dropped(body, (*KNOWN, *WITHOUT_MEANING)),
                *unknown(body, "thinking", ("type", "display")),
                *unknown(body, "output_config", ("format",)),
                *others,
                *unread,
            ),
            reasoning=shows(nested(body, "thinking")),
        )

    def answer(self, call: ModelCall, answer: Answer) -> Mapping[str, object]:
        return answer_of(call, answer)

    def counted(self, tokens: int) -> Mapping[str, object]:
        """Return the body of an answer to `count_tokens`."""
        return {"input_tokens": tokens}

    def stream(self, call: ModelCall, model: str) -> AnthropicStream:
        return AnthropicStream(call, model)

    def error(self, error: RequestError) -> Mapping[str, object]:
        return error_of(error)


def shows(thinking: Mapping[str, Any]) -> bool:
    """Return whether the agent gets the reasoning: as in Anthropic's API, only if it asks for thinking."""
    return thinking.get("type") not in (None, "disabled") and thinking.get("display") != "omitted"


def tools_of(tools: Sequence[Any]) -> tuple[tuple[Tool, ...], list[str]]:
    """Return the tools that agents define, and the types of Anthropic's own, which are dropped."""
    functions: list[Tool] = []
    others = []
    for tool in tools:
        match tool:
            case {"name": str(name), "input_schema": dict(schema)} if tool.get("type") in (None, "custom"):
                functions.append(function_tool(name, tool.get("description"), schema))
            case {"type": str(kind)} if kind != "custom":
                others.append(f"tool:{kind}")
            case _:
                raise RequestError("a tool needs a name and an input_schema")
    return tuple(functions), others


def choice_of(choice: Mapping[str, Any]) -> Choice:
    """Return which tools may be called. Raises RequestError."""
    parallel = not choice.get("disable_parallel_tool_use")
    match choice:
        case {"type": "any"}:
            return Choice(required=True, parallel=parallel)
        case {"type": "tool", "name": str(name)}:
            return Choice(required=True, name=name, parallel=parallel)
        case {"type": "none"}:
            return Choice(allowed=False, parallel=parallel)
        case {"type": "auto"}:
            return Choice(parallel=parallel)
    if choice:
        raise RequestError("tool_choice is of the type auto, any, none, or tool with a name")
    return Choice()


def schema_of(output: object) -> Mapping[str, object] | None:
    """Return the JSON schema that the answer must match. Raises RequestError."""
    match output:
        case None:
            return None
        case {"type": "json_schema", "schema": dict(schema)}:
            return schema
    raise RequestError("the format of the output is json_schema with a schema")
