"""Deltas between two versions, written and applied bit for bit."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch import Tensor

from millrace.checksum import checksum, tensor_checksum
from millrace.errors import DataError, PublishError
from millrace.weights.delta import CHUNK, DTYPES, Pair, read_delta, write_delta

SHAPES = [(), (0,), (1,), (3, 0, 2), (2, 3), (17,), (64, 33), (5, 7, 11), (3000,)]


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a file that may be written again and again."""
    return tmp_path_factory.mktemp("delta") / "delta.safetensors"


def packed(tensor: Tensor) -> Tensor:
    """Returns a copy with the usual strides. `contiguous` does not give them to a tensor of one element or none."""
    return tensor.clone(memory_format=torch.contiguous_format)


def as_bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns [elements, itemsize] uint8."""
    return packed(tensor).reshape(-1).view(torch.uint8).numpy().reshape(tensor.numel(), tensor.itemsize)


def of_bytes(content: np.ndarray[Any, np.dtype[np.uint8]], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.tensor(content.reshape(-1, dtype.itemsize)).view(dtype).reshape(shape)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Returns the same elements in another memory layout."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
    if layout == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor


def same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and np.array_equal(as_bytes(one), as_bytes(two))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draws an old tensor of any bits, and a new one. Any share of it has changed, a little or to any other bits."""
    name, shape = draw(st.sampled_from(sorted(DTYPES))), draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0.0, 0.001, 0.02, 0.5, 1.0]) | st.floats(0, 1))
    dtype, elements = DTYPES[name], int(np.prod(shape))
    old = rng.integers(0, 2 if dtype is torch.bool else 256, (elements, dtype.itemsize), dtype=np.uint8)
    new = old.copy()
    chosen = rng.random(elements) < share
    if dtype is torch.bool:
        new[chosen] ^= 1
    elif draw(st.booleans()):
        new[chosen, 0] += 1
    else:
        new[chosen] = rng.integers(0, 256, (int(chosen.sum()), dtype.itemsize), dtype=np.uint8)
    layouts = st.sampled_from(["contiguous", "transposed", "strided"])
    before, after = of_bytes(old, dtype, shape), of_bytes(new, dtype, shape)
    return laid_out(before, draw(layouts)), laid_out(after, draw(layouts))


@given(pair=pairs(), versions=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)))
def test_applying_a_delta_gives_the_written_tensors(
    path: Path, pair: tuple[Tensor, Tensor], versions: tuple[int, int]
) -> None:
    old, new = pair
    untouched = old.clone()
    report = write_delta(path, *versions, [("layer.weight", old, new)])
    assert report.changed == int((as_bytes(old) != as_bytes(new)).any(axis=1).sum())
    assert (report.elements, report.nbytes) == (new.numel(), new.numel() * new.itemsize)
    assert report.wire_nbytes == path.stat().st_size

    delta = read_delta(path)
    assert (delta.base_version, delta.version) == versions
    entry = delta.tensors["layer.weight"]
    assert (entry.base, entry.checksum) == (tensor_checksum(packed(old)), tensor_checksum(packed(new)))
    applied = delta.apply("layer.weight", old)
    assert same(applied, new)
    assert same(old, untouched)
    applied.zero_()
    assert same(old, untouched)


