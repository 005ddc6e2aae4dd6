"""The answers of /generate, compared with transformers itself."""

import asyncio
import itertools
import random
from typing import Any

import aiohttp
import pytest

from tests.engines.embedded.conftest import CONTEXT, EOS, VOCAB, Api, greedy_of, logprobs_of, reported_logprobs

CLOSE = 1e-5  # float32 on both sides


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB - 1) for _ in range(length)]


def assert_logprobs(model: Any, prompt: list[int], answer: Any, temperature: float = 1.0) -> None:
    expected = logprobs_of(model, prompt, answer["output_ids"], temperature)
    assert reported_logprobs(answer) == pytest.approx(expected, abs=CLOSE)


async def test_greedy_tokens_are_those_of_transformers(api: Api, base: Any) -> None:
    prompt = prompt_of(17, 1)
    answer = await api.generate(prompt, max_new_tokens=40, temperature=0, ignore_eos=False)
    assert answer["output_ids"] == greedy_of(base, prompt, 40)
    assert answer["text"] == ""
    assert_logprobs(base, prompt, answer)


async def test_mixed_lengths_at_once_have_the_logprobs_of_a_full_forward(api: Api, base: Any) -> None:
    prompts = [
        prompt_of(length, length) for length in (1, 2, 3, 9, 30, 31, 64, 150, 5, 5, 16, 17, 100, 7, 8, 40, 33, 12)
    ]
    lengths = [random.Random(i).randrange(1, 40) for i in range(len(prompts))]
    answers = await asyncio.gather(
        *(
            api.generate(p, max_new_tokens=n, temperature=0.7, ignore_eos=True)
            for p, n in zip(prompts, lengths, strict=True)
        )
    )
    for prompt, length, answer in zip(prompts, lengths, answers, strict=True):
        assert len(answer["output_ids"]) == length
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": length}
        assert answer["meta_info"]["prompt_tokens"] == len(prompt)
        assert_logprobs(base, prompt, answer, temperature=0.7)


async def test_logprobs_come_before_the_filters(api: Api, base: Any) -> None:
    prompt = prompt_of(12, 5)
    answer = await api.generate(
        prompt, max_new_tokens=20, temperature=1.3, top_k=5, top_p=0.8, min_p=0.05, ignore_eos=True
    )
    assert_logprobs(base, prompt, answer, temperature=1.3)


async def test_a_next_turn_reuses_the_prefix_and_keeps_its_logprobs(api: Api, base: Any) -> None:
    first = prompt_of(60, 7)
    turn = await api.generate(first, max_new_tokens=20, ignore_eos=True)
    assert turn["meta_info"]["cached_tokens"] == 0
    second = first + turn["output_ids"] + prompt_of(9, 8)
    answer = await api.generate(second, max_new_tokens=20, ignore_eos=True)
    assert answer["meta_info"]["cached_tokens"] == len(first) + 19  # the last token drawn was never fed to the model
    assert_logprobs(base, second, answer)


async def test_prompts_that_share_a_prefix_with_a_running_request_reuse_it(api: Api, base: Any) -> None:
    shared = prompt_of(80, 9)
    await api.post("/inject_fault", {"kind": "slow", "seconds": 0.01})
    running = asyncio.create_task(api.generate(shared, max_new_tokens=100, ignore_eos=True))
    await api.until_running(1)
    prompt = [*shared, 5, 6]
    answer = await api.generate(prompt, max_new_tokens=5, ignore_eos=True)
    assert answer["meta_info"]["cached_tokens"] == len(shared)
    assert_logprobs(base, prompt, answer)
    assert_logprobs(base, shared, await running)


async def test_n_samples_of_one_prompt(api: Api, base: Any) -> None:
    prompt = prompt_of(50, 10)
    answers = await api.generate(prompt, rid="many", n=6, max_new_tokens=12, ignore_eos=True, sampling_seed=3)
    assert [a["meta_info"]["id"] for a in answers] == [f"many-{i}" for i in range(6)]
    assert len({tuple(a["output_ids"]) for a in answers}) == 6
    assert [a["meta_info"]["cached_tokens"] for a in answers] == [0, 49, 49, 49, 49, 49]
    for answer in answers:
        assert_logprobs(base, prompt, answer)


async def test_more_samples_than_slots_all_come_back(api: Api) -> None:
    answers = await api.generate(prompt_of(5, 11), n=50, max_new_tokens=6, ignore_eos=True)
    assert [len(a["output_ids"]) for a in answers] == [6] * 50


async def test_a_seed_draws_the_same_alone_and_in_a_batch(api: Api) -> None:
    prompt = prompt_of(20, 12)
    alone = await api.generate(prompt, max_new_tokens=30, sampling_seed=42, ignore_eos=True)
    company = [
        api.generate(prompt_of(15 + i, 100 + i), max_new_tokens=25, top_p=0.9, ignore_eos=True) for i in range(9)
    ]
    again, *_ = await asyncio.gather(
        api.generate(prompt, max_new_tokens=30, sampling_seed=42, ignore_eos=True), *company
    )
    other = await api.generate(prompt, max_new_tokens=30, sampling_seed=43, ignore_eos=True)
    assert again["output_ids"] == alone["output_ids"]
    assert other["output_ids"] != alone["output_ids"]


async def test_without_a_seed_each_call_draws_differently(api: Api) -> None:
    prompt = prompt_of(20, 13)
    answers = [await api.generate(prompt, max_new_tokens=20, ignore_eos=True) for _ in range(2)]
    assert answers[0]["output_ids"] != answers[1]["output_ids"]


