"""The fields of requests that several protocols share, and what is refused in all of them."""

import base64
import binascii
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson

from millrace.gateway.call import ModelCall, Tool, ToolUse, Wanted
from millrace.gateway.protocols.base import RequestError, dropped
from millrace.rollout.sample import Message


def checked(call: ModelCall) -> ModelCall:
    """Return a request that a model can answer. Raises RequestError."""
    if not call.messages:
        raise RequestError("the request has no messages")
    if call.messages[-1]["role"] == "assistant":
        raise RequestError(
            "the last message is the assistant's: the gateway does not continue a turn that the agent began",
            code="prefill_not_supported",
        )
    names = [name for tool in call.tools for name in _names(tool)]
    if call.choice.required and not names:
        raise RequestError("tool_choice asks for a tool call, and the request has no functions")
    if call.choice.name is not None and call.choice.name not in names:
        raise RequestError(f"tool_choice names {call.choice.name!r}, which is none of the request's functions")
    return call


def model_of(body: Mapping[str, Any]) -> str:
    """Return the name of the model in the body; empty if it has none. Raises RequestError.

    The answer has the same name: Claude Code drops the reasoning of an answer that has another.
    """
    return _typed(body, "model", str, "a text") or ""


def listed(body: Mapping[str, Any], name: str) -> Sequence[Any]:
    """Return a list of the body; an empty one if it is absent. Raises RequestError."""
    return _typed(body, name, list, "a list") or ()


def nested(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an object in the body; an empty one if it is absent. Raises RequestError."""
    return _typed(body, name, dict, "an object") or {}


def unknown(body: Mapping[str, Any], name: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the fields in an object of the body that the gateway does not know. Raises RequestError."""
    return tuple(f"{name}.{key}" for key in dropped(nested(body, name), known))


def whole(body: Mapping[str, Any], name: str) -> int | None:
    """Return a positive integer of the body. Raises RequestError."""
    value: int | None = _typed(body, name, int, "a positive integer")
    if value is not None and value < 1:
        raise RequestError(f"{name} is a positive integer")
    return value


def wanted_of(body: Mapping[str, Any], max_tokens: int | None, stop: object) -> Wanted:
    """Return the sampling parameters of a body. Raises RequestError."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise RequestError("stop texts are a list of texts that are not empty")
    try:
        biases = {int(token): float(bias) for token, bias in nested(body, "logit_bias").items()}
    except (TypeError, ValueError) as error:
        raise RequestError(f"logit_bias is an object of token ids and numbers: {error}") from error
    return Wanted(
        max_tokens=max_tokens,
        temperature=_real(body, "temperature"),
        top_p=_real(body, "top_p"),
        top_k=_typed(body, "top_k", int, "an integer"),
        min_p=_real(body, "min_p"),
        seed=_typed(body, "seed", int, "an integer"),
        stop=tuple(stops),
        repetition_penalty=_real(body, "repetition_penalty"),
        frequency_penalty=_real(body, "frequency_penalty"),
        presence_penalty=_real(body, "presence_penalty"),
        logit_bias=biases,
    )


def content_of(content: object, between: str = "\n") -> str | list[dict[str, object]]:
    """Return the content of a message: a text, or parts if it has images. Raises RequestError.

    between: what comes between parts of text, which agents do not end with white space.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise RequestError("the content of a message is a text or a list of parts")
    parts = [_part(part) for part in content]
    if all(part["type"] == "text" for part in parts):
        return between.join(str(part["text"]) for part in parts)
    return parts


def decoded(data: str) -> bytes:
    """Return the bytes of a base64 text. Raises RequestError."""
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"an image is no base64: {error}", code="unsupported_image") from error


def refused(part: object, where: str) -> RequestError:
    """Return the error for a part of a request that the gateway does not read."""
    match part:
        case {"type": str(kind)}:
            return RequestError(
                f"{where} of the type {kind!r} is not supported, or lacks a field", code="unsupported_content"
            )
    return RequestError(f"{where} needs a type")


def function_tool(name: str, description: object, parameters: object) -> Tool:
    """Return a function as chat templates take it."""
    schema = parameters if isinstance(parameters, Mapping) else {"type": "object", "properties": {}}
    return {
        "type": "function",
        "function": {"name": name, "description": str(description or ""), "parameters": schema},
    }


def turn_of(content: str | list[dict[str, object]], reasoning: str = "", calls: Iterable[ToolUse] = ()) -> Message:
    """Return a turn of the model as an agent replays it, in the gateway's form."""
    made: dict[str, object] = {"role": "assistant", "content": content}
    if reasoning:
        made["reasoning"] = reasoning
    if uses := [call.message for call in calls]:
        made["tool_calls"] = uses
    return made


def merged(messages: Iterable[Message]) -> Iterator[Message]:
    """Yield messages so that adjacent ones of the assistant are one: protocols write a turn as several items."""
    for role, group in itertools.groupby(messages, lambda message: message["role"]):
        together = list(group)
        if role == "assistant" and len(together) > 1:
            yield _joined(together)
        else:
            yield from together


def _joined(turns: Sequence[Message]) -> Message:
    contents = [turn["content"] for turn in turns]
    thoughts = [str(turn["reasoning"]) for turn in turns if "reasoning" in turn]
    parts = [part for content in contents for part in _parts(content)]
    made: dict[str, object] = {"role": "assistant", "content": content_of(parts, "")}
    if thoughts:
        made["reasoning"] = "\n\n".join(thoughts)
    if calls := [call for turn in turns for call in _parts(turn.get("tool_calls", ()))]:
        made["tool_calls"] = calls
    return made


def _parts(content: object) -> Sequence[object]:
    if isinstance(content, str):
        return [content]
    return content if isinstance(content, list | tuple) else ()


def _part(part: Any) -> dict[str, object]:
    match part:
        case str():
            return {"type": "text", "text": part}
        case {"type": "text" | "input_text" | "output_text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "refusal", "refusal": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image", "image": bytes()}:  # read before
            return {"type": "image", "image": part["image"]}
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            return {"type": "image", "image": _image(url)}
        case {"type": "image_url" | "input_image", "image_url": str(url)}:
            return {"type": "image", "image": _image(url)}
        case {"type": "image", "source": {"type": "base64", "data": str(data)}}:
            return {"type": "image", "image": decoded(data)}
        case {"type": "image", "source": {"type": "url", "url": str(url)}}:
            return {"type": "image", "image": _image(url)}
    raise refused(part, "a part of a message")


def _image(url: str) -> bytes:
    """Return the content of the image in a data URL. Raises RequestError: nothing is downloaded for an agent."""
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise RequestError("images are sent as base64 data URLs; the gateway downloads none", code="unsupported_image")
    return decoded(data)


def arguments_of(arguments: object) -> str:
    """Return the arguments of a tool call as a JSON text."""
    return arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()


def _real(body: Mapping[str, Any], name: str) -> float | None:
    value = _typed(body, name, (int, float), "a number")
    return None if value is None else float(value)


def _typed(body: Mapping[str, Any], name: str, kinds: type | tuple[type, ...], what: str) -> Any:
    value = body.get(name)
    if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
        raise RequestError(f"{name} is {what}")
    return value


def _names(tool: Tool) -> Iterator[str]:
    match tool:
        case {"function": {"name": str(name)}}:
            yield name
