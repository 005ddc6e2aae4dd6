"""Weight updates are all or nothing. They are staged beside the served weights, and each token names its version."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from millrace.checksum import checksum
from millrace.launch.ports import free_port
from tests.engines.embedded.conftest import Api, greedy_of, logprobs_of, reported_logprobs
from tests.engines.embedded.test_control import LONG, PROMPT, begin

TIED = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
Tensors = dict[str, torch.Tensor]


def tensors_of(model: Any) -> Tensors:
    """Returns the state dict without the tied alias."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name != TIED}


@contextmanager
def bucket(tensors: Tensors) -> Iterator[dict[str, Any]]:
    """Puts the tensors side by side in a memory file and yields the body of a load. The file is gone when the context
    ends."""
    descriptor = os.memfd_create("bucket")
    try:
        specs, offset = [], 0
        for name, tensor in tensors.items():
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            os.pwrite(descriptor, raw, offset)
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape = list(tensor.shape)
            specs.append({"name": name, "dtype": dtype, "shape": shape, "offset": offset, "nbytes": len(raw)})
            offset += len(raw)
        yield {"path": f"/proc/{os.getpid()}/fd/{descriptor}", "tensors": specs}
    finally:
        os.close(descriptor)


async def load(api: Api, tensors: Tensors) -> None:
    with bucket(tensors) as body:
        await api.post("/update_weights_from_shared_memory", body)


async def publish(api: Api, model: Any, version: str) -> None:
    await api.post("/begin_weight_update")
    await load(api, tensors_of(model))
    await api.post("/end_weight_update", {"weight_version": version})


async def sums(api: Api) -> dict[str, str]:
    answer = await api.post("/weights_checker", {"action": "checksum"})
    assert answer["success"] is True
    found = answer["ranks"][0]["checksums"]
    assert isinstance(found, dict)
    return found


def sums_of(model: Any) -> dict[str, str]:
    return {
        name: checksum(memoryview(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()))
        for name, t in tensors_of(model).items()
    }


async def assert_serves(api: Api, model: Any, version: str) -> None:
    answer = await api.generate(PROMPT, max_new_tokens=24, temperature=0)
    assert answer["output_ids"] == greedy_of(model, PROMPT, 24)
    assert answer["meta_info"]["weight_version"] == version
    assert (await api.get("/model_info"))["weight_version"] == version
    assert await sums(api) == sums_of(model)


async def test_an_update_through_shared_memory_in_two_buckets(api: Api, base: Any, other: Any) -> None:
    await assert_serves(api, base, "0")
    tensors = list(tensors_of(other).items())
    await api.post("/begin_weight_update")
    await load(api, dict(tensors[:5]))
    await load(api, dict(tensors[5:]))
    assert await sums(api) == sums_of(other)  # the checksums are those of the staged weights
    await api.post("/end_weight_update", {"weight_version": "1"})
    await assert_serves(api, other, "1")
    await publish(api, base, "2")  # into the tensors that served before
    await assert_serves(api, base, "2")


async def test_staging_disturbs_nothing_and_an_abort_leaves_nothing(api: Api, base: Any, other: Any) -> None:
    await api.post("/begin_weight_update")
    await load(api, tensors_of(other))
    assert (await api.get("/model_info"))["weight_version"] == "0"
    answer = await api.generate(PROMPT, max_new_tokens=24, temperature=0)
    assert answer["output_ids"] == greedy_of(base, PROMPT, 24)
    await api.post("/abort_weight_update")
    await assert_serves(api, base, "0")
    assert "no update is open" in await api.refused("/end_weight_update", {"weight_version": "1"})


async def test_a_request_in_flight_across_a_commit_tells_which_version_made_which_token(
    api: Api, base: Any, other: Any
) -> None:
    await api.post("/begin_weight_update")
    await load(api, tensors_of(other))
    (task,) = await begin(api, "x", max_new_tokens=80, temperature=0)
    await api.post("/end_weight_update", {"weight_version": "1"})
    answer = await task
    first, second = answer["meta_info"]["weight_versions"]
    cut = first["end"]
    assert (first["version"], first["start"], second["start"]) == ("0", 0, cut)
    assert (second["version"], second["end"]) == ("1", 80)
    assert answer["meta_info"]["weight_version"] == "1"
    # Up to the commit, all tokens are the old model's. The tokens after it are not those of either model alone, since
    # the KV cache stays.
    assert answer["output_ids"][:cut] == greedy_of(base, PROMPT, 80)[:cut]
    expected = logprobs_of(base, PROMPT, answer["output_ids"][:cut])
    assert reported_logprobs(answer)[:cut] == pytest.approx(expected, abs=1e-5)
    # Two versions made its KV cache, so no request may reuse it as a prefix.
    again = await api.generate(PROMPT + answer["output_ids"], max_new_tokens=4)
    assert again["meta_info"]["cached_tokens"] == 0


