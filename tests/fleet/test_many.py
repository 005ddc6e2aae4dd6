"""Samples and jobs, without engines: each job runs once, a bounded number at a time, and none is left over."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import NoEngineError
from millrace.fleet.many import Completion, as_completed, samples_of, seed_of
from millrace.types import GenerateRequest, SamplingParams


@given(st.integers(0, 2**63 - 1) | st.none(), st.integers(1, 50))
def test_samples_differ_in_ids_and_seeds_alone(seed: int | None, n: int) -> None:
    request = GenerateRequest((1, 2), SamplingParams(4, seed=seed))
    samples = list(samples_of(request, n))
    assert len({one.request_id for one in samples}) == len(samples) == n
    assert {one.input_ids for one in samples} == {(1, 2)}
    seeds = [one.sampling.seed for one in samples]
    assert seeds[0] == seed
    if seed is None:
        assert set(seeds) == {None}
    else:
        assert len(set(seeds)) == n
        assert all(one is not None and 0 <= one < 2**63 for one in seeds)
    assert (samples == [request]) == (n == 1)


def test_the_seeds_of_samples_stay_what_they_were() -> None:
    assert [seed_of(7, sample) for sample in range(3)] == [7, 7643869921872156431, 3167967750878333780]


@given(st.integers(0, 30), st.integers(1, 8), st.integers())
def test_jobs_end_in_any_order_and_a_bounded_number_runs(count: int, most: int, seed: int) -> None:
    async def main() -> None:
        draw = random.Random(seed)
        read, going = 0, dict[int, asyncio.Event]()

        def jobs() -> Iterator[int]:
            nonlocal read
            for job in range(count):
                read += 1
                yield job

        async def run(job: int) -> int:
            going[job] = asyncio.Event()
            await going[job].wait()
            del going[job]
            return job

        async def let_one_end() -> None:
            while True:
                if going:
                    going[draw.choice(sorted(going))].set()
                await asyncio.sleep(0)

        ending = asyncio.create_task(let_one_end())
        taken = list[int]()
        async for job in as_completed(jobs(), run, lambda: most):
            taken.append(job)
            assert read <= len(taken) + most
            assert len(going) <= most
        ending.cancel()
        assert sorted(taken) == list(range(count))

    asyncio.run(main())


@pytest.mark.asyncio
async def test_closing_cancels_what_runs_and_so_does_an_error() -> None:
    cancelled = list[int]()

    async def run(job: int) -> int:
        if job == 2:
            return job
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(job)
            raise
        raise AssertionError("it was not cancelled")

    async with aclosing(as_completed(iter(range(100)), run, lambda: 4)) as results:
        assert await anext(results) == 2
    assert sorted(cancelled) == [0, 1, 3]

    def broken() -> Iterator[int]:
        yield from (0, 2)
        raise ValueError("no more prompts")

    cancelled.clear()
    with pytest.raises(ValueError, match="no more prompts"):
        assert [job async for job in as_completed(broken(), run, lambda: 2)] == []
    assert cancelled == [0]


def test_a_completion_has_a_result_or_an_error() -> None:
    request = GenerateRequest((1,), SamplingParams(4))
    with pytest.raises(NoEngineError):
        Completion(0, 0, request, error=NoEngineError("none")).result()
