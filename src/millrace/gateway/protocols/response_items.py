"""The items of OpenAI's responses: the conversation in a request's input, and the turn in an answer's output.

The API writes one turn of the model as several items: the reasoning, a message, and a function call each. Agents send
them back one after the other, so adjacent items of the model are one turn.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from millrace.gateway.answer import Alternative, Finish
from millrace.gateway.call import ModelCall, ToolUse
from millrace.gateway.protocols.base import RequestError
from millrace.gateway.protocols.fields import content_of, listed, merged, refused, turn_of
from millrace.rollout.sample import Message

Item = dict[str, object]

NO_REFERENCES = "items by reference are not supported: the gateway keeps no items, send each as it was returned"


def system_of(instructions: object) -> Iterator[Message]:
    """Yield the message of a request's instructions, if it has any. Raises RequestError."""
    if instructions is None or instructions == "":
        return
    if not isinstance(instructions, str):
        raise RequestError("instructions are a text")
    yield {"role": "system", "content": instructions}


def messages_of(given: object) -> Iterator[Message]:
    """Yield the messages of a request's input. Raises RequestError."""
    if isinstance(given, str):
        yield {"role": "user", "content": given}
    elif isinstance(given, list) and given:
        yield from merged(_message(item) for item in given)
    else:
        raise RequestError("input is a text or a list of items that is not empty")


def items_of(answer_id: str, call: ModelCall, one: Alternative) -> list[Item]:
    """Return the output items of a turn. A turn without calls has a message, even if its text is empty."""
    turn, items = one.turn, []
    if turn.reasoning:
        items.append(reasoning_item(f"rs_{answer_id}_0", turn.reasoning, summary=call.summary))
    if turn.content or not turn.calls:
        status = "incomplete" if one.finish is Finish.LENGTH and not turn.calls else "completed"
        part = text_part(turn.content, logprobs_of(one) if call.logprobs else [])
        items.append(message_item(f"msg_{answer_id}_{len(items)}", [part], status))
    items.extend(call_item(call, f"fc_{answer_id}_{place}", use) for place, use in enumerate(turn.calls, len(items)))
    return items


def reasoning_item(item_id: str, text: str | None, *, summary: bool, status: str = "completed") -> Item:
    """Return a reasoning item. text: None while it has none."""
    parts = [] if text is None else [{"type": "reasoning_text", "text": text}]
    short = [] if text is None or not summary else [{"type": "summary_text", "text": text}]
    return {"id": item_id, "type": "reasoning", "status": status, "summary": short, "content": parts}


def message_item(item_id: str, parts: list[Item], status: str = "completed") -> Item:
    """Return a message of the model."""
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": parts}


def text_part(text: str, logprobs: list[Item]) -> Item:
    """Return the text of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def call_item(
    call: ModelCall, item_id: str, use: ToolUse, arguments: str | None = None, status: str = "completed"
) -> Item:
    """Return a function call. arguments: None for those of the call."""
    space = call.namespaces.get(use.name)
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "call_id": use.id,
        "name": use.name.removeprefix(flat_name("", space)),
        **({} if space is None else {"namespace": space}),
        "arguments": use.arguments if arguments is None else arguments,
    }


def flat_name(name: str, namespace: object) -> str:
    """Return the name of a function with its namespace, if it has one."""
    return f"{namespace}__{name}" if isinstance(namespace, str) else name


def logprobs_of(one: Alternative) -> list[Item]:
    """Return the logprobs of an answer's tokens, those of its reasoning and calls included."""
    return [
        {"token": text, "logprob": float(logprob), "bytes": list(text.encode()), "top_logprobs": []}
        for text, logprob in zip(one.token_texts, one.logprobs, strict=True)
    ]


def _message(item: Any) -> Message:
    match item:
        case {"type": "reasoning"}:
            return turn_of("", _thought(item))
        case {"type": "function_call", "call_id": str(call_id), "name": str(name), "arguments": str(arguments)}:
            return turn_of("", calls=[ToolUse(call_id, flat_name(name, item.get("namespace")), arguments)])
        case {"type": "function_call_output", "call_id": str(call_id), "output": output}:
            return {"role": "tool", "content": content_of(output), "tool_call_id": call_id}
        case {"type": "item_reference"}:
            raise RequestError(NO_REFERENCES, code="unsupported_item")
        case {"type": str(kind)} if kind != "message":
            raise refused(item, "an item")
        case {"role": "user", "content": content}:
            return {"role": "user", "content": content_of(content)}
        case {"role": "system" | "developer", "content": content}:
            return {"role": "system", "content": content_of(content)}
        case {"role": "assistant", "content": content}:
            return turn_of(content_of(content, ""))
        case {"id": str()} if "role" not in item:
            raise RequestError(NO_REFERENCES, code="unsupported_item")
    raise RequestError("an item of the input needs a type, or a role and a content")


def _thought(item: Mapping[str, Any]) -> str:
    """Return the text of a reasoning item: from its content, or else from its summary."""
    for name in ("content", "summary"):
        texts = [part["text"] for part in listed(item, name) if isinstance(part, dict) and "text" in part]
        if text := "\n\n".join(str(one) for one in texts):
            return text
    return ""
