"""Different tensors have different checksums, and the same bytes have the same checksum wherever they lie."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.checksum import SAMPLE, sampled_checksums, tensor_checksum
from millrace.extension.millrace_samples import SampledPlaces
from millrace.weights.transports.layouts import layout_of

SIZES = st.one_of(st.integers(0, 40), st.integers(SAMPLE - 2, SAMPLE + 130), st.integers(3 * SAMPLE, 4 * SAMPLE))
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.bool])


def make(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator) * 10).to(dtype)


@given(SIZES, DTYPES, st.integers(0, 9))
def test_the_same_bytes_have_the_same_sampled_checksum(size: int, dtype: torch.dtype, seed: int) -> None:
    tensor = make(size, dtype, seed)
    elsewhere = torch.cat([tensor[:1], tensor])[len(tensor[:1]) :]
    one, two = sampled_checksums([tensor, elsewhere.reshape(-1, 1)])
    assert one == two == sampled_checksums([tensor.clone()])[0]


@given(st.data(), SIZES.filter(bool), st.integers(0, 9))
def test_other_bytes_have_another_checksum(data: st.DataObject, size: int, seed: int) -> None:
    """One changed element is noticed if all elements are sampled, and a changed stretch if they are not."""
    tensor = make(size, torch.bfloat16, seed)
    width = 1 if size <= SAMPLE else size // 50
    start = data.draw(st.integers(0, size - width))
    changed = tensor.clone()
    changed[start : start + width] = tensor[start : start + width] + 1
    assert sampled_checksums([changed]) != sampled_checksums([tensor])
    assert tensor_checksum(changed) != tensor_checksum(tensor)


def test_elements_in_another_order_have_another_checksum() -> None:
    tensor = make(SAMPLE // 2, torch.bfloat16, 0)
    assert sampled_checksums([tensor.flip(0)]) != sampled_checksums([tensor])


def test_many_tensors_at_once_have_the_checksums_of_each() -> None:
    tensors = [make(size, torch.float32, size) for size in range(600)]
    assert sampled_checksums(tensors) == [sampled_checksums([tensor])[0] for tensor in tensors]
    assert not sampled_checksums([])


@given(st.lists(st.tuples(SIZES, DTYPES), max_size=12), st.integers(0, 9))
def test_tensors_in_a_bucket_have_the_checksums_of_each(kinds: list[tuple[int, torch.dtype]], seed: int) -> None:
    tensors = [make(size, dtype, seed) for size, dtype in kinds]
    specs = layout_of([(str(index), tensor) for index, tensor in enumerate(tensors)]).specs
    bucket = torch.zeros(sum(spec.nbytes for spec in specs) + 64 * len(specs) + 3, dtype=torch.uint8)
    for spec, tensor in zip(specs, tensors, strict=True):
        bucket[spec.offset : spec.offset + spec.nbytes] = tensor.view(torch.uint8)
    places = SampledPlaces(
        [(t.itemsize, t.numel(), s.offset) for t, s in zip(tensors, specs, strict=True)], bucket.device
    )
    assert places.checksums(bucket) == "".join(sampled_checksums(tensors))


def test_one_element_of_any_stride() -> None:
    assert tensor_checksum(torch.ones(1, 4)[:, 1]) == tensor_checksum(torch.ones(1))
