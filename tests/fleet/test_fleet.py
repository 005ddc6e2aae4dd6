"""A fleet of real embedded engines: routing, publishing, sleeping, and engines that fail."""

import asyncio
import copy
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.config import EmbeddedEngineConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import (
    ConfigError,
    EngineTimeout,
    EngineUnreachable,
    LaunchError,
    NoEngineError,
    NonFiniteLogprobs,
    PublishError,
)
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.fleet.replica_state import Phase
from millrace.fleet.routing import Why
from millrace.launch.ports import free_port
from millrace.types import (
    FinishReason,
    GenerateRequest,
    Generation,
    MemoryTag,
    RoutingContext,
    SamplingParams,
    VersionSpan,
)
from millrace.weights.transports.base import NamedTensors, StagedBucket
from millrace.weights.transports.shared_memory import SharedMemoryTransport
from tests.conformance.nan import check_nan_weights

PROMPT = (5, 17, 300, 42, 8)
CONFIG = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1, faults=True)


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(shared_fleet: Fleet, model: PreTrainedModel) -> AsyncIterator[Fleet]:
    """The module's fleet, healthy and with the folder's weights. Tests that use it must leave it like that."""
    yield shared_fleet
    for engine in embedded(shared_fleet):
        await engine.inject_fault("slow", seconds=0.0)
        await engine.abort()
    await shared_fleet.publish(tensors(model), following(shared_fleet))
    assert all(state.routable for state in shared_fleet.snapshot.replicas)


@pytest_asyncio.fixture(loop_scope="module")
async def doomed_fleet(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Fleet]:
    """A fleet of its own, for a test that loses an engine."""
    async with open_fleet(CONFIG, tiny_model, log_dir=tmp_path) as fleet:
        yield fleet


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def tensors(model: PreTrainedModel, scale: float = 1.0) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach() * scale) for name, parameter in model.named_parameters()]


def greedy(request_id: str, tokens: int = 12) -> GenerateRequest:
    return GenerateRequest(PROMPT, SamplingParams(tokens, temperature=0.0, ignore_eos=True), request_id=request_id)


def expected(model: PreTrainedModel, tokens: int = 12) -> tuple[int, ...]:
    """Returns the greedy tokens by transformers' own forward pass."""
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(PROMPT) :])


def embedded(fleet: Fleet) -> list[EmbeddedEngine]:
    return [engine for engine in fleet.engines.values() if isinstance(engine, EmbeddedEngine)]


def served(fleet: Fleet) -> int:
    [version] = {state.version for state in fleet.snapshot.replicas}
    assert version is not None
    return version


def following(fleet: Fleet) -> int:
    return served(fleet) + 1


async def running(fleet: Fleet) -> list[int]:
    """Returns how many requests run on each engine that serves."""
    serving = [fleet.engines[state.name] for state in fleet.snapshot.replicas if state.routable]
    return [(await engine.loads()).running_requests for engine in serving]


async def busy(fleet: Fleet) -> None:
    """Waits until some engine runs a request."""
    async with asyncio.timeout(10):
        while not any(await running(fleet)):
            await asyncio.sleep(0.01)


async def idle(fleet: Fleet) -> None:
    async with asyncio.timeout(10):
        while any(await running(fleet)):
            await asyncio.sleep(0.01)


async def slow_down(fleet: Fleet, seconds: float) -> None:
    for engine in embedded(fleet):
        await engine.inject_fault("slow", seconds=seconds)


async def ask_each(fleet: Fleet, tokens: int = 12) -> dict[str, Generation]:
    return {name: await engine.generate(greedy("each", tokens), deadline=20) for name, engine in fleet.engines.items()}


async def until(condition: Callable[[], bool], deadline: float = 15) -> None:
    async with asyncio.timeout(deadline):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_fleet_serves_its_folder_and_shares_the_work(fleet: Fleet, model: PreTrainedModel) -> None:
    answers = await asyncio.gather(*(fleet.generate(greedy(f"r{i}"), deadline=20) for i in range(8)))
    assert {a.output_ids for a in answers} == {expected(model)}
    assert all(a.version_spans == (VersionSpan(served(fleet), 0, 12),) and len(a.logprobs) == 12 for a in answers)


