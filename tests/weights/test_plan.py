"""Buckets for any list of tensors."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from millrace.weights.plan import ALIGNMENT, buckets, layout, padded


class Sized:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


@given(st.lists(st.integers(0, 5000)), st.integers(1, 4000))
def test_every_tensor_travels_once_in_order_and_buckets_keep_to_their_size(sizes: list[int], limit: int) -> None:
    tensors = [(f"t{i}", Sized(size)) for i, size in enumerate(sizes)]
    made = list(buckets(tensors, limit))
    assert [name for bucket in made for name, _ in bucket] == [name for name, _ in tensors]
    for bucket in made:
        assert bucket
        assert sum(padded(t.nbytes) for _, t in bucket) <= limit or len(bucket) == 1


@given(st.lists(st.integers(0, 5000), min_size=1))
def test_no_two_tensors_of_a_bucket_overlap_and_each_is_aligned(sizes: list[int]) -> None:
    specs = layout([(f"t{i}", "uint8", (size,), size) for i, size in enumerate(sizes)])
    end = 0
    for spec, size in zip(specs, sizes, strict=True):
        assert spec.offset % ALIGNMENT == 0
        assert spec.offset >= end
        assert spec.nbytes == size
        end = spec.offset + spec.nbytes


@given(st.lists(st.integers(0, 500), min_size=1, max_size=6), st.integers(1, 2000))
def test_what_engines_fuse_with_scales_of_its_own_comes_in_one_bucket(sizes: list[int], limit: int) -> None:
    kinds = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "o_proj.weight")
    tensors = [(f"layers.{i}.attn.{kind}", Sized(size)) for i, size in enumerate(sizes) for kind in kinds]
    made = list(buckets(tensors, limit))
    assert [name for bucket in made for name, _ in bucket] == [name for name, _ in tensors]
    for layer in range(len(sizes)):
        holding = [b for b in made if any(name.startswith(f"layers.{layer}.attn.q") for name, _ in b)]
        assert len(holding) == 1
        assert {f"layers.{layer}.attn.{kind}" for kind in kinds[:4]} <= {name for name, _ in holding[0]}


def test_the_source_is_asked_for_one_bucket_at_a_time() -> None:
    asked = []

    def source() -> Iterator[tuple[str, Sized]]:
        for i in range(6):
            asked.append(i)
            yield f"t{i}", Sized(100)

    stream = buckets(source(), 256)
    next(stream)
    assert len(asked) == 3  # two that fit, and the one that did not
