"""The payloads for SGLang, read by a real unpickler that resolves each name."""

import base64
import io
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.buckets import CudaIpcBucket, CudaIpcShare, TorchStorageBucket
from millrace.engines.opcodes import encode
from millrace.engines.sglang.payload import loader_payloads, payloads
from millrace.weights.plan import layout

SHARE = CudaIpcShare("GPU-1", b"handle", 4096, 512, b"counter", 3, b"event", event_sync_required=True)
SPECS = layout(
    [("a.weight", "bfloat16", (2, 3), 12), ("b", "float32", (), 4), ("ü" * 300, "float32", (70000,), 280000)]
)


class Metadata(SimpleNamespace):
    pass


class Reader(pickle.Unpickler):
    """An unpickler that knows only the names of SGLang's allow-list. A rebuild function returns its name and
    arguments."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"):
            return Metadata
        if module in ("torch.multiprocessing.reductions", "sglang.srt.utils.patch_torch"):
            return lambda *arguments: (name, *arguments)
        assert module in ("torch", "torch.storage")
        return super().find_class(module, name)


def read(payload: str) -> Any:
    return Reader(io.BytesIO(base64.b64decode(payload))).load()


def test_a_bucket_on_the_gpu_is_one_opening_for_each_rank() -> None:
    other = CudaIpcShare("GPU-2", b"other", 4096, 0, b"counter", 4, b"event", event_sync_required=False)
    first, second = (read(p) for p in payloads(CudaIpcBucket((SHARE, other), 4096, SPECS), ranks=2))
    name, cls, size, stride, offset, storage, dtype, device, *rest = first["flattened_tensor"]
    assert (name, cls, storage) == ("_rebuild_cuda_tensor_modified", torch.Tensor, torch.UntypedStorage)
    assert (size, stride, offset, dtype, device) == (torch.Size([4096]), (1,), 0, torch.uint8, "GPU-1")
    assert rest == [b"handle", 4096, 512, False, b"counter", 3, b"event", True]
    assert second["flattened_tensor"][7:9] == ("GPU-2", b"other")
    assert first["metadata"] == second["metadata"]


def test_the_metadata_says_where_each_tensor_lies() -> None:
    metadata = read(payloads(TorchStorageBucket(b"/manager", b"/name", 300000, SPECS), ranks=1)[0])["metadata"]
    assert [(m.name, m.shape, m.dtype) for m in metadata] == [
        ("a.weight", torch.Size([2, 3]), torch.bfloat16),
        ("b", torch.Size([]), torch.float32),
        ("ü" * 300, torch.Size([70000]), torch.float32),
    ]
    assert [(m.start_idx, m.end_idx, m.numel) for m in metadata] == [
        (s.offset, s.offset + s.nbytes, s.nbytes) for s in SPECS
    ]


def test_the_loader_of_each_rank_gets_its_order_and_the_bytes() -> None:
    [[(order, tensor)]] = map(read, loader_payloads(TorchStorageBucket(b"/manager", b"/name", 300000, SPECS), ["{}"]))
    assert (order, tensor[0], tensor[-1][1]) == ("{}", "rebuild_tensor", torch.Size([300000]))
    other = CudaIpcShare("GPU-2", b"other", 4096, 0, b"counter", 4, b"event", event_sync_required=False)
    shares = loader_payloads(CudaIpcBucket((SHARE, other), 4096, SPECS), ["one", "two"])
    assert [(order, tensor[7]) for [(order, tensor)] in map(read, shares)] == [("one", "GPU-1"), ("two", "GPU-2")]


def test_a_missing_share_is_reported_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match="1 shares for 2 ranks"):
        payloads(CudaIpcBucket((SHARE,), 4096, SPECS), ranks=2)


LEAVES = st.one_of(st.booleans(), st.integers(-(2**70), 2**70), st.text(), st.binary())


@given(st.recursive(LEAVES, lambda inner: st.lists(inner).map(tuple)))
def test_an_encoded_value_is_read_back_unchanged(value: object) -> None:
    assert pickle.loads(b"\x80\x03" + encode(value) + b".") == value


def test_a_value_that_a_payload_can_not_hold_is_an_error() -> None:
    with pytest.raises(TypeError, match="can't hold a value of type float"):
        encode(1.5)
