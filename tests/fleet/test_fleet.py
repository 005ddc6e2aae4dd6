"""A fleet of real embedded engines: routing, publishing, sleeping, and what happens when engines go wrong."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.config import EmbeddedEngineConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import EngineTimeout, EngineUnreachable, LaunchError, NoEngineError, PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.fleet.membership import Phase
from millrace.launch.ports import free_port
from millrace.types import FinishReason, GenerateRequest, Generation, MemoryTag, SamplingParams, Segment

PROMPT = (5, 17, 300, 42, 8)
CONFIG = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1, faults=True)


@pytest.fixture
async def fleet(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path) as fleet:
        yield fleet


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def tensors(model: PreTrainedModel, scale: float = 1.0) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach() * scale) for name, parameter in model.named_parameters()]


def greedy(request_id: str, tokens: int = 12) -> GenerateRequest:
    return GenerateRequest(request_id, PROMPT, SamplingParams(tokens, temperature=0.0, ignore_eos=True))


def expected(model: PreTrainedModel, tokens: int = 12) -> tuple[int, ...]:
    """The greedy tokens, by transformers' own forward pass."""
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(PROMPT) :])


async def ask_each(fleet: Fleet, tokens: int = 12) -> dict[str, Generation]:
    return {name: await engine.generate(greedy("each", tokens), deadline=20) for name, engine in fleet.engines.items()}


async def until(condition: Callable[[], bool], deadline: float = 15) -> None:
    async with asyncio.timeout(deadline):
        while not condition():
            await asyncio.sleep(0.01)


async def running(engine: EmbeddedEngine) -> int:
    return (await engine.loads()).running_requests


async def test_a_new_fleet_serves_its_folder_and_shares_the_work(fleet: Fleet, model: PreTrainedModel) -> None:
    assert {m.version for m in fleet.snapshot.members} == {0}
    answers = await asyncio.gather(*(fleet.generate(greedy(f"r{i}"), deadline=20) for i in range(8)))
    assert {a.output_ids for a in answers} == {expected(model)}
    assert all(a.segments == (Segment(0, 0, 12),) and len(a.logprobs) == 12 for a in answers)


async def test_requests_go_to_the_engine_with_the_least_to_do(fleet: Fleet) -> None:
    long = [asyncio.create_task(fleet.generate(greedy(f"long{i}", 200), deadline=30)) for i in range(6)]
    engines = [engine for engine in fleet.engines.values() if isinstance(engine, EmbeddedEngine)]
    for engine in engines:
        await engine.inject_fault("slow", seconds=0.05)
    async with asyncio.timeout(15):
        while [await running(engine) for engine in engines] != [3, 3]:
            await asyncio.sleep(0.01)
    for task in long:
        task.cancel()
    await asyncio.gather(*long, return_exceptions=True)


async def test_a_published_version_is_what_every_engine_serves(fleet: Fleet, model: PreTrainedModel) -> None:
    report = await fleet.publish(tensors(model, 1.5), 1, bucket_bytes=64 * 1024)
    assert not report.failed
    assert {m.version for m in fleet.snapshot.members} == {1}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for generation in (await ask_each(fleet)).values():
        assert generation.output_ids == expected(model)
        assert generation.segments == (Segment(1, 0, 12),)
        assert generation.cached_tokens == 0


async def test_a_generation_across_a_publish_says_which_version_made_which_tokens(
    fleet: Fleet, model: PreTrainedModel
) -> None:
    for engine in fleet.engines.values():
        assert isinstance(engine, EmbeddedEngine)
        await engine.inject_fault("slow", seconds=0.02)
    generating = asyncio.create_task(fleet.generate(greedy("across", 60), deadline=30))
    async with asyncio.timeout(10):
        while not any([await running(e) for e in fleet.engines.values() if isinstance(e, EmbeddedEngine)]):
            await asyncio.sleep(0.01)
    await fleet.publish(tensors(model, 1.2), 1)
    first, second = (await generating).segments
    assert (first.version, second.version) == (0, 1)
    assert (first.start, first.end, second.end) == (0, second.start, 60)


async def test_an_engine_that_refuses_half_way_leaves_the_rotation_and_the_others_go_on(
    fleet: Fleet, model: PreTrainedModel
) -> None:
    bad = fleet.engines["embedded-0"]
    assert isinstance(bad, EmbeddedEngine)
    await bad.inject_fault("refuse_update", count=2)
    report = await fleet.publish(tensors(model), 1, bucket_bytes=64 * 1024)
    assert list(report.failed) == ["embedded-0"]
    member = fleet.snapshot.get("embedded-0")
    assert member.phase is Phase.QUARANTINED
    assert member.reason
    assert "embedded-0" in member.reason
    answers = await asyncio.gather(*(fleet.generate(greedy(f"r{i}"), deadline=20) for i in range(4)))
    assert {a.segments for a in answers} == {(Segment(1, 0, 12),)}
    assert (await bad.info()).weight_version == 0  # rolled back, and not routable all the same


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t[1:], "embedded-0"),
        (lambda t: [*t, ("model.extra", torch.zeros(2))], "model.extra"),
        (lambda t: [(t[0][0], t[0][1].T.contiguous()), *t[1:]], "model.embed_tokens.weight"),
        (lambda t: [(t[0][0], t[0][1].double()), *t[1:]], "model.embed_tokens.weight"),
        (lambda t: [*t, t[0]], "named a tensor twice"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "twice"],
)
async def test_tensors_that_are_not_the_models_change_nothing(
    fleet: Fleet, model: PreTrainedModel, spoil: Callable[[object], list[tuple[str, torch.Tensor]]], says: str
) -> None:
    with pytest.raises(PublishError, match=says):
        await fleet.publish(spoil(tensors(model, 2.0)), 1, bucket_bytes=64 * 1024)
    assert {m.version for m in fleet.snapshot.members} == {0}
    assert {g.output_ids for g in (await ask_each(fleet)).values()} == {expected(model)}
    assert not (await fleet.publish(tensors(model), 1)).failed


