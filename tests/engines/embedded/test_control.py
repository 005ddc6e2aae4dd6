"""Abort, pause, flush, memory, and the server's reports about itself."""

import asyncio
from typing import Any

import pytest

from tests.engines.embedded.conftest import CONTEXT, VOCAB, Api, Server, greedy_of, logprobs_of, reported_logprobs

LONG = 400  # tokens, enough for a request to be running still when the test gets to it
PROMPT = [5, 17, 230, 44, 9, 121]


async def begin(api: Api, *rids: str, **params: object) -> list[asyncio.Task[Any]]:
    """Starts requests that generate slowly, and returns once they run."""
    await api.post("/inject_fault", {"kind": "slow", "seconds": 0.01})
    params = {"max_new_tokens": LONG, "ignore_eos": True, **params}
    before = (await api.load())["num_running_reqs"]
    tasks = [asyncio.create_task(api.generate(PROMPT, rid=rid, **params)) for rid in rids]
    await api.until_running(before + len(rids))
    return tasks


def end_of(answer: Any) -> str:
    kind = answer["meta_info"]["finish_reason"]["type"]
    assert isinstance(kind, str)
    return kind


async def test_abort_by_id_by_prefix_and_all(api: Api, base: Any) -> None:
    one, *others = await begin(api, "one", "group-1", "group-2", "last")
    await api.post("/abort_request", {"rid": "one"})
    answer = await one
    assert end_of(answer) == "abort"
    assert 0 < len(answer["output_ids"]) < LONG
    assert reported_logprobs(answer) == pytest.approx(logprobs_of(base, PROMPT, answer["output_ids"]), abs=1e-5)
    assert not any(task.done() for task in others)

    await api.post("/abort_request", {"rid": "group-"})
    assert [end_of(await task) for task in others[:2]] == ["abort", "abort"]
    assert not others[2].done()

    await api.post("/abort_request", {"abort_all": True})
    assert end_of(await others[2]) == "abort"
    assert "rid" in await api.refused("/abort_request", {})


async def test_a_waiting_request_is_aborted_without_tokens(api: Api) -> None:
    await api.post("/pause_generation", {"mode": "in_place"})
    task = asyncio.create_task(api.generate(PROMPT, rid="w", max_new_tokens=5))

    async def waits() -> bool:
        return bool((await api.load())["num_waiting_reqs"] == 1)

    await api.until(waits)
    await api.post("/abort_request", {"rid": "w"})
    answer = await task
    assert answer["output_ids"] == []
    assert answer["meta_info"]["weight_versions"] == []
    assert end_of(answer) == "abort"


async def test_pause_abort_brings_partial_answers_and_holds_new_requests(api: Api) -> None:
    tasks = await begin(api, "a", "b")
    await api.post("/pause_generation", {"mode": "abort"})
    assert [end_of(await task) for task in tasks] == ["abort", "abort"]
    held = asyncio.create_task(api.generate(PROMPT, max_new_tokens=3, ignore_eos=True))
    done, _ = await asyncio.wait([held], timeout=0.2)
    assert not done
    assert (await api.get("/server_info"))["is_paused"] is True
    await api.post("/continue_generation")
    assert len((await held)["output_ids"]) == 3


@pytest.mark.parametrize(("mode", "retractions"), [("in_place", 0), ("retract", 1)])
async def test_a_pause_in_the_middle_changes_no_token(api: Api, base: Any, mode: str, retractions: int) -> None:
    (task,) = await begin(api, "r", max_new_tokens=60, temperature=0)
    await api.post("/pause_generation", {"mode": mode})
    await api.post("/pause_generation", {"mode": mode})  # a second pause changes nothing
    load = await api.load()
    assert (load["num_running_reqs"], load["num_waiting_reqs"]) == ((0, 1) if retractions else (1, 0))
    done, _ = await asyncio.wait([task], timeout=0.1)
    assert not done
    await api.post("/continue_generation")
    answer = await task
    assert answer["output_ids"] == greedy_of(base, PROMPT, 60)
    assert reported_logprobs(answer) == pytest.approx(logprobs_of(base, PROMPT, answer["output_ids"]), abs=1e-5)
    assert answer["meta_info"]["num_retractions"] == retractions


async def test_a_seeded_stream_of_draws_goes_on_after_a_retraction(api: Api) -> None:
    whole = await api.generate(PROMPT, max_new_tokens=50, sampling_seed=9, ignore_eos=True)
    (task,) = await begin(api, "r", max_new_tokens=50, sampling_seed=9)
    await api.post("/pause_generation", {"mode": "retract"})
    await api.post("/continue_generation")
    answer = await task
    assert answer["meta_info"]["num_retractions"] == 1
    assert answer["output_ids"] == whole["output_ids"]


async def test_an_unknown_pause_mode_is_refused(api: Api) -> None:
    assert "mode" in await api.refused("/pause_generation", {"mode": "softly"})


async def test_flush_forgets_prefixes_and_is_refused_while_anything_runs(api: Api) -> None:
    prompt = PROMPT * 5
    await api.generate(prompt, max_new_tokens=2)
    assert (await api.generate(prompt, max_new_tokens=2))["meta_info"]["cached_tokens"] == len(prompt) - 1
    await api.post("/flush_cache")
    assert (await api.generate(prompt, max_new_tokens=2))["meta_info"]["cached_tokens"] == 0
    (task,) = await begin(api, "x")
    await api.refused("/flush_cache")
    await api.post("/abort_request", {"abort_all": True})
    await task
    await api.get("/flush_cache")


