"""The extension that vLLM's workers load, on a real server. After an update the server equals one that was started from
the same weights. Anything that can't be loaded is refused.

The model has everything that makes loading hard: fused and sharded modules with biases, experts, tied embeddings, a
vocabulary that vLLM pads, and weights in another dtype than the server's.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from millrace.checksum import sampled_checksums
from millrace.extension.millrace_boxes import whole
from millrace.launch.ports import free_port
from millrace.train.tiny import make_tiny_tokenizer
from millrace.weights.transports.layouts import layout_of
from millrace.weights.transports.sending_group import SendingGroup
from millrace.weights.transports.slots import fill
from tests.engines.vllm.server import BucketOfParts, Server, SharedBucket, rows, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Reference:
    """The outputs and checksums of a server that was started from a folder of weights."""

    folder: Path
    weights: Weights
    outputs: list[tuple[list[int], list[float]]]
    checksums: dict[str, str]


@dataclass(frozen=True, slots=True)
class Subject:
    server: Server
    first: Reference
    second: Reference


def make_model(seed: int, folder: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,  # vLLM's attention on the CPU has no kernel for heads of 16
        num_key_value_heads=1,
        max_position_embeddings=256,
        mlp_only_layers=[0],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        qkv_bias=True,
        tie_word_embeddings=True,
        initializer_range=0.3,  # with less, experts and biases would change no token
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = Qwen2MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms are all 0 or 1
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


async def reference_of(server: Server, folder: Path) -> Reference:
    weights = load_file(folder / "model.safetensors")
    return Reference(folder, weights, await server.outputs(), await server.checksums())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Subject]:
    """A server of the first model, and the references of both models."""
    folder = tmp_path_factory.mktemp("extension")
    for seed in (0, 1):
        make_model(seed, folder / str(seed))

    async def second_alone() -> Reference:
        async with serving(folder / "1", vllm_python, folder) as server:
            return await reference_of(server, folder / "1")

    second = asyncio.create_task(second_alone())
    try:
        async with serving(folder / "0", vllm_python, folder) as server:
            yield Subject(server, await reference_of(server, folder / "0"), await second)
    finally:
        second.cancel()
        await asyncio.wait([second])


@pytest_asyncio.fixture(loop_scope="module")
async def subject(servers: Subject) -> AsyncIterator[Subject]:
    """The server, paused, without an open update, and with the weights of the first model."""
    async with servers.server.paused():
        await servers.server.call("abandon")
        await servers.server.done("begin")
        await servers.server.done("load", disk(servers.first.folder))
        await servers.server.done("commit", "0")
        yield servers
        await servers.server.call("abandon")


def disk(folder: Path) -> str:
    return json.dumps({"kind": "disk", "path": str(folder)})


async def check_serves(server: Server, expected: Reference) -> None:
    """Requires that the server has the outputs and checksums of a server that was started from these weights."""
    assert await server.checksums() == expected.checksums
    await server.post("/resume")
    assert await server.outputs() == expected.outputs
    await server.post("/pause?mode=abort")
    await server.post("/reset_prefix_cache")


async def update(server: Server, version: str, buckets: list[Weights]) -> None:
    await server.done("begin")
    for bucket in buckets:
        assert await server.load(bucket) == ""
    assert await server.done("commit", version) == {"version": version}


async def test_the_two_models_differ(servers: Subject) -> None:
    assert servers.first.outputs != servers.second.outputs
    assert all(
        value != servers.second.checksums[name]
        for name, value in servers.first.checksums.items()
        if ".attn." not in name
    )


async def test_buckets_in_any_order_that_part_fused_modules_anywhere(subject: Subject) -> None:
    weights = list(subject.second.weights.items())
    for seed in range(5):  # a bias may be the last part of its module
        random.Random(seed).shuffle(weights)
        await update(subject.server, "7", [dict([weight]) for weight in weights])
        assert await subject.server.checksums() == subject.second.checksums
        await update(subject.server, "6", [subject.first.weights])
    await update(subject.server, "7", [dict([weight]) for weight in weights])
    await check_serves(subject.server, subject.second)
    state = await subject.server.done("state")
    assert state.pop("planned") > 0
    assert state == {"version": "7", "updating": False, "rank": 0, "world_size": 1, "protocol": 3}


async def test_a_pause_at_once_interrupts_without_vllms_wait(servers: Subject) -> None:
    server = servers.server

    async def pause(path: str) -> float:
        """Pauses a server that generates, and returns the seconds that the call took."""
        sampling = {"max_tokens": 200, "temperature": 0.0, "ignore_eos": True}
        body = {"token_ids": [5, 9], "sampling_params": sampling}
        request = asyncio.create_task(server.post("/inference/v1/generate", body))
        await asyncio.sleep(0)
        started = time.monotonic()
        await server.post(path)
        seconds = time.monotonic() - started
        assert await server.get("/is_paused") == {"is_paused": True}
        await server.post("/resume")
        await request
        return seconds

    assert min([await pause("/pause?mode=abort") for _ in range(10)]) > 0.02
    assert min([await pause("/pause?mode=abort&at_once=true") for _ in range(10)]) < 0.02


async def test_one_update_follows_another(subject: Subject) -> None:
    for version, wanted in (("1", subject.second), ("2", subject.first), ("3", subject.second)):
        await update(subject.server, version, [wanted.weights])
        await check_serves(subject.server, wanted)


async def test_weights_from_a_folder(subject: Subject) -> None:
    await subject.server.done("begin")
    await subject.server.done("load", disk(subject.second.folder))
    await subject.server.done("commit", "1")
    await check_serves(subject.server, subject.second)


async def test_samples_of_each_bucket_are_those_of_what_was_sent(subject: Subject) -> None:
    server, weights = subject.server, subject.second.weights
    await server.done("begin")
    for name, tensor in weights.items():
        bucket = SharedBucket({name: tensor})
        result = await server.done("load", *bucket.described())
        bucket.take_back()
        assert result == {"samples": sampled_checksums([tensor])[0], "ignored": ""}
    await server.done("commit", "1")
    await check_serves(server, subject.second)


async def test_the_second_publish_replays_the_plan_of_the_first(subject: Subject) -> None:
    server, weights = subject.server, list(subject.second.weights.items())
    buckets = [dict(weights[: len(weights) // 2]), dict(weights[len(weights) // 2 :])]
    await update(server, "1", buckets)
    planned = (await server.done("state"))["planned"]
    await server.done("begin")
    await server.done("load", disk(subject.first.folder))
    await server.done("commit", "2")
    await check_serves(server, subject.first)
    await update(server, "3", buckets)
    assert (await server.done("state"))["planned"] == planned
    await check_serves(server, subject.second)


async def test_parts_in_any_cut_load_what_whole_tensors_load(subject: Subject) -> None:
    server, weights = subject.server, subject.second.weights
    needs = await server.needs({**weights, HEAD: weights[EMBEDDING]})
    assert needs == [(name, whole(tensor.shape)) for name, tensor in weights.items()]  # the head is tied
    slabs = [
        (name, ((first, min(first + 24, box[0][1])), *box[1:])) for name, box in needs for first in range(*box[0], 24)
    ]
    assert await server.checksums() == subject.first.checksums
    for seed in range(4):
        random.Random(seed).shuffle(slabs)
        for version in ("1", "2"):  # the second replays the plans of the first
            await update(server, "0", [subject.first.weights])
            await server.done("begin")
            for first in range(0, len(slabs), 16):
                await server.load_parts(weights, slabs[first : first + 16])
            await server.done("commit", version)
            assert await server.checksums() == subject.second.checksums
    await check_serves(server, subject.second)


async def test_parts_that_are_left_out_are_missing(subject: Subject) -> None:
    server, weights = subject.server, subject.second.weights
    needs = await server.needs(weights)
    for lacking, module in ((NORM, "model.norm"), (EXPERT, "mlp.experts"), (EMBEDDING, "embed_tokens")):
        await server.done("begin")
        await server.load_parts(weights, [(name, box) for name, box in needs if name != lacking])
        error = await server.refusal("commit", "1")
        assert f"only parts of model.{module}" in error or f"{module}" in error, error
        assert await server.done("abandon") == {"torn": True}


async def test_a_part_that_the_rank_does_not_need_is_refused(subject: Subject) -> None:
    server, weights = subject.server, subject.second.weights
    await server.needs({NORM: weights[NORM]})
    await server.done("begin")
    for name, box in ((Q, whole(weights[Q].shape)), (NORM, ((64, 66),))):
        bucket = BucketOfParts({**weights, NORM: torch.zeros(66)}, [(name, box)])
        assert "this rank does not need" in await server.refusal("load_parts", *bucket.described())
    bucket = BucketOfParts(weights, [(NORM, ((0, 64),))])
    assert "nothing for rank 0" in await server.refusal("load_parts", '{"ranks": []}', bucket.described()[1])
    assert "none for rank 0" in await server.refusal("load_parts", bucket.described()[0])
    for described in ("{}", "[[1]]", '[["n", "float32", [[2, 1]], 0]]', '[["n", "float32", [[0, 1]], 2]]'):
        assert len(await server.refusal("load_parts", bucket.described()[0], described)) < 400
    assert await server.done("abandon") == {"torn": False}
    assert await server.checksums() == subject.first.checksums


async def test_weights_in_the_servers_own_dtype_are_the_same(subject: Subject) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in subject.second.weights.items()}
    await update(subject.server, "1", [weights])
    await check_serves(subject.server, subject.second)


class Sender:
    """Rank 0 of a group of its own, whose other rank is the server's."""

    def __init__(self, name: str, seconds: float = 30) -> None:
        self._group = SendingGroup(name, torch.device("cpu"), "127.0.0.1", receivers=1, deadline=30)
        self.joining = joining(name, self._group.port, seconds)
        self._name = name

    async def broadcast(self, number: int, weights: Weights) -> None:
        layout = layout_of(list(weights.items()))
        bucket = torch.empty(layout.nbytes, dtype=torch.uint8)
        fill(bucket, layout, list(weights.items()))
        await self._group.broadcast_bucket(number, bucket)

    def described(self, number: int, weights: Weights, seconds: float = 30) -> tuple[str, str]:
        """Returns what the extension is told about a bucket."""
        place = {"kind": "process_group", "group": self._name, "number": number, "seconds": seconds}
        return json.dumps(place), SharedBucket(weights).described()[1]

    async def close(self) -> None:
        await asyncio.to_thread(self._group.close)

    async def die(self) -> None:
        """Ends in the middle of a bucket, as the server sees it."""
        self._group.abort("it is gone")
        await self.close()


