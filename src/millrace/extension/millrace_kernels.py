"""Kernels in Triton, for work on thousands of tensors that would otherwise take a few calls of torch for each.

The trainer and the engines' processes run this file, so it imports nothing of Millrace. Import it only where there is a
GPU: torch brings Triton there.
"""

import triton.language as tl

import triton


@triton.jit  # type: ignore[untyped-decorator]
def copy_chunks(sources, targets, words, source_base, target_base, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy one run of words: `words[i]` from `source_base + sources[i]` to `target_base + targets[i]`, in bytes."""
    one = tl.program_id(0)
    source = (tl.load(sources + one) + source_base).to(tl.pointer_type(tl.int64))
    target = (tl.load(targets + one) + target_base).to(tl.pointer_type(tl.int64))
    places = tl.arange(0, CHUNK)
    inside = places < tl.load(words + one)
    tl.store(target + places, tl.load(source + places, mask=inside), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def copy_rows(  # type: ignore[no-untyped-def]
    sources, targets, firsts, words, row_words, source_pitches, target_pitches, source_base, target_base,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Copy words number `firsts[i]` and following of one copy, which has `words[i]` in rows of `row_words[i]`.

    The rows begin `source_pitches[i]` and `target_pitches[i]` bytes apart, from `source_base + sources[i]` and
    `target_base + targets[i]` on.
    """
    one = tl.program_id(0)
    numbers = tl.load(firsts + one) + tl.arange(0, CHUNK)
    inside = numbers < tl.load(words + one)
    width = tl.load(row_words + one)
    rows = numbers // width
    ahead = 8 * (numbers - rows * width)
    source = tl.load(sources + one) + source_base + rows * tl.load(source_pitches + one) + ahead
    target = tl.load(targets + one) + target_base + rows * tl.load(target_pitches + one) + ahead
    values = tl.load(source.to(tl.pointer_type(tl.int64)), mask=inside)
    tl.store(target.to(tl.pointer_type(tl.int64)), values, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def sum_samples(memory, firsts, steps, widths, counts, sums, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write two sums of one tensor's samples: of the values, and of each value times its number, from 1.

    The samples are `counts[i]` elements in blocks of `widths[i]`, which begin `steps[i]` elements apart, from
    `firsts[i]` on.
    """
    one = tl.program_id(0)
    numbers = tl.arange(0, MOST)
    width = tl.load(widths + one)
    places = tl.load(firsts + one) + (numbers // width) * tl.load(steps + one) + numbers % width
    values = tl.load(memory + places, mask=numbers < tl.load(counts + one), other=0).to(tl.int64)
    tl.store(sums + 2 * one, tl.sum(values, 0))
    tl.store(sums + 2 * one + 1, tl.sum(values * (numbers + 1), 0))


@triton.jit  # type: ignore[untyped-decorator]
def gather(addresses, values, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the element at each of `count` addresses into `values`, which has the elements' dtype."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    at = tl.load(addresses + places, mask=inside, other=0).to(values.dtype)
    tl.store(values + places, tl.load(at, mask=inside), mask=inside)
