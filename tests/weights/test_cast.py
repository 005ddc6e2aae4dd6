"""Published tensors are cast to the dtypes of the engines, and to nothing else."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from millrace.checksum import tensor_checksum
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.engines.start import Replica
from millrace.errors import PublishError
from millrace.types import EngineInfo
from millrace.weights.cast import Dtypes, cast, dtypes_of, folder_checksums_as, require_one_dtype
from millrace.weights.folder import FolderTensors, folder_checksums
from millrace.weights.plan import buckets
from millrace.weights.source import source_of
from tests.dtypes import save_as

NORM = "model.norm.weight"
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OTHERS = [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
DTYPES = st.sampled_from(FLOATS + OTHERS)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def info(name: str | None, unusual: dict[str, str] | None = None) -> EngineInfo:
    return EngineInfo("embedded", "1", "model", 0, 10, 10, frozenset(), dtype=name, unusual_dtypes=unusual)


@given(DTYPES, st.sampled_from(FLOATS), st.none() | DTYPES)
def test_floats_become_the_engines_and_nothing_else_is_touched(
    given_dtype: torch.dtype, usual: torch.dtype, own: torch.dtype | None
) -> None:
    tensor = torch.ones(4).to(given_dtype)
    dtypes = Dtypes(name_of(usual), {} if own is None else {"w": name_of(own)})
    [(name, made)] = cast(source_of([("w", tensor)]), dtypes)
    wanted = usual if own is None else own
    assert name == "w"
    if {wanted, given_dtype} <= set(FLOATS) and wanted != given_dtype:
        assert torch.equal(made, tensor.to(wanted))
    else:
        assert made is tensor


def test_nothing_is_cast_where_no_dtype_is_known() -> None:
    tensor = torch.ones(4)
    assert next(iter(cast(source_of([("w", tensor)]), Dtypes(None, {}))))[1] is tensor


class Making:
    """Tensors that are made one by one, when they are needed. `made` counts them."""

    def __init__(self) -> None:
        self.made = 0

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"w{i}", (256,)) for i in range(10)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for i in range(10):
            self.made += 1
            yield f"w{i}", torch.full((256,), float(i))


def test_it_is_lazy_and_can_be_gone_through_again_and_announces_the_same_shapes() -> None:
    source = Making()
    made = cast(source_of(source), Dtypes("bfloat16", {}))
    assert made.shapes() == dict(source.shapes())
    assert source.made == 0
    first = next(buckets(made, 2 * 512))
    assert [tensor.dtype for _, tensor in first] == [torch.bfloat16] * 2
    assert source.made == 3  # the tensors of the bucket, and the one that found no room in it
    assert [len(list(made)) for _ in range(2)] == [10, 10]


def test_an_iterator_stays_one() -> None:
    made = cast(source_of(iter(Making())), Dtypes("float16", {}))
    assert made.once
    assert made.shapes() is None
    assert {tensor.dtype for _, tensor in made} == {torch.float16}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_a_silent_engine_has_the_folders_dtypes(tiny_model: Path, tmp_path: Path, key: str | None) -> None:
    folder = save_as(tiny_model, tmp_path / "m", torch.float16, key=key, unusual={NORM: torch.float32})
    assert dtypes_of(info(None), folder) == Dtypes("float16", {NORM: "float32"})
    assert dtypes_of(info("bfloat16"), folder) == Dtypes("bfloat16", {NORM: "float32"})
    assert dtypes_of(info("bfloat16", {"x": "float32"}), folder) == Dtypes("bfloat16", {"x": "float32"})


def test_a_folders_checksums_in_the_dtypes_of_engines(tiny_model: Path, tmp_path: Path) -> None:
    folder = save_as(tiny_model, tmp_path / "m", torch.bfloat16, unusual={NORM: torch.float32})
    plain = folder_checksums(folder)
    assert folder_checksums_as(Dtypes("bfloat16", {NORM: "float32"}), folder, plain) == plain
    for dtypes in (Dtypes("bfloat16", {}), Dtypes("float16", {NORM: "float32"}), Dtypes("float32", {})):
        made = folder_checksums_as(dtypes, folder, plain)
        expected = {name: tensor_checksum(tensor) for name, tensor in cast(source_of(FolderTensors(folder)), dtypes)}
        assert made == expected
        assert made != plain


def test_engines_of_different_dtypes_are_refused() -> None:
    def started(name: str, dtype: str | None) -> Replica:
        return Replica(EmbeddedEngine(name, "http://127.0.0.1:9"), info(dtype), None)

    require_one_dtype([started("a", "float16"), started("b", None), started("c", "float16")])
    with pytest.raises(PublishError, match="a in float16, b in bfloat16"):
        require_one_dtype([started("a", "float16"), started("b", "bfloat16")])


def test_a_value_too_large_for_float16_is_not_finite_after_the_cast() -> None:
    [(_, made)] = cast(source_of([("w", torch.tensor([1e6]))]), Dtypes("float16", {}))
    assert math.isinf(made.item())