def joining(name: str, port: int, seconds: float) -> str:
    """Returns what the extension is told about a group."""
    group = {"name": name, "backend": "gloo", "address": "127.0.0.1", "port": port, "rank_offset": 1}
    return json.dumps({**group, "world_size": 2, "seconds": seconds})


def halves(weights: Weights) -> tuple[Weights, Weights]:
    """Returns two buckets."""
    items = list(weights.items())
    return dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])


async def send_ahead(server: Server, sender: Sender, first: int, weights: Weights) -> None:
    """Loads two buckets with the numbers `first` and the one after it. Each has arrived before the call to load it."""
    await server.done("begin")
    buckets = list(enumerate(halves(weights), first))
    for number, bucket in buckets:
        await sender.broadcast(number, bucket)  # it ends when the rank has received it
    for number, bucket in buckets:
        answer = await server.done("load", *sender.described(number, bucket))
        assert answer["samples"] == "".join(sampled_checksums([tensor.contiguous() for tensor in bucket.values()]))


async def test_weights_from_a_process_group(subject: Subject) -> None:
    server = subject.server
    sender = Sender("weights")
    try:
        await server.done("join", sender.joining)
        for first, wanted in ((0, subject.second), (2, subject.first), (4, subject.second)):
            await send_ahead(server, sender, first, wanted.weights)
            await server.done("commit", str(first))
            await check_serves(server, wanted)
        await server.done("leave", "weights")
    finally:
        await sender.close()
    assert "no group weights" in await server.refusal("leave", "weights")
    await server.done("begin")
    assert "no group weights" in await server.refusal("load", *sender.described(6, subject.second.weights))


