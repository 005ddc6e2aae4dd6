"""Compares the kernels with torch, in an interpreter that has Triton: on the CPU, where Triton interprets them."""

import sys

import torch

sys.path.insert(0, sys.argv[1])
import millrace_chunks
import millrace_copies
from millrace_chunks import Elements
from millrace_copies import ByKernel, Slice, copy_out, fused
from millrace_samples import SampledPlaces, sampled_checksums, separated

DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.int64}
# Of each tensor: itemsize and elements. Some are read whole and some in samples; some are no whole words.
SIZES = [(2, 5), (2, 8192), (2, 8193), (2, 100_000), (4, 64), (8, 9000), (1, 70_001), (2, 8193), (4, 1)]

torch.manual_seed(0)
places, size = [], 0
for itemsize, elements in SIZES:
    places.append((itemsize, elements, size))
    size += -(-itemsize * elements // 64) * 64
bucket = torch.randint(0, 255, (size,), dtype=torch.uint8)
tensors = [bucket[at : at + itemsize * elements].view(DTYPES[itemsize]) for itemsize, elements, at in places]

expected = sampled_checksums(tensors)
assert separated(SampledPlaces(places, bucket.device).checksums(bucket)) == expected
millrace_chunks.usable = millrace_copies.usable = lambda _: True
assert separated(SampledPlaces(places, bucket.device).checksums(bucket)) == expected

targets = [torch.zeros_like(tensor) for tensor in tensors]
pairs = [
    (target, Slice(at, (elements,), (1,), DTYPES[itemsize]))
    for target, (itemsize, elements, at) in zip(targets, places, strict=True)
]
copies = fused(pairs)
assert sum(isinstance(one, ByKernel) for one in copies) == 1, copies
copy_out(bucket, copies)
for target, tensor in zip(targets, tensors, strict=True):
    assert torch.equal(target.view(torch.uint8), tensor.view(torch.uint8))

# Columns out of a matrix in the bucket, into columns of another matrix; and transposed, which is for torch.
matrix = bucket[: 64 * 3000 * 2].view(torch.bfloat16).view(3000, 64)
target = torch.zeros(3000, 100, dtype=torch.bfloat16)
turned = torch.zeros(16, 3000, dtype=torch.bfloat16)
copies = fused([
    (target[:, 8:40], Slice(32, (3000, 32), (64, 1), torch.bfloat16)),
    (turned, Slice(96, (16, 3000), (1, 64), torch.bfloat16)),
])  # fmt: skip
assert [type(one).__name__ for one in copies] == ["Fused", "ByKernel"], copies
copy_out(bucket, copies)
expected_2 = torch.zeros_like(target)
expected_2[:, 8:40] = matrix[:, 16:48]
assert torch.equal(target.view(torch.int16), expected_2.view(torch.int16))
assert torch.equal(turned.view(torch.int16), matrix[:, 48:64].T.view(torch.int16))
# Single elements, by their addresses.
numbers = torch.randint(0, 1000, (3, 700))
for itemsize, dtype in {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.items():
    some = [torch.randint(0, 100, (1000,), dtype=dtype) for _ in numbers]
    addresses = torch.cat([one.data_ptr() + places * itemsize for one, places in zip(some, numbers, strict=True)])
    expected_3 = torch.cat([one[places] for one, places in zip(some, numbers, strict=True)])
    assert torch.equal(Elements(addresses, dtype).read(), expected_3)
print("alike")