async def test_a_retracted_request_is_recomputed_by_the_new_weights(api: Api, other: Any) -> None:
    await api.post("/begin_weight_update")
    await load(api, tensors_of(other))
    (task,) = await begin(api, "x", max_new_tokens=80)
    await api.post("/pause_generation", {"mode": "retract"})
    await api.post("/end_weight_update", {"weight_version": "1"})
    await api.post("/continue_generation")
    answer = await task
    cut = answer["meta_info"]["weight_versions"][0]["end"]
    assert [s["version"] for s in answer["meta_info"]["weight_versions"]] == ["0", "1"]
    expected = logprobs_of(other, PROMPT, answer["output_ids"])
    assert reported_logprobs(answer)[cut:] == pytest.approx(expected[cut:], abs=1e-5)


async def test_no_prefix_of_another_version_is_reused(api: Api, base: Any, other: Any) -> None:
    prompt = PROMPT * 8
    await api.generate(prompt, max_new_tokens=4)
    assert (await api.generate(prompt, max_new_tokens=4))["meta_info"]["cached_tokens"] == len(prompt) - 1
    await publish(api, other, "1")
    answer = await api.generate(prompt, max_new_tokens=20, ignore_eos=True)
    assert answer["meta_info"]["cached_tokens"] == 0
    assert reported_logprobs(answer) == pytest.approx(logprobs_of(other, prompt, answer["output_ids"]), abs=1e-5)
    await publish(api, base, "0")  # an old name again, and still not the old prefixes
    assert (await api.generate(prompt, max_new_tokens=4))["meta_info"]["cached_tokens"] == 0


async def test_tensors_that_do_not_fit_are_refused_and_the_session_stays_open(api: Api, base: Any, other: Any) -> None:
    tensors = tensors_of(other)
    with bucket(tensors) as body:
        assert "no update is open" in await api.refused("/update_weights_from_shared_memory", body)
    await api.post("/begin_weight_update")
    assert "already open" in await api.refused("/begin_weight_update")
    wrong: list[tuple[Tensors, str]] = [
        ({"model.no_such.weight": torch.zeros(2)}, "model.no_such.weight"),
        ({NORM: torch.zeros(7)}, NORM),
        ({NORM: tensors[NORM].bfloat16()}, "bfloat16"),
    ]
    for entry, names in wrong:
        with bucket({**tensors, **entry}) as body:
            assert names in await api.refused("/update_weights_from_shared_memory", body)
    assert "lacks" in await api.refused("/end_weight_update", {"weight_version": "1"})
    with bucket(tensors) as body:
        body["tensors"][3]["offset"] += 10**9
        assert "bytes" in await api.refused("/update_weights_from_shared_memory", body)
        body["path"] = "/no/such/file"
        assert "/no/such/file" in await api.refused("/update_weights_from_shared_memory", body)
    await load(api, {name: tensor for name, tensor in tensors.items() if name != NORM})
    assert NORM in await api.refused("/end_weight_update", {"weight_version": "1"})
    await api.refused("/release_memory_occupation", {"tags": ["weights", "kv_cache"]})
    assert (await api.get("/server_info"))["asleep"] == []
    await load(api, {NORM: tensors[NORM]})
    await api.post("/end_weight_update", {"weight_version": "1"})
    await assert_serves(api, other, "1")
    await publish(api, base, "0")


