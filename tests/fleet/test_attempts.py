"""A generation in pieces equals one that was made at once, whichever engine makes each piece."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from millrace.errors import ArgumentError, EngineUnreachable
from millrace.fleet.attempts import Attempts, generate_whole
from millrace.fleet.event_log import EventLog
from millrace.fleet.local import open_fleet
from millrace.types import FinishReason, GenerateRequest, Generation, MemoryTag, SamplingParams, VersionSpan
from tests.fleet.test_fleet import CONFIG, busy, embedded, expected, greedy
from tests.fleet.test_fleet import running as counts

PROMPT = (3, 1, 4)
END = 60.0


def piece(request: GenerateRequest, count: int, version: int, reason: FinishReason) -> Generation:
    """The next `count` of the tokens 100, 101, ... after the prompt, with logprobs that tell their places."""
    start = len(request.input_ids) - len(PROMPT)
    tokens = tuple(range(100 + start, 100 + start + count))
    logprobs = -np.arange(start, start + count, dtype=np.float32)
    version_spans = (VersionSpan(version, 0, count),) if count else ()
    return Generation(request.request_id, tokens, logprobs, reason, version_spans, len(request.input_ids), 2)


@given(
    st.integers(1, 30),
    st.lists(st.tuples(st.sampled_from(["dies", "aborts"]), st.integers(0, 40), st.integers(1, 3)), max_size=6),
    st.integers(0, 7),
    st.none() | st.integers(0, 9),
)
def test_all_tokens_come_once_and_in_order_or_the_last_error(
    wanted: int, losses: list[tuple[str, int, int]], retries: int, seed: int | None
) -> None:
    left, asked = list(losses), list[GenerateRequest]()

    async def send(request: GenerateRequest) -> Generation:
        asked.append(request)
        room = request.sampling.max_new_tokens
        if not left:
            return piece(request, room, 9, FinishReason.LENGTH)
        kind, count, version = left.pop(0)
        if kind == "dies":
            raise EngineUnreachable("e", "it broke off", sent=True)
        return piece(request, min(count, room), version, FinishReason.ABORT)

    request = GenerateRequest(PROMPT, SamplingParams(wanted, seed=seed), request_id="r")
    attempts = Attempts(retries, EventLog())
    try:
        made = asyncio.run(generate_whole(request, send, attempts))
    except EngineUnreachable:
        assert len(asked) == retries + 1 <= len(losses)
        return
    if made.finish_reason is FinishReason.ABORT:  # no retry was left, and the tokens so far are kept
        assert len(asked) == retries + 1 <= len(losses)
        assert made.output_ids == tuple(range(100, 100 + len(made.output_ids)))
        assert len(made.output_ids) < wanted
        return
    assert attempts.used == len(asked) - 1 <= retries
    assert (made.request_id, made.finish_reason) == ("r", FinishReason.LENGTH)
    assert made.output_ids == tuple(range(100, 100 + wanted))
    assert made.logprobs.tolist() == [-float(i) for i in range(wanted)]
    assert made.prompt_tokens == len(PROMPT)
    assert [s.start for s in made.version_spans] == [0, *(s.end for s in made.version_spans[:-1])]
    assert made.version_spans[-1].end == wanted
    assert all(one.version != two.version for one, two in pairwise(made.version_spans))
    assert len({one.request_id for one in asked}) == len(asked)
    assert all(one.sampling.max_new_tokens == wanted - len(one.input_ids) + len(PROMPT) for one in asked)
    if seed is not None:  # the same random numbers are drawn only if no earlier attempt made tokens
        assert all((a.sampling.seed == b.sampling.seed) == (a.input_ids == b.input_ids) for a, b in pairwise(asked))


@given(st.lists(st.integers(0, 5), max_size=20))
def test_an_abort_that_was_wanted_costs_no_attempt(counts: list[int]) -> None:
    left, asked = list(counts), list[str]()

    async def send(request: GenerateRequest) -> Generation:
        asked.append(request.request_id)
        room = request.sampling.max_new_tokens
        if not left:
            return piece(request, room, 2, FinishReason.STOP)
        return piece(request, min(left.pop(0), room), 1, FinishReason.ABORT)

    attempts = Attempts(0, EventLog())
    request = GenerateRequest(PROMPT, SamplingParams(1000), request_id="r")
    made = asyncio.run(generate_whole(request, send, attempts, interrupted=lambda: True))
    assert (made.output_ids, attempts.used) == (tuple(range(100, 1100)), 0)
    assert len(set(asked)) == len(asked) == len(counts) + 1


async def test_real_engines_go_on_where_another_was_aborted_or_killed(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path) as fleet:
        retries = fleet.event_log.metrics.retries
        for engine in embedded(fleet):
            await engine.inject_fault("slow", seconds=0.02)
        wrong: Any
        for wrong in (-1, 1.5, None):
            with pytest.raises(ArgumentError, match="retries must be"):
                await fleet.generate(greedy("wrong"), deadline=END, retries=wrong)

        running = asyncio.create_task(fleet.generate(greedy("aborted", 60), deadline=END, retries=1))
        await busy(fleet)
        await asyncio.gather(*(engine.abort() for engine in embedded(fleet)))
        made = await running
        assert (made.output_ids, retries[True]) == (expected(model, 60), 1)
        assert made.version_spans == (VersionSpan(0, 0, 60),)

        running = asyncio.create_task(fleet.generate(greedy("asleep", 60), deadline=END, retries=1))
        await busy(fleet)
        await fleet.sleep(frozenset({MemoryTag.KV_CACHE}), interrupt=True)
        assert not running.done()
        await fleet.wake()
        assert ((await running).output_ids, retries[True]) == (expected(model, 60), 1)

        running = asyncio.create_task(fleet.generate(greedy("killed", 60), deadline=END, retries=3))
        await busy(fleet)
        one = embedded(fleet)[(await counts(fleet)).index(1)]
        with pytest.raises(EngineUnreachable):
            await one.inject_fault("crash")
        made = await running
        assert made.output_ids == expected(model, 60)
        assert retries[True] >= 2

        running = asyncio.create_task(fleet.generate(greedy("given up", 60), deadline=END))
        await busy(fleet)
        await embedded(fleet)[1 - embedded(fleet).index(one)].abort()
        assert (await running).finish_reason is FinishReason.ABORT
