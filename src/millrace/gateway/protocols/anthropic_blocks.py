"""The blocks of Anthropic's messages, read as chat messages.

A message of the user may hold tools' results and text: the results become messages of their own, before the text.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from millrace.gateway.call import ToolUse
from millrace.gateway.protocols.base import RequestError
from millrace.gateway.protocols.fields import arguments_of, content_of, merged, refused, turn_of
from millrace.rollout.sample import Message

BILLING = "x-anthropic-billing-header:"  # Claude Code's note to Anthropic, with a new hash in each request


def system_of(system: object) -> Iterator[Message]:
    """Yield the message of a request's system prompt, if it has one. Raises RequestError."""
    blocks = [] if system is None else _blocks(system)
    texts = [text for block in blocks if (text := _text(block)) and not text.startswith(BILLING)]
    if texts:
        yield {"role": "system", "content": "\n\n".join(texts)}


def messages_of(messages: Sequence[object], unread: list[str]) -> Iterator[Message]:
    """Yield the messages of a request. unread: gets the names of blocks that are left out. Raises RequestError."""
    yield from merged(made for message in messages for made in _messages(message, unread))


def _messages(message: object, unread: list[str]) -> Iterator[Message]:
    match message:
        case {"role": "user", "content": content}:
            yield from _user(_blocks(content))
        case {"role": "assistant", "content": content}:
            yield _assistant(_blocks(content), unread)
        case {"role": "system", "content": content}:
            yield from system_of(content)
        case {"role": str(role), "content": _}:
            raise RequestError(f"a message of the role {role!r} is not supported")
        case _:
            raise RequestError("each message needs a role and a content")


def _user(blocks: Sequence[Any]) -> Iterator[Message]:
    rest: list[object] = []
    for block in blocks:
        match block:
            case {"type": "tool_result", "tool_use_id": str(call_id)}:
                content = content_of(block.get("content"))
                if block.get("is_error"):
                    content = _marked(content)
                yield {"role": "tool", "content": content, "tool_call_id": call_id}
            case _:
                rest.append(block)
    if rest or not blocks:
        yield {"role": "user", "content": content_of(rest)}


def _assistant(blocks: Sequence[object], unread: list[str]) -> Message:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "thinking", "thinking": str(thought)}:
                thoughts.append(thought)
            case {"type": "redacted_thinking"}:
                unread.append("content:redacted_thinking")
            case {"type": "tool_use", "id": str(call_id), "name": str(name), "input": dict(given)}:
                calls.append(ToolUse(call_id, name, arguments_of(given)))
            case _:
                raise refused(block, "a block")
    return turn_of("".join(texts), "\n\n".join(filter(None, thoughts)), calls)


def _marked(content: str | list[dict[str, object]]) -> str | list[dict[str, object]]:
    """Return a tool's answer that is an error so that its text says so: chat templates have no mark for it."""
    text = content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)
    if text.lstrip().lower().startswith("error"):
        return content
    mark = "Error: "
    return mark + content if isinstance(content, str) else [{"type": "text", "text": mark}, *content]


def _blocks(content: object) -> Sequence[Any]:
    match content:
        case str():
            return [{"type": "text", "text": content}]
        case list():
            return content
    raise RequestError("the content of a message is a text or a list of blocks")


def _text(block: object) -> str:
    match block:
        case {"type": "text", "text": str(text)}:
            return text
    raise refused(block, "a block of a system prompt")