async def test_a_tied_tensor_may_come_under_both_names_but_not_with_two_contents(api: Api, other: Any) -> None:
    tensors = tensors_of(other)
    await api.post("/begin_weight_update")
    await load(api, {**tensors, TIED: tensors[EMBEDDING]})
    held = await sums(api)
    assert held[TIED] == held[EMBEDDING]
    with bucket({TIED: tensors[EMBEDDING] + 1}) as body:
        assert "differ" in await api.refused("/update_weights_from_shared_memory", body)
    assert "lacks" in await api.refused("/end_weight_update", {"weight_version": "1"})
    await api.post("/abort_weight_update")

    alias_only = {TIED if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}
    await api.post("/begin_weight_update")
    await load(api, alias_only)
    await api.post("/end_weight_update", {"weight_version": "1"})
    await assert_serves(api, other, "1")


async def test_a_load_that_fails_half_way_changes_nothing(api: Api, base: Any, other: Any) -> None:
    await api.post("/inject_fault", {"kind": "refuse_update", "count": 2})
    tensors = list(tensors_of(other).items())
    await api.post("/begin_weight_update")
    await load(api, dict(tensors[:4]))
    with bucket(dict(tensors[4:])) as body:
        assert "half-way" in await api.refused("/update_weights_from_shared_memory", body, status=500)
    assert "lacks" in await api.refused("/end_weight_update", {"weight_version": "1"})
    await api.post("/abort_weight_update")
    await assert_serves(api, base, "0")
    await publish(api, other, "1")
    await assert_serves(api, other, "1")


async def test_an_update_while_paused(api: Api, other: Any) -> None:
    (task,) = await begin(api, "x", max_new_tokens=40)
    await api.post("/pause_generation", {"mode": "in_place"})
    await publish(api, other, "1")
    await api.post("/continue_generation")
    assert [s["version"] for s in (await task)["meta_info"]["weight_versions"]] == ["0", "1"]


async def test_generation_goes_on_during_a_slow_load(api: Api, other: Any) -> None:
    """The broadcast of this load starts only after a generate call has ended."""
    tensors = tensors_of(other)
    trainer = await Trainer.join(api)
    await api.post("/begin_weight_update")
    call = asyncio.create_task(api.post("/update_weights_from_distributed", trainer.body(tensors)))
    answer = await api.generate(PROMPT, max_new_tokens=16, ignore_eos=True)
    assert len(answer["output_ids"]) == 16
    assert not call.done()
    await trainer.broadcast(tensors)
    await call
    await api.post("/abort_weight_update")
    await trainer.leave(api)


async def test_an_update_from_a_process_group(api: Api, base: Any, other: Any) -> None:
    tensors = tensors_of(other)
    trainer = await Trainer.join(api)
    assert "no update is open" in await api.refused("/update_weights_from_distributed", trainer.body(tensors))
    await api.post("/begin_weight_update")
    for part in (dict(list(tensors.items())[:7]), dict(list(tensors.items())[7:])):
        call = asyncio.create_task(api.post("/update_weights_from_distributed", trainer.body(part)))
        await trainer.broadcast(part)
        await call
    assert await sums(api) == sums_of(other)
    await api.post("/end_weight_update", {"weight_version": "1"})
    await trainer.leave(api)
    assert "has been joined" in await api.refused("/update_weights_from_distributed", trainer.body(tensors))
    await assert_serves(api, other, "1")


async def test_a_later_trainer_replaces_one_that_has_not_left(api: Api, other: Any) -> None:
    tensors = tensors_of(other)
    gone, trainer = await Trainer.join(api), await Trainer.join(api)
    await api.post("/begin_weight_update")
    assert "has been joined" in await api.refused("/update_weights_from_distributed", gone.body(tensors))
    call = asyncio.create_task(api.post("/update_weights_from_distributed", trainer.body(tensors)))
    await trainer.broadcast(tensors)
    await call
    await api.post("/end_weight_update", {"weight_version": "1"})
    await trainer.leave(api)
    await assert_serves(api, other, "1")


async def test_waiting_for_a_trainer_ends_at_the_deadline(api: Api, base: Any) -> None:
    body = {**Trainer.group(free_port("127.0.0.1")), "timeout": 0.5}
    async with asyncio.timeout(10):
        assert "could not join" in await api.refused("/init_weights_update_group", body)
    trainer = await Trainer.join(api, timeout=0.5)
    await api.post("/begin_weight_update")
    async with asyncio.timeout(10):
        message = await api.refused("/update_weights_from_distributed", trainer.body(tensors_of(base)))
    assert "no broadcast arrived" in message
    await api.post("/abort_weight_update")
    await trainer.leave(api)
    await assert_serves(api, base, "0")


