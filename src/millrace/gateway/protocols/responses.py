"""OpenAI's responses: `/v1/responses`. The gateway keeps no responses: each request has the whole conversation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from millrace.gateway.answer import Answer, Finish
from millrace.gateway.call import Choice, ModelCall, Tool
from millrace.gateway.lineage import lineage_of
from millrace.gateway.protocols.base import RequestError, dropped
from millrace.gateway.protocols.chat import WITHOUT_MEANING, choice_of, openai_error, schema_of
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
from millrace.gateway.protocols.response_items import flat_name, items_of, messages_of, system_of
from millrace.gateway.protocols.response_stream import ResponseStream, response_of

KNOWN = (
    "model", "input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "max_output_tokens", "temperature",
    "top_p", "top_k", "min_p", "seed", "stop", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "logit_bias", "stream", "stream_options", "text", "reasoning", "include",
)  # fmt: skip
IGNORED = (*WITHOUT_MEANING, "prompt_cache_retention", "prompt_cache_options", "max_tool_calls", "client_metadata")
REFUSED = {
    "previous_response_id": "the gateway keeps no responses: send the whole conversation as input, with store=false",
    "conversation": "the gateway keeps no conversations: send the whole conversation as input",
    "prompt": "the gateway has no prompt templates: send instructions and input",
    "background": "the gateway answers while the request waits: leave background out",
}
LOGPROBS = "message.output_text.logprobs"


class Responses:
    """The protocol."""

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> ModelCall:
        for name, why in REFUSED.items():
            if body.get(name):
                raise RequestError(f"{name} is not supported: {why}", code="unsupported_parameter")
        tools, hosted, namespaces = tools_of(listed(body, "tools"))
        reasoning, text = nested(body, "reasoning"), nested(body, "text")
        call = ModelCall(
            messages=(*system_of(body.get("instructions")), *messages_of(body.get("input"))),
            tools=tools,
            choice=replace(
                response_choice(body.get("tool_choice")), parallel=body.get("parallel_tool_calls") is not False
            ),
            wanted=wanted_of(body, whole(body, "max_output_tokens"), body.get("stop")),
            stream=bool(body.get("stream")),
            logprobs=LOGPROBS in listed(body, "include"),
            schema=schema_of(text.get("format")),
            lineage=lineage_of(headers),
            model=model_of(body),
            dropped=(*dropped_of(body), *hosted),
            summary=bool(reasoning.get("summary") or reasoning.get("generate_summary")),
            namespaces=namespaces,
        )
        return checked(call)

    def answer(self, call: ModelCall, answer: Answer) -> Mapping[str, object]:
        (one,) = answer.alternatives
        items = items_of(answer.id, call, one)
        status = "incomplete" if one.finish is Finish.LENGTH else "completed"
        return response_of(call, call.model or answer.model, answer.id, answer.created, status, items, answer.usage)

    def stream(self, call: ModelCall, model: str) -> ResponseStream:
        return ResponseStream(call, model)

    def error(self, error: RequestError) -> Mapping[str, object]:
        return openai_error(error)


def dropped_of(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of what a request asks for and does not get, without its tools. Raises RequestError."""
    cut = ("truncation",) if body.get("truncation") not in (None, "disabled") else ()
    return (
        *dropped(body, (*KNOWN, *IGNORED, *REFUSED, "truncation", "top_logprobs")),
        *(("top_logprobs",) if body.get("top_logprobs") else ()),
        *cut,
        *unknown(body, "reasoning", ("summary", "generate_summary")),
        *unknown(body, "text", ("format",)),
        *unknown(body, "stream_options", ("include_obfuscation",)),
    )


def tools_of(tools: Sequence[object]) -> tuple[tuple[Tool, ...], list[str], dict[str, str]]:
    """Return the functions among the tools, the names of other kinds of tools, which are dropped, and the namespaces.

    The functions of a namespace get names with it (`flat_name`), because chat templates know no namespaces.
    """
    functions: list[Tool] = []
    others: list[str] = []
    namespaces: dict[str, str] = {}
    for tool, space in _with_namespaces(tools):
        match tool:
            case {"type": "function", "name": str(name), **rest}:
                if space is not None:
                    name = flat_name(name, space)
                    namespaces[name] = space
                functions.append(function_tool(name, rest.get("description"), rest.get("parameters")))
            case {"type": str(kind)} if kind != "function":
                others.append(f"tool:{kind}")
            case _:
                of = "" if space is None else f" of the namespace {space}"
                raise RequestError(f"a tool{of} needs a type, and a function a name")
    return tuple(functions), others, namespaces


def _with_namespaces(tools: Sequence[object]) -> Iterator[tuple[object, str | None]]:
    """Yield the tools, those in a namespace one by one with its name."""
    for tool in tools:
        match tool:
            case {"type": "namespace", "name": str(space), "tools": list(inner)}:
                yield from ((one, space) for one in inner)
            case _:
                yield tool, None


def response_choice(choice: object) -> Choice:
    """Return which tools may be called. Raises RequestError."""
    match choice:
        case {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": str(name)}]}:
            return Choice(required=True, name=name)
    return choice_of(choice)
