"""What an agent asks the model for, and what the model answers, in one form for all protocols."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from millrace.errors import DataError
from millrace.rollout.sample import Message

Tool = Mapping[str, object]  # OpenAI's form, which chat templates take: {"type": "function", "function": {...}}


@dataclass(frozen=True, slots=True)
class Wanted:
    """The sampling parameters that an agent gave. None: it gave none."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which tools the model may call. required: it must call one. name: it must call this one."""

    allowed: bool = True
    required: bool = False
    name: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Lineage:
    """What the headers of known agents say about a request.

    agent: id of the sub-agent that asks. parent: id of the session that started it. compaction: whether the request
    makes a summary, or follows one: agents count their context windows.
    """

    agent: str | None = None
    parent: str | None = None
    compaction: str | None = None


NO_LINEAGE = Lineage()


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One request of an agent.

    messages: as chat templates take them. The turns of the model have `content`, and may have `reasoning` and
    `tool_calls`, whose arguments are JSON texts. An image is a part `{"type": "image", "image": bytes}`. schema: a JSON
    schema that the answer must match. dropped: the names of what the request asked for and does not get. model: the
    name that the agent uses, which the answer repeats; empty if it gave none. stream_usage: whether a stream ends with
    the token counts. reasoning: whether the agent gets the reasoning. summary: whether also as a summary. prompt: a
    text or token ids that the model continues as they are, without a chat template; then the only message stands for
    it, with a role that no chat has. namespaces: of the tools that the agent knows by a namespace and a name, by their
    names here.

    fingerprints: of the messages. prefixes: a digest of each prefix of the conversation; item i is of the tools and the
    first i messages. identity: a digest of everything that decides the answer; two requests with the same one are
    retries or resamples. Making a request raises DataError if it is nested too deeply for that.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    choice: Choice = Choice()
    wanted: Wanted = Wanted()
    n: int = 1
    stream: bool = False
    logprobs: bool = False
    schema: Mapping[str, object] | None = None
    lineage: Lineage = NO_LINEAGE
    dropped: tuple[str, ...] = ()
    model: str = ""
    stream_usage: bool = False
    reasoning: bool = True
    summary: bool = False
    prompt: str | tuple[int, ...] | None = None
    namespaces: Mapping[str, str] = field(default_factory=dict)
    fingerprints: tuple[bytes, ...] = field(init=False, repr=False, compare=False)
    prefixes: tuple[bytes, ...] = field(init=False, repr=False, compare=False)
    identity: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        prints = tuple(fingerprint(message) for message in self.messages)
        prefixes = tuple(itertools.accumulate(prints, _digest, initial=tools_digest(self.tools)))
        thoughts = [reasoning_of(message) for message in self.messages if message["role"] == "assistant"]
        wanted = replace(self.wanted, logit_bias={})
        asked = repr((thoughts, self.choice, wanted, sorted(self.wanted.logit_bias.items()), self.n)).encode()
        object.__setattr__(self, "fingerprints", prints)
        object.__setattr__(self, "prefixes", prefixes)
        object.__setattr__(self, "identity", _digest(prefixes[-1], asked, _json(self.schema)))


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A tool call of the model. arguments: a JSON text. bad: why the call can't be used."""

    id: str
    name: str
    arguments: str

    @property
    def message(self) -> dict[str, object]:
        """The call as chat templates take it."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True, slots=True)
class TurnText:
    """A turn of the model as text.

    malformed: why a tool call in it can't be read. Such a call stays in the content.
    """

    reasoning: str
    content: str
    calls: tuple[ToolUse, ...] = ()
    malformed: str | None = None

    @property
    def message(self) -> Message:
        """The turn as a chat message."""
        message: dict[str, object] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [call.message for call in self.calls]
        return message


def fingerprint(message: Message) -> bytes:
    """Return a digest that is equal for two messages that differ only in how an agent wrote them down.

    The order of JSON keys, 1 or 1.0, white space around the text of a turn, parts of text or one text, and absent or
    empty content make no difference. Reasoning is left out: agents drop it (`reasoning_of`). Images count by their
    contents.
    """
    role = str(message["role"])
    texts, images = _content(message.get("content"))
    calls = [
        [call.get("id"), call["function"]["name"], _same_numbers(parsed(call["function"]["arguments"]))]
        for call in _calls(message)
    ]
    text = texts.strip() if role == "assistant" else texts
    return _digest(_json([role, text, images, calls, message.get("tool_call_id")]))


def reasoning_of(message: Message) -> str | None:
    """Return the reasoning in a turn of the model; None if the message has none."""
    thought = message.get("reasoning")
    return thought.strip() or None if isinstance(thought, str) else None


def tools_digest(tools: Sequence[Tool]) -> bytes:
    """Return the digest with which the prefixes of a conversation with these tools begin."""
    return _digest(_json(tools))


def text_of(message: Message) -> str:
    """Return the text of a message."""
    return _content(message.get("content"))[0]


def extended(digest: bytes, message: Message) -> bytes:
    """Return the digest of a prefix and one more message, as in `ModelCall.prefixes`."""
    return _digest(digest, fingerprint(message))


def parsed(arguments: object) -> object:
    """Return the arguments of a tool call as a value, or as they are if they are no JSON."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments


def _same_numbers(value: object) -> object:
    """Return a JSON value with all numbers as JavaScript has them: agents in it write 5.0 as 5."""
    match value:
        case bool():
            return value
        case int() | float():
            return value + 0.0  # -0.0 becomes 0.0
        case list():
            return [_same_numbers(one) for one in value]
        case dict():
            return {key: _same_numbers(one) for key, one in value.items()}
    return value


def _calls(message: Message) -> Iterator[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    yield from calls if isinstance(calls, list | tuple) else ()


def _content(content: object) -> tuple[str, list[str]]:
    if not isinstance(content, list | tuple):
        return ("" if content is None else str(content)), []
    texts = [part["text"] for part in content if part["type"] == "text"]
    images = [hashlib.sha256(part["image"]).hexdigest() for part in content if part["type"] == "image"]
    return "".join(texts), images


def _json(value: object) -> bytes:
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    except TypeError as error:
        raise DataError(f"the request is no JSON: {error}") from error


def _digest(*parts: bytes) -> bytes:
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        made.update(len(part).to_bytes(8, "little") + part)
    return made.digest()