async def test_requests_go_to_the_engine_with_the_least_to_do(fleet: Fleet) -> None:
    await slow_down(fleet, 0.05)
    long = [asyncio.create_task(fleet.generate(greedy(f"long{i}", 200), deadline=30)) for i in range(6)]
    async with asyncio.timeout(15):
        while await running(fleet) != [3, 3]:
            await asyncio.sleep(0.01)
    for task in long:
        task.cancel()
    await asyncio.gather(*long, return_exceptions=True)


async def test_a_published_version_is_what_every_engine_serves(fleet: Fleet, model: PreTrainedModel) -> None:
    version = following(fleet)
    report = await fleet.publish(tensors(model, 1.5), version, bucket_bytes=64 * 1024)
    assert not report.failed
    assert served(fleet) == version
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.5)
    for generation in (await ask_each(fleet)).values():
        assert generation.output_ids == expected(scaled)
        assert generation.version_spans == (VersionSpan(version, 0, 12),)
        assert generation.cached_tokens == 0


async def test_a_generation_across_a_publish_says_which_version_made_which_tokens(
    fleet: Fleet, model: PreTrainedModel
) -> None:
    before = served(fleet)
    await slow_down(fleet, 0.02)
    generating = asyncio.create_task(fleet.generate(greedy("across", 60), deadline=30))
    await busy(fleet)
    await fleet.publish(tensors(model, 1.2), before + 1)
    first, second = (await generating).version_spans
    assert (first.version, second.version) == (before, before + 1)
    assert (first.start, first.end, second.end) == (0, second.start, 60)


async def test_an_engine_that_refuses_half_way_leaves_the_rotation_and_the_others_go_on(
    doomed_fleet: Fleet, model: PreTrainedModel
) -> None:
    fleet = doomed_fleet
    bad = embedded(fleet)[0]
    await bad.inject_fault("refuse_update", count=2)
    report = await fleet.publish(tensors(model), 1, bucket_bytes=64 * 1024)
    assert list(report.failed) == ["embedded-0"]
    state = fleet.snapshot.get("embedded-0")
    assert state.phase is Phase.QUARANTINED
    assert "embedded-0" in (state.reason or "")
    answers = await asyncio.gather(*(fleet.generate(greedy(f"r{i}"), deadline=20) for i in range(4)))
    assert {a.version_spans for a in answers} == {(VersionSpan(1, 0, 12),)}
    [left_out] = (await fleet.publish(tensors(model), 2)).left_out
    assert left_out.startswith("embedded-0 (quarantined")
    assert (await bad.info()).weight_version == 0  # it has rolled back, and still is not routable


async def test_an_engine_that_hangs_in_a_publish_is_out_at_the_deadline_and_the_other_serves(
    doomed_fleet: Fleet, model: PreTrainedModel
) -> None:
    fleet = doomed_fleet
    await embedded(fleet)[0].inject_fault("hang")
    stuck = asyncio.create_task(embedded(fleet)[0].generate(greedy("stuck"), deadline=60))
    report = await fleet.publish(tensors(model), 1, deadline=5)
    assert "commit took longer than 2." in str(report.failed["embedded-0"])
    assert fleet.snapshot.get("embedded-0").phase is Phase.QUARANTINED
    assert fleet.snapshot.get("embedded-1").version == 1
    assert (await fleet.generate(greedy("after"), deadline=20)).version_spans == (VersionSpan(1, 0, 12),)
    stuck.cancel()
    await asyncio.gather(stuck, return_exceptions=True)


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t[1:], EMBEDDING),
        (lambda t: [*t, ("model.extra", torch.zeros(2))], "model.extra"),
        (lambda t: [(t[0][0], t[0][1].T.contiguous()), *t[1:]], EMBEDDING),
        (lambda t: [(t[0][0], t[0][1].int()), *t[1:]], EMBEDDING),  # the tensor is not a float, so it is not cast
        (lambda t: [*t, t[0]], "named a tensor twice"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "twice"],
)
async def test_tensors_that_are_not_the_models_change_nothing(
    fleet: Fleet, model: PreTrainedModel, spoil: Callable[[object], list[tuple[str, torch.Tensor]]], says: str
) -> None:
    version = served(fleet)
    with pytest.raises(PublishError, match=says):
        await fleet.publish(spoil(tensors(model, 2.0)), version + 1, bucket_bytes=64 * 1024)
    assert served(fleet) == version
    assert {g.output_ids for g in (await ask_each(fleet)).values()} == {expected(model)}
    assert not (await fleet.publish(tensors(model), version + 1)).failed


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
async def test_weights_that_are_not_finite_are_refused(fleet: Fleet, model: PreTrainedModel, bad: float) -> None:
    version = served(fleet)
    spoilt = [(name, tensor.clone()) for name, tensor in tensors(model)]
    spoilt[-1][1].view(-1)[3] = bad
    with pytest.raises(PublishError, match=f"{spoilt[-1][0]} has NaN or infinite values"):
        await fleet.publish(spoilt, version + 1)
    with pytest.raises(PublishError, match="has NaN or infinite values"):
        await fleet.publish(iter(spoilt), version + 1, bucket_bytes=64 * 1024)
    assert {g.version_spans for g in (await ask_each(fleet)).values()} == {(VersionSpan(version, 0, 12),)}
    assert not (await fleet.publish(tensors(model), version + 1)).failed


