"""Batches of KV cache events, in the forms that the engines really send, become plain values."""

import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.config.engines import VLLMEngineConfig
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.engines.stock.kv_events import (
    MOST_BLOCKS,
    Cleared,
    KVEvent,
    MalformedEvents,
    Removed,
    Stored,
    decode,
    require_packages,
)
from millrace.errors import ConfigError

# SGLang 0.5.23, here with pages of two tokens. It leaves out fields that are None.
BY_NAME: dict[str, Any] = {
    "type": "BlockStored",
    "block_hashes": [-213288480635909637, 8111311694873300564],
    "parent_block_hash": None,
    "token_ids": [5, 6, 7, 8],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
}
# vLLM 0.32.0
WITH_MORE = {
    **BY_NAME,
    "parent_block_hash": 124516663186513296,
    "lora_name": None,
    "extra_keys": [None, None],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
}
STORED = Stored(None, ((-213288480635909637, (5, 6)), (8111311694873300564, (7, 8))))


def batch(*events: object) -> bytes:
    packed: bytes = msgpack.packb([1795789473.5, list(events), 0])
    return packed


def read(*events: object) -> list[KVEvent]:
    return list(decode(batch(*events)))


def test_the_forms_of_both_engines_say_the_same() -> None:
    by_order = ["BlockStored", BY_NAME["block_hashes"], None, [5, 6, 7, 8], 2, None, "GPU"]  # SGLang 0.5.15
    for form in (BY_NAME, by_order):
        assert read(form) == [STORED]
    assert read(WITH_MORE) == [Stored(124516663186513296, STORED.blocks)]
    assert list(decode(msgpack.packb({"ts": 1.0, "events": [BY_NAME]}))) == [STORED]
    assert read({"type": "BlockRemoved", "block_hashes": [1, 2], "medium": "GPU"}, {"type": "AllBlocksCleared"}) == [
        Removed((1, 2)),
        Cleared(),
    ]
    assert read(["BlockRemoved", [b"\x01" * 32], "GPU"], ["AllBlocksCleared"]) == [Removed((b"\x01" * 32,)), Cleared()]


@pytest.mark.parametrize(
    "other",
    [
        {"lora_id": 1},
        {"lora_name": "millrace-1-5320c0d1"},
        {"cache_salt": "salt"},
        {"extra_keys": [None, ["a picture", 0]]},
        {"medium": "CPU_PINNED"},
        {"group_idx": 1},
        {"token_ids": [5, 6, 7, 8, 9, 10]},
    ],
)
def test_blocks_that_do_not_speed_up_the_base_model_are_left_out(other: dict[str, Any]) -> None:
    assert read({**WITH_MORE, **other}) == []


def test_only_a_removal_from_the_devices_own_cache_counts() -> None:
    assert read({"type": "BlockRemoved", "block_hashes": [1], "medium": "CPU_PINNED"}) == []
    assert read({"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU", "group_idx": 1}) == []


def test_unknown_kinds_and_fields_are_ignored() -> None:
    assert read({"type": "BlockMoved", "where": 3}, ["BlockMoved", 3], {**BY_NAME, "colour": "red"}) == [STORED]


def test_a_long_run_of_blocks_comes_in_pieces_that_continue_each_other() -> None:
    count = 2 * MOST_BLOCKS + 1
    events = read({**BY_NAME, "block_hashes": list(range(count)), "token_ids": list(range(2 * count))})
    pieces = [event for event in events if isinstance(event, Stored)]
    assert [piece.parent for piece in pieces] == [None, MOST_BLOCKS - 1, 2 * MOST_BLOCKS - 1]
    assert [block for piece in pieces for block in piece.blocks] == [(i, (2 * i, 2 * i + 1)) for i in range(count)]


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (msgpack.packb(7), "expected a batch of events, got 7"),
        (msgpack.packb([1.0]), "expected a batch of events"),
        (msgpack.packb([1.0, "events"]), "expected a batch of events"),
        (batch(7), "expected an event, got 7"),
        (batch({"kind": "BlockStored"}), "expected an event"),
        (batch({**BY_NAME, "block_hashes": None}), "block_hashes is not a list"),
        (batch({**BY_NAME, "block_hashes": ["a", "b"]}), "block_hashes is not a list"),
        (batch({**BY_NAME, "parent_block_hash": "a"}), "parent 'a'"),
        (batch({**BY_NAME, "block_size": 0}), "have size 0"),
        (batch({**BY_NAME, "token_ids": [[5, 6], [6, 7]]}), "token_ids is not a list of integers"),
        (batch(["BlockStored"]), "block_hashes is not a list"),
        (batch({"type": "BlockRemoved"}), "block_hashes is not a list"),
    ],
)
def test_a_message_that_is_no_batch_is_reported(payload: bytes, says: str) -> None:
    with pytest.raises(MalformedEvents, match=says):
        list(decode(payload))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
fields = st.sampled_from([*WITH_MORE])


@given(st.dictionaries(fields, values))
def test_any_value_of_a_field_is_read_or_refused(other: dict[str, object]) -> None:
    try:
        events = read({**WITH_MORE, **other})
    except MalformedEvents:
        return
    for event in events:
        if isinstance(event, Stored):
            assert all(type(token) is int for _, tokens in event.blocks for token in tokens)


@pytest.mark.parametrize("extra", [True, 3, "keys"])
def test_extra_keys_that_are_no_list_are_refused(extra: object) -> None:
    with pytest.raises(MalformedEvents, match="extra_keys is not a list"):
        read({**WITH_MORE, "extra_keys": extra})


@given(st.binary())
def test_noise_is_read_or_refused(noise: bytes) -> None:
    try:
        list(decode(noise))
    except MalformedEvents:
        return


@pytest.mark.parametrize("missing", ["msgpack", "zmq.asyncio"])
async def test_a_missing_package_is_reported_before_anything_starts(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require_packages()
    monkeypatch.setitem(sys.modules, missing, None)
    config = VLLMEngineConfig(kind="vllm", kv_events=True, python=Path("/nowhere/python"))
    with pytest.raises(ConfigError, match=r"pip install 'millrace\[kv-events\]'"):
        await start(config, LaunchSpec(model_path=tmp_path, log_dir=tmp_path))
    assert not [*tmp_path.iterdir()]  # noqa: ASYNC240