class Trainer:
    """Rank 0 in this process. It joins as SGLang's users do, by torch's own helper for named groups."""

    def __init__(self, group: Any, name: str) -> None:
        self._group, self._name = group, name

    @staticmethod
    def name(port: int) -> str:
        return f"weights-{port}"  # a torch process can use a name only once

    @classmethod
    def group(cls, port: int) -> dict[str, object]:
        return {
            "master_address": "127.0.0.1",
            "master_port": port,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": cls.name(port),
            "backend": "gloo",
        }

    def body(self, tensors: Tensors) -> dict[str, object]:
        return {
            "names": list(tensors),
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
            "shapes": [list(t.shape) for t in tensors.values()],
            "group_name": self._name,
        }

    @classmethod
    async def join(cls, api: Api, timeout: float = 30.0) -> "Trainer":
        port = free_port("127.0.0.1")
        call = asyncio.create_task(api.post("/init_weights_update_group", {**cls.group(port), "timeout": timeout}))

        def meet() -> Any:
            store: Any = dist.TCPStore("127.0.0.1", port, 2, is_master=True, timeout=timedelta(seconds=30))
            group, _ = dist.distributed_c10d._new_process_group_helper(
                2,
                0,
                [],
                dist.Backend("gloo"),
                dist.PrefixStore(cls.name(port), store),
                group_name=cls.name(port),
                timeout=timedelta(seconds=30),
            )
            return group

        group = await asyncio.to_thread(meet)
        await call
        return cls(group, cls.name(port))

    async def broadcast(self, tensors: Tensors) -> None:
        def send() -> None:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = 0, 0
            for tensor in tensors.values():
                self._group.broadcast([tensor], options).wait()

        await asyncio.to_thread(send)

    async def leave(self, api: Api) -> None:
        await api.post("/destroy_weights_update_group", {"group_name": self._name})
        await api.refused("/destroy_weights_update_group", {"group_name": self._name})
        self._group.shutdown()


async def test_an_update_from_disk(api: Api, other: Any, other_dir: Path) -> None:
    await api.post("/update_weights_from_disk", {"model_path": str(other_dir), "weight_version": "7"})
    await assert_serves(api, other, "7")


async def test_a_disk_update_that_fails_leaves_the_old_weights_serving(
    api: Api, base: Any, other_dir: Path, tmp_path: Path
) -> None:
    call = {"model_path": str(tmp_path), "weight_version": "7"}
    assert "safetensors" in await api.refused("/update_weights_from_disk", call)
    tensors = load_file(other_dir / "model.safetensors")
    del tensors[NORM]
    save_file(tensors, tmp_path / "model.safetensors")
    assert NORM in await api.refused("/update_weights_from_disk", call)
    whole = (other_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in await api.refused("/update_weights_from_disk", call)
    await assert_serves(api, base, "0")
    assert "no update is open" in await api.refused("/end_weight_update", {"weight_version": "7"})


async def test_a_folder_is_one_load_of_an_open_update(api: Api, base: Any, other: Any, other_dir: Path) -> None:
    await api.post("/begin_weight_update")
    assert "version" in await api.refused(
        "/update_weights_from_disk", {"model_path": str(other_dir), "weight_version": "7"}
    )
    await api.post("/update_weights_from_disk", {"model_path": str(other_dir)})
    assert await sums(api) == sums_of(other)
    assert (await api.get("/model_info"))["weight_version"] == "0"
    await api.post("/end_weight_update", {"weight_version": "1"})
    await assert_serves(api, other, "1")


async def test_a_new_name_for_the_weights(api: Api, base: Any) -> None:
    (task,) = await begin(api, "x", max_new_tokens=60)
    answer = await api.post("/update_weight_version", {"new_version": "5", "abort_all_requests": False})
    assert answer["new_version"] == "5"
    assert [s["version"] for s in (await task)["meta_info"]["weight_versions"]] == ["0", "5"]
    (task,) = await begin(api, "x")
    await api.post("/update_weight_version", {"new_version": "6"})
    assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"
    assert len((await task)["output_ids"]) < LONG
    await assert_serves(api, base, "6")
