"""What a stock engine says of its KV cache: batches of events over ZeroMQ, of which msgpack makes plain values.

SGLang and vLLM write the same events, in three forms: SGLang 0.5.15 the fields of each by their order, both since then
by their names, and a version of vLLM in between the batch by names too. Kinds and fields that are not known here are
passed over; what is not such a batch raises MalformedEvents. Of what an engine stores, only that counts by which any
prompt of the base model with these tokens is computed faster: blocks of an adapter, of a salt or of a picture are left
out, and so are those outside the device's memory and those of a further group of layers.
"""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from millrace.errors import ConfigError

BlockHash = int | bytes  # the engine's own name of a block and all before it
# Of one value; a longer run of blocks becomes several, so that whoever takes them in can do something else in between.
MOST_BLOCKS = 256
DEVICE = "GPU"  # both engines call it so on the CPU too
SOCKETS = "/dev/shm"  # noqa: S108 # where the guard removes what a server leaves
# By their order, where an engine does not name them.
FIELDS = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
}
# Of what a block is besides its tokens.
NAMESPACES = ("lora_id", "lora_name", "cache_salt")


class MalformedEvents(ValueError):
    """This is no batch of KV cache events."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Successive blocks that begin where the block `parent` ends (None: with the prompt), each by its hash and with its
    tokens."""

    parent: BlockHash | None
    blocks: tuple[tuple[BlockHash, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Removed:
    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    """The cache is empty."""


KVEvent = Stored | Removed | Cleared


def require_packages() -> None:
    """Raises ConfigError where what reads the events is not installed."""
    try:
        import msgpack  # noqa: F401
        import zmq.asyncio  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"engine.kv_events reads what the engines publish, for which a package is missing here ({error}): "
            "pip install 'millrace[kv-events]'"
        ) from error


def new_endpoint() -> str:
    """Where an engine that is launched here publishes: a socket in the file system, which other users can't open unless
    the umask lets them. Both engines bind TCP to all addresses of the host or to none, and they publish the prompts."""
    return f"ipc://{SOCKETS}/millrace-kv-{secrets.token_hex(8)}"


def leftovers(endpoint: str | None) -> tuple[str, ...]:
    """What a server that is killed leaves of it, as `ServerProcess.start` takes it: this one alone, since the sockets
    of others look no different."""
    return () if endpoint is None else (endpoint.rpartition("/")[2],)


def decode(payload: bytes) -> Iterator[KVEvent]:
    """The events of one batch, in their order. Raises MalformedEvents, also after some of them."""
    import msgpack

    try:
        batch = msgpack.unpackb(payload)
    except ValueError as error:
        raise MalformedEvents(f"it is no msgpack: {error}") from error
    match batch:
        case [_, list(events), *_] | {"events": list(events)}:
            pass
        case _:
            raise MalformedEvents(f"it is no batch of events, but {_shortened(batch)}")
    for said in events:
        yield from _event(said)


def _event(said: object) -> Iterator[KVEvent]:
    fields: Mapping[Any, Any]
    match said:
        case {"type": str(kind), **named}:
            fields = named
        case [str(kind), *values]:
            fields = dict(zip(FIELDS.get(kind, ()), values, strict=False))
        case _:
            raise MalformedEvents(f"it is no event, but {_shortened(said)}")
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
        raise MalformedEvents(f"stored blocks of size {_shortened(size)} behind {_shortened(parent)}")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise MalformedEvents(f"stored tokens that are no list of numbers: {_shortened(tokens)}")
    if _of_something_else(fields) or not _on_the_device(fields):
        return
    if len(tokens) != size * len(hashes):  # blocks outside a layer's window are not named, though their tokens are
        return
    for first in range(0, len(hashes), MOST_BLOCKS):
        some = hashes[first : first + MOST_BLOCKS]
        starts = range(first * size, (first + len(some)) * size, size)
        yield Stored(parent, tuple((one, tuple(tokens[at : at + size])) for one, at in zip(some, starts, strict=True)))
        parent = some[-1]


def _hashes(fields: Mapping[Any, Any]) -> tuple[BlockHash, ...]:
    hashes = fields.get("block_hashes")
    if not isinstance(hashes, list) or not all(isinstance(one, BlockHash) for one in hashes):
        raise MalformedEvents(f"hashes that are no list of numbers or bytes: {_shortened(hashes)}")
    return tuple(hashes)


def _on_the_device(fields: Mapping[Any, Any]) -> bool:
    return fields.get("medium") in (None, DEVICE) and not fields.get("group_idx")


def _of_something_else(fields: Mapping[Any, Any]) -> bool:
    """Whether the blocks are of more than tokens, so that a prompt of the same tokens may not be computed from them."""
    extra = fields.get("extra_keys") or ()
    return any(fields.get(name) is not None for name in NAMESPACES) or any(one is not None for one in extra)


def _shortened(what: object) -> str:
    text = repr(what)
    return text if len(text) <= 80 else f"{text[:80]}..."
