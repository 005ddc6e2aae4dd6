"""What the adapter tells the extension about buckets of parts."""

import pytest

from millrace.buckets import (
    CudaIpcBucket,
    CudaIpcShare,
    PartsBucket,
    RankBucket,
    SharedMemoryBucket,
    TensorPart,
    TorchStorageBucket,
)
from millrace.engines.stock.state import InvalidStateError
from millrace.engines.vllm.payload import description, parts, samples_of_parts

SHARE = CudaIpcShare("GPU-0", b"h", 64, 0, b"c", 0, b"e", False)
ROWS = TensorPart("w", "float32", ((0, 2), (0, 4)), 0)
NORM = TensorPart("n", "float32", ((0, 4),), 64)
BUCKET = PartsBucket(
    (
        RankBucket(SharedMemoryBucket("/proc/1/fd/3", ()), (ROWS, NORM)),
        RankBucket(CudaIpcBucket((SHARE,), 128, ()), (NORM,)),
    ),
    (),
)


def test_each_rank_gets_its_place_and_its_rows() -> None:
    place, rows = parts(BUCKET, ranks=2)
    norm = ("n", "float32", ((0, 4),), 64)
    ranks = place["ranks"]
    assert isinstance(ranks, list)
    file, memory = ranks
    assert file == {"kind": "shared_memory", "path": "/proc/1/fd/3"}
    assert (memory["kind"], memory["nbytes"], memory["share"]["handle"]) == ("cuda_ipc", 128, "aA==")
    assert rows == [[("w", "float32", ((0, 2), (0, 4)), 0), norm], [norm]]


def test_a_bucket_that_the_extension_can_not_read_is_refused() -> None:
    with pytest.raises(InvalidStateError, match="the bucket is for 2 ranks, and it has 4"):
        parts(BUCKET, ranks=4)
    for memory in (TorchStorageBucket(b"m", b"h", 64, ()), CudaIpcBucket((SHARE, SHARE), 128, ())):
        with pytest.raises(InvalidStateError, match="a memory file, or in GPU memory with one share"):
            parts(PartsBucket((RankBucket(memory, ()),), ()), ranks=1)
    with pytest.raises(InvalidStateError):
        description(BUCKET, 2)


def test_samples_have_the_names_of_parts_and_ranks_must_agree() -> None:
    first, second, other = (digit * 32 for digit in "abc")
    found = samples_of_parts(BUCKET, [{"samples": first + second}, {"samples": second}])
    assert found == {"w[0:2,0:4]": first, "n[0:4]": second}
    with pytest.raises(ValueError, match=r"its ranks received different values of n\[0:4\]"):
        samples_of_parts(BUCKET, [{"samples": first + second}, {"samples": other}])
    with pytest.raises(ValueError, match="argument"):
        samples_of_parts(BUCKET, [{"samples": first}, {"samples": second}])
