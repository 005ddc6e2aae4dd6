"""Decode the KV cache events that a stock engine publishes: batches in msgpack, over ZeroMQ.

SGLang and vLLM publish the same events in three encodings. SGLang 0.5.15 encodes an event's fields by position. Later
versions of both encode them by name. One version of vLLM also encodes the batch by name. Unknown kinds and fields are
ignored, and a malformed batch raises MalformedEvents.

Only blocks that speed up any prompt of the base model with the same tokens are kept. Blocks that belong to a LoRA
adapter, a cache salt or an image are left out. So are blocks outside the device's memory or of a further layer group.
"""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from millrace.errors import ConfigError

BlockHash = int | bytes  # the engine's own id of a block and everything before it
# The most blocks in one event. A longer run becomes several events, so that the reader can do other work in between.
MOST_BLOCKS = 256
DEVICE = "GPU"  # both engines use this name on the CPU too
SOCKET_FOLDER = "/dev/shm"  # noqa: S108 # where the guard removes a killed server's files
# Field names by position, for engines that encode events by position.
FIELDS = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
}
# Fields that make a block depend on more than its tokens.
NAMESPACES = ("lora_id", "lora_name", "cache_salt")


class MalformedEvents(ValueError):
    """The payload is not a batch of KV cache events."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The cache holds these successive blocks, each a hash and its tokens.

    The first one follows the block `parent`, or starts the prompt if that is None.
    """

    parent: BlockHash | None
    blocks: tuple[tuple[BlockHash, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Removed:
    """The cache dropped these blocks."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    """The cache is empty."""


KVEvent = Stored | Removed | Cleared


def require_packages() -> None:
    """Raise ConfigError if the packages that read the events are not installed."""
    try:
        import msgpack  # noqa: F401
        import zmq.asyncio  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"engine.kv_events needs a package that is not installed ({error}): pip install 'millrace[kv-events]'"
        ) from error


def new_endpoint() -> str:
    """Return a new endpoint at which an engine can publish: a Unix socket.

    The events contain prompts. Other users can't open the socket unless the umask allows it, but both engines would
    bind a TCP endpoint to all addresses of the host.
    """
    return f"ipc://{SOCKET_FOLDER}/millrace-kv-{secrets.token_hex(8)}"


def leftovers(endpoint: str | None) -> tuple[str, ...]:
    """Return the file that a killed server leaves behind, in the form that `ServerProcess.start` takes.

    It is the exact name, since the sockets of other servers have the same pattern.
    """
    return () if endpoint is None else (endpoint.rpartition("/")[2],)


def decode(payload: bytes) -> Iterator[KVEvent]:
    """Yield the events of one batch, in order. May raise MalformedEvents after some of them."""
    import msgpack

    try:
        batch = msgpack.unpackb(payload)
    except ValueError as error:
        raise MalformedEvents(f"it is not msgpack: {error}") from error
    match batch:
        case [_, list(events), *_] | {"events": list(events)}:
            pass
        case _:
            raise MalformedEvents(f"expected a batch of events, got {_shortened(batch)}")
    for event in events:
        yield from _event(event)


def _event(event: object) -> Iterator[KVEvent]:
    fields: Mapping[Any, Any]
    match event:
        case {"type": str(kind), **named}:
            fields = named
        case [str(kind), *values]:
            fields = dict(zip(FIELDS.get(kind, ()), values, strict=False))
        case _:
            raise MalformedEvents(f"expected an event, got {_shortened(event)}")
    match kind:
        case "BlockStored":
            yield from _stored(fields)
        case "BlockRemoved":
            hashes = _hashes(fields)
            if _on_the_device(fields):
                yield Removed(hashes)
        case "AllBlocksCleared":
            yield Cleared()


def _stored(fields: Mapping[Any, Any]) -> Iterator[Stored]:
    hashes, parent = _hashes(fields), fields.get("parent_block_hash")
    tokens, size = fields.get("token_ids"), fields.get("block_size")
    if not (parent is None or isinstance(parent, BlockHash)) or not isinstance(size, int) or size < 1:
        raise MalformedEvents(f"stored blocks have size {_shortened(size)} and parent {_shortened(parent)}")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise MalformedEvents(f"token_ids is not a list of integers: {_shortened(tokens)}")
    if _of_something_else(fields) or not _on_the_device(fields):
        return
    if len(tokens) != size * len(hashes):  # with sliding windows, some blocks have tokens but no hash
        return
    for first in range(0, len(hashes), MOST_BLOCKS):
        some = hashes[first : first + MOST_BLOCKS]
        starts = range(first * size, (first + len(some)) * size, size)
        yield Stored(parent, tuple((one, tuple(tokens[at : at + size])) for one, at in zip(some, starts, strict=True)))
        parent = some[-1]


def _hashes(fields: Mapping[Any, Any]) -> tuple[BlockHash, ...]:
    hashes = fields.get("block_hashes")
    if not isinstance(hashes, list) or not all(isinstance(one, BlockHash) for one in hashes):
        raise MalformedEvents(f"block_hashes is not a list of integers or bytes: {_shortened(hashes)}")
    return tuple(hashes)


def _on_the_device(fields: Mapping[Any, Any]) -> bool:
    return fields.get("medium") in (None, DEVICE) and not fields.get("group_idx")


def _of_something_else(fields: Mapping[Any, Any]) -> bool:
    """Whether the blocks depend on more than their tokens, so that another prompt of these tokens can't reuse them."""
    extra = fields.get("extra_keys") or ()
    if not isinstance(extra, list | tuple):
        raise MalformedEvents(f"extra_keys is not a list: {_shortened(extra)}")
    return any(fields.get(name) is not None for name in NAMESPACES) or any(one is not None for one in extra)


def _shortened(what: object) -> str:
    text = repr(what)
    return text if len(text) <= 80 else f"{text[:80]}..."