async def test_bytes_that_changed_on_the_way_are_never_committed(fleet: Fleet, model: PreTrainedModel) -> None:
    version = served(fleet)
    transport = fleet._versions.transport
    fleet._versions.transport = FlippingTransport()
    try:
        with pytest.raises(PublishError, match="tensors are not what was sent"):
            await fleet.publish(tensors(model, 2.0), version + 1)
    finally:
        await fleet._versions.transport.close()
        fleet._versions.transport = transport
    assert {g.output_ids for g in (await ask_each(fleet)).values()} == {expected(model)}
    assert {(await engine.info()).weight_version for engine in embedded(fleet)} == {version}


class FlippingTransport(SharedMemoryTransport):
    """Shared memory in which one bit flips after the checksum was taken."""

    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:
        staged = super().stage(tensors, slot)
        self._slots[slot].bytes[100] ^= 1
        return staged


async def test_a_source_that_raises_leaves_the_old_version_serving(fleet: Fleet, model: PreTrainedModel) -> None:
    def source() -> Iterator[tuple[str, torch.Tensor]]:
        yield from tensors(model, 2.0)[:3]
        raise ValueError("the trainer lost a tensor")

    with pytest.raises(ValueError, match="lost a tensor"):
        await fleet.publish(source(), following(fleet), bucket_bytes=16 * 1024)
    assert {g.output_ids for g in (await ask_each(fleet)).values()} == {expected(model)}


async def test_a_source_that_is_too_slow_has_ended_when_its_publish_has(fleet: Fleet, model: PreTrainedModel) -> None:
    """The thread of the source can't be stopped. It must not write into a bucket of the next publish."""
    ended = threading.Event()

    def source() -> Iterator[tuple[str, torch.Tensor]]:
        ended.wait(1.0)  # longer than the publish may take
        yield from tensors(model, 2.0)[:1]
        ended.set()

    with pytest.raises(PublishError, match=r"within 0\.5 s"):
        await fleet.publish(source(), following(fleet), bucket_bytes=2**30, deadline=0.5)
    assert ended.is_set()
    assert {g.output_ids for g in (await ask_each(fleet)).values()} == {expected(model)}


async def test_versions_only_grow_and_publishes_come_one_at_a_time(fleet: Fleet, model: PreTrainedModel) -> None:
    version = served(fleet)
    first = asyncio.create_task(fleet.publish(tensors(model), version + 2))
    await asyncio.sleep(0)
    with pytest.raises(PublishError, match="another version is being published"):
        await fleet.publish(tensors(model), version + 3)
    await first
    with pytest.raises(PublishError, match=f"version {version + 1} is not newer than version {version + 2}"):
        await fleet.publish(tensors(model), version + 1)