async def test_a_source_that_raises_leaves_the_old_version_serving(fleet: Fleet, model: PreTrainedModel) -> None:
    def source() -> object:
        yield from tensors(model, 2.0)[:3]
        raise ValueError("the trainer lost a tensor")

    with pytest.raises(ValueError, match="lost a tensor"):
        await fleet.publish(source(), 1, bucket_bytes=16 * 1024)  # type: ignore[arg-type]
    assert {g.output_ids for g in (await ask_each(fleet)).values()} == {expected(model)}
    assert not (await fleet.publish(tensors(model), 1)).failed


async def test_versions_only_grow_and_publishes_come_one_at_a_time(fleet: Fleet, model: PreTrainedModel) -> None:
    first = asyncio.create_task(fleet.publish(tensors(model), 3))
    await asyncio.sleep(0)
    with pytest.raises(PublishError, match="another version is on its way"):
        await fleet.publish(tensors(model), 4)
    await first
    with pytest.raises(PublishError, match="version 2 is not newer than version 3"):
        await fleet.publish(tensors(model), 2)


async def test_asleep_requests_wait_and_awake_they_are_answered_by_the_new_version(
    fleet: Fleet, model: PreTrainedModel
) -> None:
    await fleet.sleep()
    await fleet.sleep()  # again: nothing happens
    waiting = asyncio.create_task(fleet.generate(greedy("w"), deadline=20))
    with pytest.raises(PublishError, match="asleep; wake them"):
        await fleet.publish(tensors(model), 1)
    await fleet.wake(frozenset({MemoryTag.WEIGHTS}))
    await fleet.publish(tensors(model), 1)
    assert not waiting.done()
    await fleet.wake(frozenset({MemoryTag.KV_CACHE}))
    assert (await waiting).segments == (Segment(1, 0, 12),)


async def test_what_nobody_waits_for_is_aborted_on_the_engine(fleet: Fleet) -> None:
    engines = [engine for engine in fleet.engines.values() if isinstance(engine, EmbeddedEngine)]
    for engine in engines:
        await engine.inject_fault("slow", seconds=0.05)
    with pytest.raises(EngineTimeout):
        await fleet.generate(greedy("late", 200), deadline=0.5)
    cancelled = asyncio.create_task(fleet.generate(greedy("cancelled", 200), deadline=30))
    async with asyncio.timeout(10):
        while not sum([await running(engine) for engine in engines]):
            await asyncio.sleep(0.01)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    async with asyncio.timeout(10):
        while sum([await running(engine) for engine in engines]):
            await asyncio.sleep(0.01)


async def test_an_aborted_request_comes_back_with_its_tokens(fleet: Fleet) -> None:
    engine = fleet.engines["embedded-0"]
    assert isinstance(engine, EmbeddedEngine)
    await engine.inject_fault("slow", seconds=0.02)
    generating = asyncio.create_task(engine.generate(greedy("a", 200), deadline=30))
    async with asyncio.timeout(10):
        while not await running(engine):
            await asyncio.sleep(0.01)
    await engine.abort("a")
    generation = await generating
    assert generation.finish_reason is FinishReason.ABORT
    assert len(generation.output_ids) == len(generation.logprobs) < 200


async def test_the_stream_grows_to_the_whole_answer(fleet: Fleet, model: PreTrainedModel) -> None:
    chunks = [chunk async for chunk in fleet.engines["embedded-0"].stream(greedy("s"), deadline=20)]
    assert len(chunks) > 1
    assert chunks[-1].output_ids == expected(model)
    for before, after in zip(chunks, chunks[1:], strict=False):
        assert after.output_ids[: len(before.output_ids)] == before.output_ids


async def test_a_killed_engine_is_out_at_once_and_the_rest_serve(fleet: Fleet) -> None:
    victim = fleet.engines["embedded-0"]
    assert isinstance(victim, EmbeddedEngine)
    await victim.inject_fault("crash", after_tokens=50)
    outcomes = await asyncio.gather(
        *(fleet.generate(greedy(f"r{i}", 40), deadline=30) for i in range(8)), return_exceptions=True
    )
    assert any(isinstance(o, EngineUnreachable) for o in outcomes)
    await until(lambda: fleet.snapshot.get("embedded-0").phase is Phase.DEAD)
    answers = await asyncio.gather(*(fleet.generate(greedy(f"again{i}"), deadline=20) for i in range(6)))
    assert len(answers) == 6


async def test_when_none_is_left_the_error_says_how_each_ended(fleet: Fleet) -> None:
    for name in ("embedded-0", "embedded-1"):
        replica = fleet._replicas[name]
        assert replica.process is not None
        os.kill(replica.process._process.pid, signal.SIGTERM)
    await until(lambda: not fleet.snapshot.usable)
    with pytest.raises(NoEngineError, match=r"embedded-0 \(dead.*embedded-1 \(dead"):
        await fleet.generate(greedy("x"), deadline=5)


async def test_a_port_in_use_ends_the_start_with_one_message_and_no_process(tiny_model: Path, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = (free_port("127.0.0.1"), taken.getsockname()[1])
        config = CONFIG.model_copy(update={"ports": ports})
        with pytest.raises(LaunchError, match=f"port {ports[1]} of 127.0.0.1 can't be used"):
            async with open_fleet(config, tiny_model, log_dir=tmp_path):
                raise AssertionError("it must not start")
    with socket.create_server(("127.0.0.1", ports[0])):
        pass  # the engine that did start is gone, and its port is free