@given(pair=pairs(), place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_another_base_is_refused(path: Path, pair: tuple[Tensor, Tensor], place: int, bit: int) -> None:
    old, new = pair
    write_delta(path, 6, 7, [("w", old, new)])
    delta = read_delta(path)
    for other in (None, old.unsqueeze(0), old.to(torch.float32 if old.dtype != torch.float32 else torch.float16)):
        with pytest.raises(DataError, match="but was given"):
            delta.apply("w", other)
    if old.numel() and old.dtype is not torch.bool:
        content = as_bytes(old).reshape(-1).copy()
        content[place % content.size] ^= 1 << bit
        try:  # the new elements may not depend on this one
            assert same(delta.apply("w", of_bytes(content, old.dtype, tuple(old.shape))), new)
        except DataError as error:
            assert "changes version 6, but was given another w" in str(error)  # noqa: PT017


def test_bits_count_and_not_values(path: Path) -> None:
    quiet, payload, zero, negative = (torch.tensor([bits], dtype=torch.int16) for bits in (0x7FC0, 0x7FC1, 0, -0x8000))
    old = torch.cat([quiet, quiet, zero, zero]).view(torch.bfloat16)
    new = torch.cat([quiet, payload, negative, zero]).view(torch.bfloat16)
    assert write_delta(path, 1, 2, [("w", old, new)]).changed == 2
    assert same(read_delta(path).apply("w", old), new)


def test_a_tensor_without_a_base_is_sent_whole(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(40, 50, generator=generator) for _ in range(2))
    pairs: list[Pair] = [
        ("added", None, new),
        ("reshaped", old, new.reshape(50, 40)),
        ("cast", old, new.bfloat16()),
        ("kept", old, old),
    ]
    report = write_delta(path, 1, 2, iter(pairs))
    assert (report.changed, report.elements, report.nbytes) == (6000, 8000, 28_000)
    delta = read_delta(path)
    assert list(delta.tensors) == ["added", "reshaped", "cast", "kept"]
    for name, _, expected in pairs[:3]:
        assert delta.tensors[name].base is None
        assert same(delta.apply(name, None), expected)
        assert same(delta.apply(name, old), expected)
    assert same(delta.apply("kept", old), old)


def test_several_chunks_each_in_the_form_that_is_smaller(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(3 * CHUNK + 3, generator=generator).bfloat16()
    new = old.clone()
    new[5:CHUNK:100] += 1  # sparse
    new[2 * CHUNK : 3 * CHUNK] = torch.randn(CHUNK, generator=generator).bfloat16()
    new[-1] += 1  # the last element
    report = write_delta(path, 1, 2, [("w", old, new)])
    delta = read_delta(path)
    assert same(delta.apply("w", old), new)
    first, second, third, last = delta.tensors["w"].chunks
    assert [chunk.form for chunk in (first, second, third, last)] == ["sparse", "sparse", "whole", "sparse"]
    assert report.changed == first.changed + third.changed + 1
    assert (second.changed, second.gaps, second.bits) == (0, (), ())


def test_a_small_change_is_a_small_file(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    old = (torch.randn(CHUNK, generator=generator) * 0.02).bfloat16()
    alike = torch.zeros(8 * CHUNK, dtype=torch.int8)
    assert write_delta(path, 1, 2, [("w", alike, alike)]).wire_nbytes < 320
    chosen = torch.rand(CHUNK, generator=generator) < 0.01
    new = torch.where(chosen, old.view(torch.int16) + 1, old.view(torch.int16)).view(torch.bfloat16)
    report = write_delta(path, 1, 2, [("w", old, new)])
    assert report.changed == int(chosen.sum())
    # 8.1 bits for each position is the entropy of a share of 0.01. All values have grown alike, which takes no room.
    assert 8.0 < report.wire_nbytes * 8 / report.changed < 9.0
    anything = of_bytes(np.random.default_rng(0).integers(0, 256, (CHUNK, 2), dtype=np.uint8), old.dtype, (CHUNK,))
    assert write_delta(path, 1, 2, [("w", old, anything)]).wire_nbytes < anything.nbytes + 1024


@pytest.fixture
def small(path: Path) -> tuple[list[Pair], bytes]:
    """A file with each form in it, and the tensors that it was made from."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(300, generator=generator).bfloat16()
    new = old.clone()
    new[::29] *= 1.01
    pairs: list[Pair] = [("sparse", old, new), ("kept", old, old), ("whole", None, new[:40])]
    write_delta(path, 6, 7, pairs)
    return pairs, path.read_bytes()


def harmless(path: Path, content: bytes, pairs: list[Pair]) -> bool:
    """Writes the content as the file and reads it. Returns False if it was refused. Otherwise it must give the
    undamaged tensors."""
    path.write_bytes(content)
    try:
        delta = read_delta(path)
        applied = {name: delta.apply(name, old) for name, old, _ in pairs if name in delta.tensors}
    except DataError:
        return False
    assert (delta.base_version, delta.version) == (6, 7)
    assert all(same(applied[name], new) for name, _, new in pairs)
    return True


def test_no_damage_gives_other_weights(path: Path, small: tuple[list[Pair], bytes]) -> None:
    pairs, content = small
    assert harmless(path, content, pairs)
    for place in range(len(content)):
        inverted, flipped = bytearray(content), bytearray(content)
        inverted[place] ^= 0xFF
        flipped[place] ^= 1 << place % 8
        assert not harmless(path, bytes(inverted), pairs), f"byte {place}"
        harmless(path, bytes(flipped), pairs)  # the bit may be one that no reader uses, as zstd's headers have
        assert not harmless(path, content[:place], pairs), f"cut off at {place}"
    assert not harmless(path, content + b"\0", pairs)
    path.unlink()
    with pytest.raises(DataError, match="not a whole delta"):
        read_delta(path)


def frame(content: bytes) -> bytes:
    return zstandard.compress(content)


def without_size() -> bytes:
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(bytes(3)) + compressor.flush()


def hostile(path: Path, entry: dict[str, Any], payload: bytes) -> None:
    """Writes a file as another program might, for a tensor `w` of ten zeros in bfloat16, with right checksums."""
    base = tensor_checksum(torch.zeros(10, dtype=torch.bfloat16))
    tensor = {"dtype": "bfloat16", "shape": [10], "base": base, "checksum": base, **entry}
    text = json.dumps({"base_version": 1, "version": 2, "tensors": {"w": tensor}})
    metadata = {"manifest": text, "checksum": checksum(memoryview(text.encode()))}
    save_file({"w": np.frombuffer(payload, np.uint8)} if payload else {}, path, metadata)


def sparse(changed: int, gaps: list[bytes], bits: list[bytes]) -> tuple[dict[str, Any], bytes]:
    chunk = {"changed": changed, "gaps": [len(part) for part in gaps], "bits": [len(part) for part in bits]}
    return {"chunks": [chunk]}, b"".join(gaps + bits)


def whole(**entry: Any) -> tuple[dict[str, Any], bytes]:
    return {"base": None, "chunks": [{"form": "whole", "changed": 10}], **entry}, b""


def test_a_file_of_another_writer_is_as_good(path: Path) -> None:
    hostile(path, *sparse(3, [frame(bytes(3))], [frame(bytes(3))]))
    assert not read_delta(path).apply("w", torch.zeros(10, dtype=torch.bfloat16)).any()
    hostile(path, *whole())
    assert not read_delta(path).apply("w", None).any()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: sparse(3, [frame(b"\3\3\3")], []), "outside of the tensor"),
        (lambda: sparse(3, [frame(b"\xff\xff\xff")] * 4, []), "outside of the tensor"),
        (lambda: sparse(3, [frame(bytes(1 << 26))], []), "a plane of 3 elements has 67108864 bytes"),
        (lambda: sparse(3, [without_size()], []), "a plane of 3 elements has -1 bytes"),
        (lambda: sparse(3, [frame(bytes(3)) * 2], []), "damaged at w"),
        (lambda: sparse(3, [b"nothing of zstd"], []), "damaged at w"),
        (lambda: sparse(11, [], []), "more elements have changed than there are"),
        (lambda: sparse(-1, [], []), "greater than or equal to 0"),
        (lambda: sparse(3, [frame(bytes(3))] * 5, []), "more planes than an element has bytes"),
        (lambda: sparse(3, [], [frame(bytes(3))] * 3), "more planes than an element has bytes"),
        (lambda: ({"chunks": []}, b""), "chunks do not fit the shape"),
        (lambda: ({"chunks": [{"gaps": [3]}]}, b"four"), "payloads are not those"),
        (lambda: ({"chunks": [{}]}, b"unasked"), "payloads are not those"),
        (lambda: ({"chunks": [{"gaps": [3], "form": "whole"}]}, b"abc"), "a whole chunk has no gaps"),
        (lambda: ({"chunks": [{"form": "other"}]}, b""), "not a whole delta"),
        (lambda: ({"chunks": [{}], "base": None}, b""), "needs a base"),
        (lambda: ({"chunks": [{}], "more": 1}, b""), "not a whole delta"),
        (lambda: whole(dtype="complex64"), "unknown dtype"),
        (lambda: whole(shape=[1 << 40]), "chunks do not fit the shape"),
        (lambda: whole(shape=[0, 1 << 62, 1 << 62], chunks=[]), "its shape is too large"),
        (lambda: whole(shape=[-10]), "not a whole delta"),
    ],
)  # fmt: skip
def test_a_hostile_file_is_refused(path: Path, make: Callable[[], tuple[dict[str, Any], bytes]], reason: str) -> None:
    hostile(path, *make())
    with pytest.raises(DataError, match=reason):
        read_delta(path).apply("w", torch.zeros(10, dtype=torch.bfloat16))


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    path, weight = tmp_path / "delta.safetensors", torch.ones(3)

    def breaking_off() -> Iterator[Pair]:
        yield "a", weight, weight
        raise RuntimeError("the trainer broke")

    with pytest.raises(PublishError, match="named a tensor twice: a"):
        write_delta(path, 1, 2, [("a", weight, weight), ("a", weight, weight)])
    with pytest.raises(PublishError, match=r"a is of torch\.complex64"):
        write_delta(path, 1, 2, [("a", weight, weight.to(torch.complex64))])
    with pytest.raises(RuntimeError, match="the trainer broke"):
        write_delta(path, 1, 2, breaking_off())
    assert not list(tmp_path.iterdir())
    write_delta(path, 1, 2, [("a", weight, weight)])
    assert list(tmp_path.iterdir()) == [path]