async def test_stop_tokens_end_and_are_part_of_the_output(api: Api, base: Any) -> None:
    prompt = prompt_of(17, 1)
    free = (await api.generate(prompt, max_new_tokens=30, temperature=0, ignore_eos=True))["output_ids"]
    stop = free[10]
    answer = await api.generate(prompt, max_new_tokens=30, temperature=0, stop_token_ids=[stop, 7], ignore_eos=True)
    assert answer["output_ids"] == free[: free.index(stop) + 1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


async def test_the_models_own_end_token_ends_unless_ignored(api: Api) -> None:
    wanted: dict[str, Any] = {"n": 16, "max_new_tokens": 200, "sampling_seed": 1, "temperature": 3.0}
    heeded = await api.generate([1, 2, 3], **wanted, ignore_eos=False)
    ignored = await api.generate([1, 2, 3], **wanted, ignore_eos=True)
    ends = [a["meta_info"]["finish_reason"] for a in heeded]
    assert {"type": "stop", "matched": EOS} in ends
    for answer, end in zip(heeded, ends, strict=True):
        assert (EOS in answer["output_ids"]) == (end["type"] == "stop")
    assert all(len(a["output_ids"]) == 200 for a in ignored)


async def test_the_context_ends_longer_requests(api: Api, base: Any) -> None:
    prompt = prompt_of(CONTEXT - 10, 14)
    answer = await api.generate(prompt, max_new_tokens=100, ignore_eos=True)
    assert len(answer["output_ids"]) == 10
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 10}
    assert_logprobs(base, prompt, answer)


async def test_a_stream_adds_up_to_the_answer(api: Api) -> None:
    prompt = prompt_of(20, 15)
    whole = await api.generate(prompt, max_new_tokens=25, sampling_seed=5, ignore_eos=True)
    events = [e async for e in api.stream(prompt, max_new_tokens=25, sampling_seed=5, ignore_eos=True)]
    assert len(events) > 2
    for before, after in itertools.pairwise(events):
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        assert before["meta_info"]["finish_reason"] is None
        assert len(reported_logprobs(before)) == len(before["output_ids"])
    assert events[-1]["output_ids"] == whole["output_ids"]
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 25}


async def test_a_stream_of_n_samples_tells_them_apart(api: Api) -> None:
    last: dict[int, Any] = {}
    async for event in api.stream(prompt_of(20, 16), n=3, max_new_tokens=8, sampling_seed=5, ignore_eos=True):
        last[event["index"]] = event
    whole = await api.generate(prompt_of(20, 16), n=3, max_new_tokens=8, sampling_seed=5, ignore_eos=True)
    assert [last[i]["output_ids"] for i in range(3)] == [a["output_ids"] for a in whole]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_disconnects_leaves_nothing_running(api: Api, stream: bool) -> None:
    await api.post("/inject_fault", {"kind": "slow", "seconds": 0.02})
    body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}, "stream": stream}

    async def call() -> None:
        async with aiohttp.ClientSession() as session, session.post(f"{api.url}/generate", json=body) as response:
            await response.read()

    caller = asyncio.create_task(call())
    await api.until_running(1)
    caller.cancel()
    await asyncio.wait([caller])
    await api.until_running(0)


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"input_ids": []}, "empty"),
        ({"input_ids": [1, VOCAB]}, "vocabulary"),
        ({"input_ids": [1, -1]}, "vocabulary"),
        ({"input_ids": [1] * CONTEXT}, "context"),
        ({"input_ids": [[1, 2]]}, "input_ids"),
        ({"input_ids": [True]}, "input_ids"),
        ({"text": "hello"}, "text"),
        ({"input_ids": [1], "sampling_params": {"temperature": -1}}, "temperature"),
        ({"input_ids": [1], "sampling_params": {"temperature": 1e-9}}, "temperature"),
        ({"input_ids": [1], "sampling_params": {"top_p": 0}}, "top_p"),
        ({"input_ids": [1], "sampling_params": {"top_p": 1.5}}, "top_p"),
        ({"input_ids": [1], "sampling_params": {"top_k": 0}}, "top_k"),
        ({"input_ids": [1], "sampling_params": {"top_k": -2}}, "top_k"),
        ({"input_ids": [1], "sampling_params": {"min_p": 2}}, "min_p"),
        ({"input_ids": [1], "sampling_params": {"n": 0}}, "n"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"input_ids": [1], "sampling_params": {"max_tokens": 3}}, "max_tokens"),
        ({"input_ids": [1], "rid": ""}, "rid"),
    ],
)
async def test_an_unsupported_setting_is_refused_by_name(api: Api, body: Any, names: str) -> None:
    assert names in await api.refused("/generate", body)


@pytest.mark.parametrize(
    "raw", [b'{"input_ids": [1', b'{"input_ids": [1], "sampling_params": {"temperature": NaN}}', b"[]"]
)
async def test_a_body_that_is_not_json_is_refused(api: Api, raw: bytes) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{api.url}/generate", data=raw) as response:
        assert response.status == 400
        assert "message" in (await response.json())["error"]


async def test_a_number_that_json_can_not_hold_is_refused(api: Api) -> None:
    raw = b'{"input_ids": [1], "sampling_params": {"temperature": 1e999}}'
    async with aiohttp.ClientSession() as session, session.post(f"{api.url}/generate", data=raw) as response:
        assert response.status == 400


async def test_one_id_in_flight_at_a_time(api: Api) -> None:
    await api.post("/inject_fault", {"kind": "slow", "seconds": 0.02})
    first = asyncio.create_task(api.generate([1, 2], rid="same", max_new_tokens=400, ignore_eos=True))
    await api.until_running(1)
    assert "same" in await api.refused("/generate", {"input_ids": [1], "rid": "same"})
    await api.post("/abort_request", {"rid": "same"})
    assert (await first)["meta_info"]["finish_reason"]["type"] == "abort"
    await api.generate([1, 2], rid="same", max_new_tokens=1)
