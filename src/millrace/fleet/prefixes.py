"""The prompt prefixes in the KV caches of engines, as their own events report them. No I/O.

An engine names its blocks by hashes of its own, and chooses their size. This module translates them to the hashes that
routing compares: one for the prompt up to the end of each whole block of BLOCK_TOKENS tokens.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from millrace.engines.stock.kv_events import BlockHash, Cleared, KVEvent, Removed, Stored

BLOCK_TOKENS = 64  # prompts are compared in blocks of this size
# For one engine: about 50 MB. In blocks of 16 tokens these are a million tokens, as many as a large GPU has room for.
MOST_ENGINE_BLOCKS = 65_536


@dataclass(frozen=True, slots=True)
class _Block:
    """One block of an engine.

    `before`: the hash of the prompt up to the last whole block of BLOCK_TOKENS. `tail`: the tokens from there to the
    end of the engine's block. `ends`: the hashes of the whole blocks of BLOCK_TOKENS that end in the engine's block.
    """

    before: int
    tail: tuple[int, ...]
    ends: tuple[int, ...]


BEGINNING = _Block(0, (), ())


class CachedPrefixes:
    """The cached prefixes of the engines that send events.

    A block stored behind an unknown block is unknown too. Blocks from before the first event, and blocks that were
    forgotten, stay unknown until the engine stores them again.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, dict[BlockHash, _Block]] = {}
        # By our hash: the engines that have the prefix, and the number of their blocks in which it ends.
        self._holders: dict[int, dict[str, int]] = {}

    def __contains__(self, engine: str) -> bool:
        """Whether the engine sends events."""
        return engine in self._blocks

    def begin(self, engine: str) -> None:
        """Expect events from the engine from now on. Its earlier blocks are unknown."""
        self._blocks.setdefault(engine, {})
        self.forget(engine)

    def end(self, engine: str) -> None:
        """Expect no more events from the engine."""
        self.forget(engine)
        self._blocks.pop(engine, None)

    def forget(self, engine: str) -> None:
        """Forget all blocks of the engine."""
        blocks = self._blocks.get(engine, {})
        self._remove(engine, list(blocks))

    def learn(self, engine: str, event: KVEvent) -> None:
        """Record an event of the engine."""
        match event:
            case Stored():
                self._store(engine, event)
            case Removed(hashes):
                self._remove(engine, hashes)
            case Cleared():
                self.forget(engine)

    def holders(self, block: int) -> Collection[str]:
        """Return the engines that have the prefix with this hash."""
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
    """Return the hashes of the prompt up to the end of each whole block of BLOCK_TOKENS."""
    hashes: list[int] = []
    before = 0
    for end in range(BLOCK_TOKENS, len(input_ids) + 1, BLOCK_TOKENS):
        before = hash((before, input_ids[end - BLOCK_TOKENS : end]))
        hashes.append(before)
    return hashes


def _extended(last: _Block, tokens: tuple[int, ...]) -> _Block:
    """Return the block that holds these tokens and follows `last`."""
    before, tail, ends = last.before, last.tail + tokens, []
    while len(tail) >= BLOCK_TOKENS:
        before, tail = hash((before, tail[:BLOCK_TOKENS])), tail[BLOCK_TOKENS:]
        ends.append(before)
    return _Block(before, tail, tuple(ends))
