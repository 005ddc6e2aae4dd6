"""The slots of the KV cache: what each holds, and which requests may reuse it."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.embedded.cache import MIXED, LayerShape, Prefix, SlotCache

CONTEXT = 8
EPOCH = 3


def make(running: int = 2, stored: int = 3, layers: int = 2) -> SlotCache:
    return SlotCache(
        [LayerShape(2, 4, 2, 4)] * layers,
        running=running,
        stored=stored,
        context_length=CONTEXT,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def fill(cache: SlotCache, slot: int, tokens: list[int], epoch: int = EPOCH) -> None:
    """Fills a slot with keys and values that encode the tokens they belong to."""
    cache.write(slot, np.array(tokens, np.int64), epoch)
    assert cache.model_cache is not None
    for layer in cache.model_cache.layers:
        for tensor in (layer.keys_SHCD, layer.values_SHCD):
            tensor[slot, :, : len(tokens)] = torch.tensor(tokens, dtype=torch.float32)[:, None]


def content(cache: SlotCache, slot: int) -> list[int]:
    """Returns the tokens of a slot, after checking that the keys and values of every layer encode them."""
    length = int(cache.lengths[slot])
    assert cache.model_cache is not None
    for layer in cache.model_cache.layers:
        for tensor in (layer.keys_SHCD, layer.values_SHCD):
            expected = torch.from_numpy(cache.tokens[slot, :length]).float()[:, None].expand(2, -1, 4)
            assert torch.equal(tensor[slot, :, :length], expected)
    return [int(token) for token in cache.tokens[slot, :length]]


def find(cache: SlotCache, tokens: list[int], epoch: int = EPOCH, running: int = 0) -> int:
    return cache.find(np.array(tokens, np.int64), epoch, running).length


def test_a_stored_prefix_outlives_its_slot() -> None:
    cache = make()
    fill(cache, 0, [1, 2, 3, 4])
    cache.store(0)
    fill(cache, 0, [9, 9])
    prefix = cache.find(np.array([1, 2, 3, 7], np.int64), EPOCH, 1)
    assert prefix.length == 3
    cache.copy(prefix, 1)
    assert content(cache, 1) == [1, 2, 3]


def test_no_prefix_is_found_across_epochs_or_in_idle_slots() -> None:
    cache = make()
    fill(cache, 0, [1, 2, 3])
    assert find(cache, [1, 2, 3], running=1) == 3
    assert find(cache, [1, 2, 3], running=0) == 0
    assert find(cache, [1, 2, 3], epoch=EPOCH + 1, running=1) == 0
    cache.store(0)
    cache.taint()
    assert find(cache, [1, 2, 3], running=1) == 0
    assert cache.epochs[0] == MIXED
    cache.store(0)  # the slot was made by two versions, so it is not kept
    assert find(cache, [1, 2, 3], epoch=MIXED) == 0


def test_a_longer_prefix_takes_the_place_of_the_one_it_extends() -> None:
    cache = make(stored=2)
    fill(cache, 0, [1, 2])
    cache.store(0)
    fill(cache, 0, [1, 2, 3, 4])
    cache.store(0)
    fill(cache, 1, [5, 6])
    cache.store(1)  # there is still room for it
    assert find(cache, [1, 2, 3, 4]) == 4
    assert find(cache, [5, 6]) == 2


def test_the_least_recently_used_prefix_leaves_first() -> None:
    cache = make(stored=2)
    for tokens in ([1, 1], [2, 2]):
        fill(cache, 0, tokens)
        cache.store(0)
    cache.copy(cache.find(np.array([1, 1], np.int64), EPOCH, 0), 1)  # this uses the prefix again
    fill(cache, 0, [3, 3])
    cache.store(0)
    assert [find(cache, [t, t]) for t in (1, 2, 3)] == [2, 0, 2]


def test_no_stored_slots_is_a_setting_like_another() -> None:
    cache = make(stored=0)
    fill(cache, 0, [1, 2])
    cache.store(0)
    assert find(cache, [1, 2], running=1) == 2
    assert find(cache, [1, 2], running=0) == 0


def test_release_forgets_and_allocate_starts_empty() -> None:
    cache = make()
    fill(cache, 0, [1, 2])
    cache.store(0)
    cache.release()
    assert find(cache, [1, 2]) == 0
    cache.allocate()
    assert find(cache, [1, 2]) == 0
    assert cache.model_cache is not None
    assert not cache.model_cache.layers[0].keys_SHCD.any()


def test_layers_of_unlike_shapes_are_copied_together() -> None:
    shapes = [LayerShape(2, 4, 2, 4), LayerShape(1, 8, 1, 2)]
    cache = SlotCache(shapes, running=2, stored=0, context_length=4, dtype=torch.float32, device=torch.device("cpu"))
    assert cache.model_cache is not None
    for layer in cache.model_cache.layers:
        layer.keys_SHCD[0], layer.values_SHCD[0] = 1, 2
    cache.write(0, np.array([5, 6, 7], np.int64), EPOCH)
    cache.copy(Prefix(0, 3), 1)
    for layer, shape in zip(cache.model_cache.layers, shapes, strict=True):
        assert layer.keys_SHCD.shape[1::2] == (shape.key_heads, shape.key_dim)
        assert layer.values_SHCD.shape[1::2] == (shape.value_heads, shape.value_dim)
        assert layer.keys_SHCD[1, :, :3].eq(1).all()
        assert layer.values_SHCD[1, :, :3].eq(2).all()
        assert not layer.keys_SHCD[1, :, 3:].any()


@given(
    stored=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=CONTEXT), max_size=8),
    asked=st.lists(st.integers(0, 1), min_size=1, max_size=CONTEXT),
)
def test_a_found_prefix_equals_what_was_computed(stored: list[list[int]], asked: list[int]) -> None:
    cache = make(layers=1)
    for tokens in stored:
        fill(cache, 0, tokens)
        cache.store(0)
    prefix = cache.find(np.array(asked, np.int64), EPOCH, 0)
    if stored:
        last = stored[-1]
        shared = next(
            (i for i, (a, b) in enumerate(zip(last, asked, strict=False)) if a != b), min(len(last), len(asked))
        )
        assert prefix.length >= shared  # the prefix that was stored last is always kept
    if prefix.length:
        cache.copy(prefix, 1)
        assert content(cache, 1) == asked[: prefix.length]
