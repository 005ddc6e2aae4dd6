"""The router's view of engines' caches, compared with a model that keeps every token of every block."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.stock.kv_events import BlockHash, Cleared, KVEvent, Removed, Stored
from millrace.fleet import prefixes
from millrace.fleet.prefixes import BLOCK_TOKENS, CachedPrefixes, prompt_blocks

Tokens = tuple[int, ...]
ENGINES = ("e0", "e1")


@dataclass
class Naive:
    """A naive model of one engine's cache: the start of each block, and all tokens up to its end."""

    blocks: dict[BlockHash, tuple[int, Tokens]] = field(default_factory=dict)

    def learn(self, event: KVEvent) -> None:
        match event:
            case Cleared():
                self.blocks.clear()
            case Removed(hashes):
                for one in hashes:
                    self.blocks.pop(one, None)
            case Stored(parent, blocks):
                if parent is not None and parent not in self.blocks:
                    return
                before = () if parent is None else self.blocks[parent][1]
                for one, tokens in blocks:
                    self.blocks[one] = len(before), before + tokens
                    before += tokens

    def has(self, prompt: Tokens) -> bool:
        """Whether the cache has the block in which this prompt ends. The prompt consists of whole blocks of the
        router."""
        return any(
            begin < len(prompt) <= len(tokens) and tokens[: len(prompt)] == prompt
            for begin, tokens in self.blocks.values()
        )


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[tuple[str, KVEvent | None]], list[Tokens]]:
    """Draws events of two engines, and the token sequences up to the end of each block. An event of None means that the
    router forgets the engine. New blocks follow any block that ever existed. Blocks are removed in any order and stored
    again."""
    said: list[tuple[str, KVEvent | None]] = []
    ends: list[Tokens] = []  # one entry for each block
    for _ in range(draw(st.integers(1, 12))):
        engine = draw(st.sampled_from(ENGINES))
        match draw(st.sampled_from(["store", "store", "store", "again", "remove", "clear", "forget"])):
            case "store":
                at = draw(st.sampled_from([(), *ends]))
                size = draw(st.sampled_from([1, 16, 48, 64, 100, 160]))
                parent, blocks = hash(at) if at else None, []
                for token in draw(st.lists(st.integers(0, 1), min_size=1, max_size=6)):
                    at += (token,) * size
                    blocks.append((hash(at), (token,) * size))
                    ends.append(at)
                said.append((engine, Stored(parent, tuple(blocks))))
            case "again" if stored := [event for _, event in said if isinstance(event, Stored)]:
                said.append((engine, draw(st.sampled_from(stored))))
            case "remove" if ends:
                gone = draw(st.lists(st.sampled_from(ends), max_size=4))
                said.append((engine, Removed(tuple(map(hash, gone)))))
            case "clear":
                said.append((engine, Cleared()))
            case "forget":
                said.append((engine, None))
    return said, ends


@given(histories())
def test_the_known_prefixes_are_those_of_a_naive_model(
    history: tuple[list[tuple[str, KVEvent | None]], list[Tokens]],
) -> None:
    said, ends = history
    cached, naive = CachedPrefixes(), {engine: Naive() for engine in ENGINES}
    for engine in ENGINES:
        cached.begin(engine)
    whole = {end[:length] for end in ends for length in range(BLOCK_TOKENS, len(end) + 1, BLOCK_TOKENS)}
    for engine, event in said:
        if event is None:
            cached.forget(engine)
        else:
            cached.learn(engine, event)
        naive[engine].learn(Cleared() if event is None else event)
        for prompt in whole:
            there = cached.holders(prompt_blocks(prompt)[-1])
            assert set(there) == {one for one in ENGINES if naive[one].has(prompt)}
    for engine in ENGINES:
        cached.end(engine)
    assert not cached._holders
    assert not cached._blocks


def test_memory_is_bounded_and_what_is_known_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MOST_ENGINE_BLOCKS", 3)
    cached = CachedPrefixes()
    cached.begin("e0")
    tokens = tuple(range(5 * BLOCK_TOKENS))
    blocks = tuple((i, tokens[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS]) for i in range(5))
    known = prompt_blocks(tokens)
    cached.learn("e0", Stored(None, blocks))
    assert [bool(cached.holders(one)) for one in known] == [True, True, True, False, False]
    cached.learn("e0", Stored(None, blocks[:1]))
    cached.learn("e0", Removed((2,)))
    cached.learn("e0", Stored(1, blocks[2:]))
    assert [bool(cached.holders(one)) for one in known] == [True, True, True, False, False]
    assert len(cached._blocks["e0"]) == 3
