"""Penalties and prompts' logprobs over HTTP: beside other requests, in parts, and when a request loses its slot."""

import asyncio
from typing import Any

import pytest

from tests.engines.embedded.conftest import Api, greedy_of, logprobs_of
from tests.engines.embedded.test_generate import CLOSE, assert_logprobs, prompt_of

PENALTIES: dict[str, Any] = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.3}
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize("length", [1, 2, 256, 257, 400])
async def test_a_prompts_logprobs_are_those_of_a_full_forward(api: Api, base: Any, length: int) -> None:
    prompt = prompt_of(length, 20)
    body = {
        "input_ids": prompt,
        "logprob_start_len": 0,
        "return_logprob": True,
        "sampling_params": {**GREEDY, "max_new_tokens": 10},
    }
    neighbours = [api.generate(prompt_of(30 + i, 21 + i), **GREEDY, max_new_tokens=30) for i in range(5)]
    answer, again, *others = await asyncio.gather(
        api.post("/generate", body), api.post("/generate", {**body, "rid": "again"}), *neighbours
    )
    for one in (answer, again):
        scored = one["meta_info"]["input_token_logprobs"]
        assert [entry[1] for entry in scored] == prompt
        assert scored[0][0] is None
        assert [entry[0] for entry in scored[1:]] == pytest.approx(logprobs_of(base, prompt[:1], prompt[1:]), abs=1e-4)
        assert one["output_ids"] == greedy_of(base, prompt, 10)
    for i, other in enumerate(others):
        assert_logprobs(base, prompt_of(30 + i, 21 + i), other)


async def test_penalties_are_a_requests_own_and_last_through_a_retraction(api: Api, base: Any) -> None:
    prompt = prompt_of(25, 30)
    alone = await api.generate(prompt, **GREEDY, **PENALTIES, max_new_tokens=60)
    plain = await api.generate(prompt, **GREEDY, max_new_tokens=60)
    assert alone["output_ids"] != plain["output_ids"]
    await api.post("/inject_fault", {"kind": "slow", "seconds": 0.01})
    running = [
        asyncio.create_task(api.generate(prompt, **GREEDY, **changes, max_new_tokens=60))
        for changes in (PENALTIES, {}, {"logit_bias": {"7": 50.0}}, PENALTIES)
    ]
    await api.until_running(4)
    await api.post("/pause_generation", {"mode": "retract"})
    await api.post("/continue_generation")
    answers = await asyncio.gather(*running)
    assert all(answer["meta_info"]["num_retractions"] == 1 for answer in answers)
    assert [answer["output_ids"] for answer in answers] == [
        alone["output_ids"], plain["output_ids"], [7] * 60, alone["output_ids"],
    ]  # fmt: skip
    assert_logprobs(base, prompt, answers[1])


async def test_what_is_continued_counts_as_output(api: Api) -> None:
    prompt = prompt_of(25, 30)
    whole = await api.generate(prompt, **GREEDY, **PENALTIES, max_new_tokens=40)
    for cut in (1, 17, 39):
        body = {
            "input_ids": prompt + whole["output_ids"][:cut],
            "continued_tokens": cut,
            "return_logprob": True,
            "sampling_params": {**GREEDY, **PENALTIES, "max_new_tokens": 40 - cut},
        }
        rest = await api.post("/generate", body)
        assert rest["output_ids"] == whole["output_ids"][cut:]
        expected = [entry[0] for entry in whole["meta_info"]["output_token_logprobs"][cut:]]
        assert [entry[0] for entry in rest["meta_info"]["output_token_logprobs"]] == pytest.approx(expected, abs=CLOSE)


async def test_stop_texts_need_a_tokenizer(api: Api) -> None:
    body = {"input_ids": [1, 2], "sampling_params": {"stop": ["END"]}}
    assert "tokenizer.json can't be read, and stop texts need it" in await api.refused("/generate", body)