async def test_asleep_requests_wait_and_awake_they_are_answered_by_the_new_version(
    fleet: Fleet, model: PreTrainedModel
) -> None:
    version = following(fleet)
    await fleet.sleep()
    await fleet.sleep()  # a second sleep does nothing
    waiting = asyncio.create_task(fleet.generate(greedy("w"), deadline=20))
    with pytest.raises(PublishError, match="asleep; wake them"):
        await fleet.publish(tensors(model), version)
    await fleet.wake(frozenset({MemoryTag.WEIGHTS}))
    await fleet.publish(tensors(model), version)
    assert not waiting.done()
    await fleet.wake(frozenset({MemoryTag.KV_CACHE}))
    assert (await waiting).version_spans == (VersionSpan(version, 0, 12),)


async def test_a_cancelled_request_is_aborted_on_the_engine(fleet: Fleet) -> None:
    await slow_down(fleet, 0.05)
    with pytest.raises(EngineTimeout):
        await fleet.generate(greedy("late", 200), deadline=0.5)
    await idle(fleet)
    cancelled = asyncio.create_task(fleet.generate(greedy("cancelled", 200), deadline=30))
    await busy(fleet)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    await idle(fleet)


async def test_an_aborted_request_comes_back_with_its_tokens(fleet: Fleet) -> None:
    await slow_down(fleet, 0.02)
    engine = fleet.engines["embedded-0"]
    generating = asyncio.create_task(engine.generate(greedy("a", 200), deadline=30))
    await busy(fleet)
    await engine.abort("a")
    generation = await generating
    assert generation.finish_reason is FinishReason.ABORT
    assert len(generation.output_ids) == len(generation.logprobs) < 200


async def test_the_stream_grows_to_the_whole_answer(fleet: Fleet, model: PreTrainedModel) -> None:
    chunks = [chunk async for chunk in fleet.engines["embedded-0"].stream(greedy("s"), deadline=20)]
    assert len(chunks) > 1
    assert chunks[-1].output_ids == expected(model)
    for before, after in itertools.pairwise(chunks):
        assert after.output_ids[: len(before.output_ids)] == before.output_ids


async def test_a_killed_engine_is_out_at_once_and_the_rest_serve_until_none_is_left(doomed_fleet: Fleet) -> None:
    fleet = doomed_fleet
    await embedded(fleet)[0].inject_fault("crash", after_tokens=50)
    outcomes = await asyncio.gather(
        *(fleet.generate(greedy(f"r{i}", 40), deadline=30) for i in range(8)), return_exceptions=True
    )
    assert any(isinstance(o, EngineUnreachable) for o in outcomes)
    await until(lambda: fleet.snapshot.get("embedded-0").phase is Phase.DEAD)
    answers = await asyncio.gather(*(fleet.generate(greedy(f"again{i}"), deadline=20) for i in range(6)))
    assert len(answers) == 6
    waiting = asyncio.create_task(fleet.generate(greedy("in flight", 200), deadline=30))
    await busy(fleet)
    with pytest.raises(EngineUnreachable):
        await embedded(fleet)[1].inject_fault("crash")
    with pytest.raises(EngineUnreachable):
        await waiting
    await until(lambda: not fleet.snapshot.usable)
    with pytest.raises(NoEngineError, match=r"embedded-0 \(dead.*embedded-1 \(dead"):
        await fleet.generate(greedy("x"), deadline=5)


async def test_nothing_is_left_of_a_version_with_nans(fleet: Fleet, model: PreTrainedModel) -> None:
    version = served(fleet)
    spoilt = [(name, tensor.clone()) for name, tensor in tensors(model)]
    spoilt[0][1].view(-1)[:] = float("nan")
    assert not (await fleet.publish(spoilt, version + 1, require_finite=False)).failed
    requests = (fleet.generate(greedy(f"nan{i}", 40 + i), deadline=30) for i in range(8))
    spoiled = await asyncio.gather(*requests, return_exceptions=True)
    assert all(isinstance(error, NonFiniteLogprobs) for error in spoiled)
    assert not (await fleet.publish(tensors(model), version + 2)).failed
    made = await asyncio.gather(*(fleet.generate(greedy(f"sound{i}"), deadline=30) for i in range(8)))
    assert {one.output_ids for one in made} == {expected(model)}