async def test_the_next_group_ends_the_one_before(subject: Subject) -> None:
    server, wanted = subject.server, subject.second
    senders = Sender("one"), Sender("two")
    try:
        for sender in senders:
            await server.done("join", sender.joining)
            await send_ahead(server, sender, 0, wanted.weights)
            await server.done("commit", "1")
        assert "no group one" in await server.refusal("leave", "one")
        await server.done("leave", "two")
    finally:
        for sender in senders:
            await sender.close()
    await check_serves(server, wanted)


async def test_waiting_for_a_sender_ends(subject: Subject) -> None:
    server, weights = subject.server, subject.second.weights
    assert "could not join group no" in await server.refusal("join", joining("no", free_port("127.0.0.1"), 0.5))
    assert "not complete: KeyError" in await server.refusal("join", '{"name": "no"}')
    sender = Sender("late", seconds=1)
    try:
        await server.done("join", sender.joining)
        await server.done("begin")
        error = await server.refusal("load", *sender.described(0, weights, seconds=0.5))
        assert error == "group late: bucket 0 did not come: not within 0 s"
        error = await server.refusal("load", *sender.described(0, weights))
        assert error == "group late: bucket 0 did not come: the group is closed"
        assert await server.done("abandon") == {"torn": False}
    finally:
        await sender.close()
    await check_serves(server, subject.first)