async def test_released_memory_is_really_free_and_nothing_generates_meanwhile(
    api: Api, session_server: Server, base: Any
) -> None:
    kv_bytes = (16 + 8) * CONTEXT * 2 * 16 * 4 * 2 * 2  # slots, tokens, heads, width, float32, keys and values, layers
    before = session_server.mapped_bytes()
    await api.post("/release_memory_occupation", {"tags": ["kv_cache"]})
    await api.post("/release_memory_occupation", {"tags": ["kv_cache"]})  # idempotent
    assert session_server.mapped_bytes() < before - kv_bytes // 2
    assert (await api.get("/server_info"))["asleep"] == ["kv_cache"]
    held = asyncio.create_task(api.generate(PROMPT, max_new_tokens=10, temperature=0))
    done, _ = await asyncio.wait([held], timeout=0.2)
    assert not done
    assert (await api.call("GET", "/health"))[0] == 200
    assert (await api.call("GET", "/health_generate"))[0] == 503
    await api.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
    await api.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
    assert (await held)["output_ids"] == greedy_of(base, PROMPT, 10)


async def test_memory_is_not_released_under_a_running_request(api: Api) -> None:
    (task,) = await begin(api, "x")
    assert "1 requests are running" in await api.refused("/release_memory_occupation", {"tags": ["kv_cache"]})
    await api.post("/pause_generation", {"mode": "in_place"})
    await api.refused("/release_memory_occupation", {"tags": ["weights"]})
    await api.post("/pause_generation", {"mode": "retract"})  # now the request holds no memory
    await api.post("/release_memory_occupation", {"tags": ["kv_cache"]})
    await api.post("/resume_memory_occupation")
    await api.post("/inject_fault", {"kind": "slow", "seconds": 0})
    await api.post("/continue_generation")
    assert len((await task)["output_ids"]) == LONG
    assert "tags" in await api.refused("/release_memory_occupation", {"tags": ["cuda_graph"]})


async def test_woken_weights_serve_nothing_until_they_are_loaded(
    api: Api, model_dir: Any, other_dir: Any, other: Any
) -> None:
    await api.post("/release_memory_occupation")
    assert (await api.get("/server_info"))["asleep"] == ["kv_cache", "weights"]
    assert (await api.get("/model_info"))["weight_version"] == "unknown"
    await api.refused("/begin_weight_update")
    await api.refused("/weights_checker")
    await api.refused("/update_weights_from_disk", {"model_path": str(model_dir), "weight_version": "5"})
    waits = asyncio.create_task(api.generate(PROMPT, max_new_tokens=8, temperature=0))
    done, _ = await asyncio.wait([waits], timeout=0.1)
    assert not done
    await api.post("/resume_memory_occupation", {"tags": ["weights"]})
    assert (await api.get("/model_info"))["weight_version"] == "unknown"
    assert "update" in await api.refused("/generate", {"input_ids": PROMPT}, status=503)
    assert (await api.call("GET", "/health_generate"))[0] == 503
    await api.refused("/update_weight_version", {"new_version": "9", "abort_all_requests": False})
    await api.post("/update_weights_from_disk", {"model_path": str(other_dir), "weight_version": "6"})
    assert not waits.done()  # the KV cache still sleeps
    await api.post("/resume_memory_occupation", {"tags": ["kv_cache"]})
    answer = await waits
    assert answer["output_ids"] == greedy_of(other, PROMPT, 8)
    assert answer["meta_info"]["weight_versions"] == [{"version": "6", "start": 0, "end": 8}]


async def test_the_server_reports_its_identity_and_state(api: Api, model_dir: Any) -> None:
    model = await api.get("/model_info")
    assert model["model_path"] == str(model_dir)
    assert (model["vocab_size"], model["context_length"], model["model_type"]) == (VOCAB, CONTEXT, "qwen3")
    assert model["architectures"] == ["Qwen3ForCausalLM"]
    server = await api.get("/server_info")
    assert (server["engine"], server["max_running_requests"], server["asleep"]) == ("millrace-embedded", 16, [])
    assert "staged_update" in server["capabilities"]
    assert (await api.call("GET", "/health_generate"))[0] == 200

    tasks = await begin(api, *(f"load-{i}" for i in range(16)))
    extra = asyncio.create_task(api.generate(PROMPT, rid="load-extra", max_new_tokens=2))

    async def full() -> bool:
        load = await api.load()
        return bool(load["num_waiting_reqs"] == 1 and load["num_used_tokens"] >= 16 * len(PROMPT))

    await api.until(full)
    load = await api.load()
    assert load["num_running_reqs"] == 16
    assert load["max_total_num_tokens"] == 16 * CONTEXT
    await api.post("/abort_request", {"rid": "load-"})
    await asyncio.gather(*tasks, extra)
    assert (await api.load())["num_running_reqs"] == 0


async def test_control_calls_are_answered_between_two_steps_of_a_busy_engine(api: Api) -> None:
    tasks = await begin(api, *(f"busy-{i}" for i in range(8)))
    async with asyncio.timeout(2):
        for _ in range(5):
            await api.post("/pause_generation", {"mode": "in_place"})
            await api.post("/continue_generation")
            await api.get("/v1/loads")
    await api.post("/abort_request", {"abort_all": True})
    await asyncio.gather(*tasks)