async def test_an_argument_that_is_no_list_of_tensors_is_refused(fleet: Fleet, model: PreTrainedModel) -> None:
    for wrong, hint in ((model.state_dict(), r"\.items\(\)"), (model, r"named_parameters")):
        with pytest.raises(PublishError, match=hint):
            await fleet.publish(wrong, following(fleet))
    with pytest.raises(PublishError, match="version must be an integer, and is '7'"):
        await fleet.publish(tensors(model), "7")  # type: ignore[arg-type]
    with pytest.raises(NoEngineError, match="no engine is called embedded-9"):
        await fleet.restart("embedded-9")


async def test_a_port_in_use_ends_the_start_with_one_message_and_no_process(tiny_model: Path, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = (free_port("127.0.0.1"), taken.getsockname()[1])
        config = CONFIG.model_copy(update={"ports": ports})
        with pytest.raises(LaunchError, match=f"port {ports[1]} of 127.0.0.1 can't be used"):
            async with open_fleet(config, tiny_model, log_dir=tmp_path):
                raise AssertionError("it must not start")
    with socket.create_server(("127.0.0.1", ports[0])):
        pass  # the engine that did start has ended, and its port is free


async def test_an_impossible_transport_ends_the_started_engines(tiny_model: Path, tmp_path: Path) -> None:
    import socket

    port = free_port("127.0.0.1")
    config = CONFIG.model_copy(update={"replicas": 1, "ports": (port,)})
    with pytest.raises(PublishError, match=r"embedded-0 can't take weights by the transport cuda_ipc"):
        async with open_fleet(config, tiny_model, log_dir=tmp_path, transport="cuda_ipc"):
            raise AssertionError("it must not start")
    with pytest.raises(ConfigError, match=r"publish.folder nosuch://x can't be used"):
        async with open_fleet(config, tiny_model, log_dir=tmp_path, folder="nosuch://x"):
            raise AssertionError("it must not start")
    with pytest.raises(ConfigError, match=r"transport 'carrier' is unknown; valid here: auto, shm"):
        async with open_fleet(config, tiny_model, log_dir=tmp_path, transport="carrier"):  # type: ignore[arg-type]
            raise AssertionError("it must not start")
    with socket.create_server(("127.0.0.1", port)):
        pass


async def test_a_request_waits_for_the_version_that_it_asks_for(fleet: Fleet, model: PreTrainedModel) -> None:
    new = following(fleet)
    later = RoutingContext(min_version=new)
    with pytest.raises(NoEngineError, match=rf"no engine at version {new} or later could serve within .*version"):
        await fleet.generate(greedy("too-soon"), deadline=0.1, routing=later)
    waiting = asyncio.create_task(fleet.generate(greedy("waits"), deadline=20, routing=later))
    exact = RoutingContext(exact_version=new - 1)
    old = await fleet.generate(greedy("old"), deadline=20, routing=exact)
    assert not waiting.done()
    await fleet.publish(tensors(model, 1.5), new)
    assert [(await waiting).version_spans, old.version_spans] == [
        (VersionSpan(new, 0, 12),),
        (VersionSpan(new - 1, 0, 12),),
    ]
    with pytest.raises(NoEngineError, match=f"no engine at version {new - 1} could serve"):
        await fleet.generate(greedy("too-late"), deadline=0.1, routing=exact)


async def test_a_session_stays_with_its_engine(fleet: Fleet) -> None:
    first = await fleet.generate(greedy("s/0"), deadline=20, routing=RoutingContext(session="s"))
    again = GenerateRequest(PROMPT + first.output_ids, SamplingParams(4, temperature=0.0), request_id="s/1")
    assert (await fleet.generate(again, deadline=20, routing=RoutingContext(session="s"))).cached_tokens > len(PROMPT)
    assert fleet.event_log.metrics.routed[Why.SESSION] > 0


async def test_nan_is_blamed_on_the_weights(fleet: Fleet, tiny_model: Path) -> None:
    await check_nan_weights(fleet, tiny_model, following(fleet))