async def test_a_sender_dies(subject: Subject) -> None:
    """Before its second bucket, and before its first one. The server goes on, and takes the next version."""
    server, (first, second) = subject.server, halves(subject.second.weights)
    for sent in (1, 0):
        sender = Sender(f"after {sent}")
        await server.done("join", sender.joining)
        await server.done("begin")
        for number, bucket in enumerate((first, second)[:sent]):
            await sender.broadcast(number, bucket)
            await server.done("load", *sender.described(number, bucket))
        waiting = asyncio.create_task(server.refusal("load", *sender.described(sent, second)))
        await asyncio.sleep(0)
        started = time.monotonic()
        await sender.die()
        assert f"group after {sent}: bucket {sent} did not come" in await waiting
        assert time.monotonic() - started < 10
        await server.done("abandon")
    sender = Sender("next")
    try:
        await server.done("join", sender.joining)
        await send_ahead(server, sender, 0, subject.second.weights)
        await server.done("commit", "1")
    finally:
        await sender.close()
    await check_serves(server, subject.second)


async def test_a_buckets_memory_is_let_go(subject: Subject) -> None:
    def mapped(name: str) -> bool:
        for maps in Path("/proc").glob("[0-9]*/maps"):
            try:
                if maps.parent.name != str(os.getpid()) and name in maps.read_text():
                    return True
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return False

    name = f"millrace-test-{os.getpid()}"
    await subject.server.done("begin")
    for weights in ({Q: subject.second.weights[Q]}, {NORM: subject.second.weights[NORM]}, {NORM: torch.zeros(3)}):
        bucket = SharedBucket(weights, name)
        await subject.server.call("load", *bucket.described())
        assert not mapped(name)
        bucket.take_back()


async def test_a_changed_element_is_seen(subject: Subject) -> None:
    for name in (Q, EXPERT, NORM, EMBEDDING):
        changed = subject.first.weights[name].clone()
        changed.view(-1)[7] += 0.5
        await update(subject.server, "1", [{**subject.first.weights, name: changed}])
        sums = await subject.server.checksums()
        differing = {key for key, value in sums.items() if value != subject.first.checksums[key]}
        assert len(differing) == (2 if name == EMBEDDING else 1), (name, differing)


async def test_moved_elements_are_seen(subject: Subject) -> None:
    swapped = subject.first.weights[Q].roll(4, dims=1)
    await update(subject.server, "1", [{**subject.first.weights, Q: swapped}])
    sums = await subject.server.checksums()
    assert [key for key, value in sums.items() if value != subject.first.checksums[key]] == [
        "model.layers.0.self_attn.qkv_proj.weight"
    ]


