"""The extensions' reader of safetensors files."""

import importlib
import json
import struct
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from millrace.engines.stock.launching import EXTENSION

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)


def mapped_tensors(path: Path) -> Any:
    """Reads a file, as the engines do."""
    with patch.object(sys, "path", [str(EXTENSION), *sys.path]):
        return importlib.import_module("millrace_files").mapped_tensors(path)


@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=5),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    )
)
def test_it_reads_what_safetensors_writes(tmp_path_factory: pytest.TempPathFactory, kinds: Any) -> None:
    path = tmp_path_factory.mktemp("files") / "model.safetensors"
    save_file({name: torch.ones(shape).to(dtype) for name, (dtype, shape) in kinds.items()}, path, metadata={"a": "b"})
    read, metadata = mapped_tensors(path)
    expected = load_file(path)
    assert metadata == {"a": "b"}
    assert read.keys() == expected.keys()
    for name, one in expected.items():
        assert (read[name].dtype, read[name].shape) == (one.dtype, one.shape)
        assert torch.equal(
            read[name].view(torch.uint8) if one.dim() else read[name], one.view(torch.uint8) if one.dim() else one
        )


def test_tensors_at_odd_addresses(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(in_file(header, b"abc" + struct.pack("<ff", 1.5, -2.0)))
    read, _ = mapped_tensors(path)
    assert read["b"].tolist() == [1.5, -2.0]
    read["b"][0] = 7  # changes this process's memory only
    assert mapped_tensors(path)[0]["b"].tolist() == [1.5, -2.0]


def in_file(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: tuple[int, ...] = (1,), dtype: str = "F32") -> object:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"abc", id="shorter than a length"),
        pytest.param((1000).to_bytes(8, "little") + b"{}", id="a header longer than the file"),
        pytest.param(in_file([1]), id="a header that is a list"),
        pytest.param(in_file({"w": 1}), id="an entry that is a number"),
        pytest.param(in_file(entry(0, 4)), id="no data"),
        pytest.param(in_file(entry(4, 8), b"abcdef"), id="an end after the file's"),
        pytest.param(in_file(entry(-4, 0), b"abcd"), id="a negative begin"),
        pytest.param(in_file(entry(0, 4, (2,)), b"abcd"), id="fewer bytes than elements"),
        pytest.param(in_file(entry(0, 4, dtype="F5"), b"abcd"), id="an unknown dtype"),
        pytest.param(in_file(entry(0, 4, (-1, -1)), b"abcd"), id="a negative size"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is not a safetensors file"):
        mapped_tensors(path)
