"""Which beginnings of prompts an engine has in its KV cache, as its own events say. No I/O.

An engine names its blocks, of whatever size, by hashes of its own. Here each is told as what routing compares by: the
hashes of the prompts up to the end of each whole block of BLOCK_TOKENS.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from millrace.engines.stock.kv_events import BlockHash, Cleared, KVEvent, Removed, Stored

BLOCK_TOKENS = 64  # what prompts are compared by
# Of one engine: about 50 MB. In blocks of 16 tokens it is a million of them, as much as a large GPU has room for.
MOST_ENGINE_BLOCKS = 65_536


@dataclass(frozen=True, slots=True)
class _Block:
    """One of an engine's blocks: `before` is the hash of the prompt up to the last whole block of ours, `tail` the
    tokens from there to the engine's block's end. `ends`: the hashes of the whole blocks of ours that end in it."""

    before: int
    tail: tuple[int, ...]
    ends: tuple[int, ...]


BEGINNING = _Block(0, (), ())


class CachedPrefixes:
    """Of those engines that tell. What is stored behind a block that is not known is not known either: what came before
    the first event, or was forgotten, stays so until the engine stores it anew."""

    def __init__(self) -> None:
        self._blocks: dict[str, dict[BlockHash, _Block]] = {}
        # By our hash: the engines that have it, and in how many of their blocks it ends.
        self._holders: dict[int, dict[str, int]] = {}

    def __contains__(self, engine: str) -> bool:
        """Whether the engine tells."""
        return engine in self._blocks

    def begin(self, engine: str) -> None:
        """From now on the engine tells. What it had before is not known."""
        self._blocks.setdefault(engine, {})
        self.forget(engine)

    def end(self, engine: str) -> None:
        """The engine tells no more."""
        self.forget(engine)
        self._blocks.pop(engine, None)

    def forget(self, engine: str) -> None:
        blocks = self._blocks.get(engine, {})
        self._remove(engine, list(blocks))

    def learn(self, engine: str, event: KVEvent) -> None:
        """What an engine that tells has said."""
        match event:
            case Stored():
                self._store(engine, event)
            case Removed(hashes):
                self._remove(engine, hashes)
            case Cleared():
                self.forget(engine)

    def holders(self, block: int) -> Collection[str]:
        """The engines that have the prompt of this hash."""
        return self._holders.get(block, {}).keys()

    def _store(self, engine: str, event: Stored) -> None:
        blocks = self._blocks[engine]
        last = BEGINNING if event.parent is None else blocks.get(event.parent)
        for name, tokens in event.blocks:
            if last is None or len(blocks) >= MOST_ENGINE_BLOCKS:
                return
            self._remove(engine, (name,))
            last = blocks[name] = _extended(last, tokens)
            for end in last.ends:
                there = self._holders.setdefault(end, {})
                there[engine] = there.get(engine, 0) + 1

    def _remove(self, engine: str, names: Sequence[BlockHash]) -> None:
        blocks = self._blocks.get(engine, {})
        for name in names:
            block = blocks.pop(name, None)
            for end in () if block is None else block.ends:
                there = self._holders[end]
                there[engine] -= 1
                if not there[engine]:
                    del there[engine]
                if not there:
                    del self._holders[end]


def prompt_blocks(input_ids: tuple[int, ...]) -> list[int]:
    """A hash of the prompt up to the end of each whole block."""
    hashes: list[int] = []
    before = 0
    for end in range(BLOCK_TOKENS, len(input_ids) + 1, BLOCK_TOKENS):
        before = hash((before, input_ids[end - BLOCK_TOKENS : end]))
        hashes.append(before)
    return hashes


def _extended(last: _Block, tokens: tuple[int, ...]) -> _Block:
    """The block with these tokens behind `last`."""
    before, tail, ends = last.before, last.tail + tokens, []
    while len(tail) >= BLOCK_TOKENS:
        before, tail = hash((before, tail[:BLOCK_TOKENS])), tail[BLOCK_TOKENS:]
        ends.append(before)
    return _Block(before, tail, tuple(ends))