@pytest.mark.parametrize("sent", [(Q,), (Q, K), (EXPERT,), ("model.layers.0.mlp.gate_proj.weight", NORM)])
async def test_a_module_in_part_is_no_update(subject: Subject, sent: tuple[str, ...]) -> None:
    server = subject.server
    await server.done("begin")
    await server.load({name: subject.second.weights[name] for name in sent})
    error = await server.refusal("commit", "1")
    module = {Q: "self_attn.qkv_proj", EXPERT: "mlp.experts"}.get(sent[0], "mlp.gate_up_proj")
    assert "only parts of" in error
    assert module in error
    torn = (await server.done("abandon"))["torn"]
    assert torn == (NORM in sent)  # this is the only tensor that was written
    if not torn:
        await check_serves(server, subject.first)


async def test_the_rest_of_a_module_completes_it(subject: Subject) -> None:
    server, weights = subject.server, dict(subject.second.weights)
    bucket = SharedBucket({Q: weights.pop(Q)})
    place, tensors = bucket.described()
    await server.done("load", json.dumps({**json.loads(place), "begin": True}), tensors)  # the bucket also begins
    bucket.take_back()
    assert "only parts" in await server.refusal("commit", "1")
    await server.load(weights)
    await server.done("commit", "1")
    await check_serves(server, subject.second)


async def test_tensors_that_an_abandoned_update_has_changed_must_come_again(subject: Subject) -> None:
    server, second = subject.server, subject.second.weights
    lower = {name: tensor for name, tensor in second.items() if ".layers.0." in name}
    await server.done("begin")
    await server.load(lower)
    assert await server.done("abandon") == {"torn": True}
    assert (await server.done("state"))["version"] is None
    await server.post("/resume")
    await server.outputs()  # the output is garbage, but it shows that every module has its memory
    await server.post("/pause?mode=abort")
    await server.done("begin")
    await server.load({name: tensor for name, tensor in second.items() if name not in lower})
    assert "given up" in await server.refusal("commit", "2")
    await server.load(lower)
    await server.done("commit", "2")
    await check_serves(server, subject.second)
    assert await server.done("abandon") == {"torn": False}


async def test_tied_embeddings_may_come_under_both_names(subject: Subject) -> None:
    server, weights = subject.server, subject.second.weights
    await update(server, "1", [{HEAD: weights[EMBEDDING]}, weights])
    await check_serves(server, subject.second)
    await server.done("begin")
    await server.load({HEAD: weights[EMBEDDING]})
    assert EMBEDDING in await server.refusal("commit", "2")
    await server.load({**weights, EMBEDDING: weights[EMBEDDING] + 1})
    assert "differ" in await server.refusal("commit", "2")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.0.self_attn.z_proj.weight", lambda _: torch.zeros(4)),
        ("anything", lambda _: torch.zeros(4)),
        (Q, lambda tensor: torch.cat([tensor, tensor])),
        (Q, lambda tensor: tensor[:-1]),
        (Q, lambda tensor: tensor.reshape(-1)),
        (Q, lambda tensor: tensor.to(torch.int32)),
        (EXPERT, lambda tensor: torch.cat([tensor, tensor], 1)),
        (EMBEDDING, lambda tensor: tensor[:-1]),
        (NORM, lambda tensor: tensor[:1]),
    ],
)
async def test_a_tensor_that_does_not_fit_changes_nothing(subject: Subject, name: str, change: Any) -> None:
    server = subject.server
    await server.done("begin")
    bad = change(subject.second.weights.get(name))
    assert name in await server.refused_load({NORM: subject.second.weights[NORM], name: bad})
    assert await server.checksums() == subject.first.checksums
    assert await server.done("abandon") == {"torn": False}


async def test_an_unknown_name_is_reported(subject: Subject) -> None:
    await subject.server.done("begin")
    unused = "model.layers.0.self_attn.o_proj.bias"
    assert await subject.server.load({unused: torch.zeros(64), NORM: subject.second.weights[NORM]}) == unused


async def test_a_tensor_comes_once(subject: Subject) -> None:
    await subject.server.done("begin")
    await subject.server.load({Q: subject.second.weights[Q]})
    assert "twice" in await subject.server.refused_load({Q: subject.second.weights[Q]})


