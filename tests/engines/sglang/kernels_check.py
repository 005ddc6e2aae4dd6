"""Compares the kernels with torch, in an interpreter that has Triton: on the CPU, where Triton interprets them."""

import sys

import torch

sys.path.insert(0, sys.argv[1])
import millrace_chunks
import millrace_copies
from millrace_copies import Plain, Slice, copy_out, fused
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
assert sum(isinstance(one, Plain) for one in copies) == 1, copies
copy_out(bucket, copies)
for target, tensor in zip(targets, tensors, strict=True):
    assert torch.equal(target.view(torch.uint8), tensor.view(torch.uint8))
print("alike")