async def test_calls_out_of_order_are_refused(subject: Subject) -> None:
    server = subject.server
    assert "no update is open" in await server.refused_load({NORM: subject.second.weights[NORM]})
    assert "no update is open" in await server.refusal("commit", "1")
    assert await server.done("abandon") == {"torn": False}
    await server.done("begin")
    assert "open already" in await server.refusal("begin")
    assert "nothing was loaded" in await server.refusal("commit", "1")
    assert (await server.done("state"))["updating"] is True


def row(
    name: object = NORM, dtype: object = "float32", shape: object = (64,), offset: object = 0, nbytes: object = 256
) -> tuple[object, ...]:
    return name, dtype, shape, offset, nbytes


SHARE = {"device": "GPU-0", "handle": "", "storage_bytes": 256, "storage_offset": 0, "ref_counter_handle": ""}
SHARE |= {"ref_counter_offset": 0, "event_handle": "", "event_sync_required": False}
FILE = json.dumps({"kind": "shared_memory", "path": __file__})


@pytest.mark.parametrize(
    "bucket",
    [
        ("no json",),
        ("[]",),
        ("{}",),
        ('{"kind": "pickle"}',),
        ('{"kind": "disk", "path": "/nowhere"}',),
        ('{"kind": "disk"}',),
        *(
            (json.dumps({"kind": "shared_memory", "path": path}),)
            for path in ("/proc/1/fd/12345", "/dev/null", "/proc", ["/proc"])
        ),
        (FILE, "no json"),
        (FILE, "{}"),
        *(
            (FILE, json.dumps([described]))
            for described in (
                "tensor",
                [NORM],
                row(dtype="quaternion"),
                row(dtype=None),
                row(shape=[65]),
                row(shape=[-64, -1]),
                row(shape="64"),
                row(offset=-256),
                row(offset=2),
                row(offset=1 << 40),
                row(offset=True),
                row(nbytes=255),
            )
        ),
        (FILE, json.dumps([row(), row(offset=256)])),
        (json.dumps({"kind": "cuda_ipc", "shares": [], "nbytes": 256}), json.dumps([row()])),
        (json.dumps({"kind": "cuda_ipc", "shares": [SHARE], "nbytes": 256}), json.dumps([row()])),
    ],
)
async def test_a_bad_bucket_is_an_error(subject: Subject, bucket: tuple[str, ...]) -> None:
    await subject.server.done("begin")
    assert len(await subject.server.refusal("load", *bucket)) < 400
    assert await subject.server.done("abandon") == {"torn": False}
    assert await subject.server.checksums() == subject.first.checksums


def warnings_of_loaders(logs: Path) -> list[str]:
    [log] = logs.glob("vllm-*.log")
    return [line for line in log.read_text().splitlines() if "the model's own loader loads" in line]


async def test_a_loader_that_computes_loads_its_tensors_each_time(vllm_python: Path, tmp_path: Path) -> None:
    """vLLM's loader of BLOOM reorders the rows of q, k and v, which copies of parts of the tensor do not do."""
    tokenizer = make_tiny_tokenizer()
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=2, **ends)
    for seed in (0, 1):
        torch.manual_seed(seed)
        BloomForCausalLM(config).save_pretrained(tmp_path / str(seed))
        tokenizer.save_pretrained(tmp_path / str(seed))
    async with serving(tmp_path / "0", vllm_python, tmp_path) as server, server.paused():
        asked = rows(load_file(tmp_path / "0" / "model.safetensors"))
        why = (await server.done("needs", asked))["unplanned"]
        assert why.startswith("transformer.h.0.self_attention.query_key_value")
        assert "the loader c" in why
        first = await server.checksums()
        for seed in (1, 0, 1):
            weights = load_file(tmp_path / str(seed) / "model.safetensors")
            await update(server, str(seed), [{name: tensor} for name, tensor in weights.items()])
            changed = {name for name, value in (await server.checksums()).items() if value != first[name]}
            assert any("query_key_value.weight" in name for name in changed) == (seed == 1)
            assert not changed or seed == 1
        told = await asyncio.to_thread(warnings_of_loaders, tmp_path)
        assert told
        assert all("query_key_value" in line for line in told)
        assert len(told) == len(set(told))  # each is told once
