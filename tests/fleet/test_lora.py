"""Adapters published alone to real embedded engines: the tokens before, during and after the publish."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.config import EmbeddedEngineConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import EngineRefused, PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.fleet.lora import PublishedLoras
from millrace.fleet.replica_state import Event, Phase
from millrace.types import (
    Capability,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Generation,
    MemoryTag,
    SamplingParams,
    VersionSpan,
)
from millrace.weights.lora import write_lora
from millrace.weights.transports.base import PublishTarget
from tests.fleet.test_fleet import busy, embedded, expected, greedy, served, slow_down, tensors
from tests.lora import CONFIG, NamedTensors, lora, merged

ENGINES = EmbeddedEngineConfig(kind="embedded", replicas=2, threads=1, faults=True)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with open_fleet(ENGINES, tiny_model, log_dir=tmp_path_factory.mktemp("logs")) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(shared_fleet: Fleet, model: PreTrainedModel) -> AsyncIterator[Fleet]:
    """The module's fleet. Each test begins with the folder's weights, published under a version that is higher than any
    before."""
    yield shared_fleet
    await slow_down(shared_fleet, 0.0)
    await asyncio.gather(*(engine.abort() for engine in shared_fleet.engines.values()))
    await shared_fleet.publish(tensors(model), highest(shared_fleet) + 1)
    assert all(state.routable for state in shared_fleet.snapshot.replicas)


@pytest_asyncio.fixture(loop_scope="module")
async def doomed_fleet(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Fleet]:
    async with open_fleet(ENGINES, tiny_model, log_dir=tmp_path, folder=tmp_path / "versions") as fleet:
        yield fleet


def highest(fleet: Fleet) -> int:
    return max(state.version or 0 for state in fleet.snapshot.replicas)


async def ask_both(fleet: Fleet, label: str = "both") -> list[Generation]:
    """Sends enough requests for the fleet to use both engines."""
    return await asyncio.gather(*(fleet.generate(greedy(f"{label}{i}"), deadline=20) for i in range(4)))


async def publish(fleet: Fleet, parts: NamedTensors, version: int, deadline: float = 20.0) -> None:
    report = await fleet.publish_lora(parts, version, config=CONFIG, deadline=deadline)
    assert not report.failed
    assert (report.version, len(report.engines)) == (version, 2)
    assert report.nbytes == sum(tensor.nbytes for _, tensor in parts)


async def is_loaded(engine: EmbeddedEngine, name: str) -> bool:
    try:
        await engine.lora_checksums(name)
    except EngineRefused:
        return False
    return True


async def test_an_adapter_makes_what_the_merged_model_makes_and_its_segments_say_so(
    fleet: Fleet, model: PreTrainedModel
) -> None:
    parts, version = lora(model, 1), served(fleet) + 1
    with_it = expected(merged(model, parts))
    assert with_it != expected(model)
    before = await ask_both(fleet, "before")  # the base has cached the prompt now
    await publish(fleet, parts, version)
    assert served(fleet) == version
    after = await ask_both(fleet, "after")
    assert {g.output_ids for g in before} == {expected(model)}
    assert {g.version_spans for g in before} == {(VersionSpan(version - 1, 0, 12),)}
    assert {g.output_ids for g in after} == {with_it}
    assert {g.version_spans for g in after} == {(VersionSpan(version, 0, 12),)}


async def test_no_prefix_of_one_adapter_is_used_by_another(fleet: Fleet, model: PreTrainedModel) -> None:
    engine = fleet.engines["embedded-0"]
    for seed in (1, 2):
        parts = lora(model, seed)
        await publish(fleet, parts, highest(fleet) + 1)
        name = fleet.snapshot.get("embedded-0").lora
        request = GenerateRequest(
            tuple(range(5, 65)), SamplingParams(4, 0.0), request_id=f"p{seed}", extra={"lora_path": name}
        )
        assert (await engine.generate(request, deadline=20)).cached_tokens == 0
        assert (await engine.generate(request, deadline=20)).cached_tokens > 0


async def test_a_name_that_is_used_again_finds_no_prefix_of_its_first_owner(
    fleet: Fleet, model: PreTrainedModel, tmp_path: Path
) -> None:
    engine = fleet.engines["embedded-0"]
    request = GenerateRequest(
        tuple(range(5, 65)), SamplingParams(8, 0.0), request_id="again", extra={"lora_path": "again"}
    )
    outputs = set()
    for seed in (1, 2):
        written = write_lora(tmp_path, "again", 1, dict(lora(model, seed)), CONFIG)
        await engine.load_lora("again", str(written.path))
        made = await engine.generate(request, deadline=20)
        assert made.cached_tokens == 0
        outputs.add(made.output_ids)
        await engine.unload_lora("again")
    assert len(outputs) == 2


async def test_a_running_request_keeps_its_adapter_through_a_publish(fleet: Fleet, model: PreTrainedModel) -> None:
    base = served(fleet)
    first, second = lora(model, 1), lora(model, 2)
    await slow_down(fleet, 0.03)
    by_base = asyncio.create_task(fleet.generate(greedy("base", 60), deadline=60))
    await busy(fleet)
    await publish(fleet, first, base + 1)
    engine, name = embedded(fleet)[0], fleet.snapshot.get("embedded-0").lora
    assert name is not None
    by_first = [asyncio.create_task(fleet.generate(greedy(f"first{i}", 60), deadline=60)) for i in range(2)]
    await asyncio.sleep(0.2)
    await publish(fleet, second, base + 2)
    by_second = [asyncio.create_task(fleet.generate(greedy(f"second{i}", 60), deadline=60)) for i in range(2)]
    await asyncio.sleep(0.2)
    assert not by_base.done()
    assert not any(task.done() for task in by_first)
    assert await is_loaded(engine, name)
    await slow_down(fleet, 0.0)
    for task, maker, version in (
        (by_base, model, base),
        *((task, merged(model, first), base + 1) for task in by_first),
        *((task, merged(model, second), base + 2) for task in by_second),
    ):
        made = await task
        assert made.version_spans == (VersionSpan(version, 0, 60),)
        assert made.output_ids == expected(maker, 60)
    async with asyncio.timeout(10):  # the first adapter is unloaded when its last request has ended
        while await is_loaded(engine, name):
            await asyncio.sleep(0.01)


async def test_whole_weights_take_the_adapter_off_running_requests(fleet: Fleet, model: PreTrainedModel) -> None:
    """The old adapter on top of new weights would make tokens of no version."""
    version = served(fleet) + 1
    await publish(fleet, lora(model, 1), version)
    await slow_down(fleet, 0.03)
    running = asyncio.create_task(fleet.generate(greedy("across", 60), deadline=60))
    await busy(fleet)
    await asyncio.sleep(0.2)
    await fleet.publish(tensors(model, 1.5), version + 1)
    await slow_down(fleet, 0.0)
    first, second = (await running).version_spans
    assert (first.version, second.version, second.end) == (version, version + 1, 60)
    assert {state.lora for state in fleet.snapshot.replicas} == {None}
    after = await ask_both(fleet)
    whole = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(1.5)
    assert {(g.output_ids, g.version_spans) for g in after} == {(expected(whole), (VersionSpan(version + 1, 0, 12),))}
    parts = lora(model, 3)
    await publish(fleet, parts, version + 2)
    assert {g.output_ids for g in await ask_both(fleet, "over")} == {expected(merged(whole, parts))}


async def test_a_third_adapter_waits_for_stragglers_and_then_aborts_them(fleet: Fleet, model: PreTrainedModel) -> None:
    base = served(fleet)
    await publish(fleet, lora(model, 1), base + 1)
    await slow_down(fleet, 0.05)
    stragglers = [asyncio.create_task(fleet.generate(greedy(f"s{i}", 200), deadline=60)) for i in range(2)]
    await busy(fleet)
    await publish(fleet, lora(model, 2), base + 2)
    report = await fleet.publish_lora(lora(model, 3), base + 3, config=CONFIG, deadline=2.0)
    assert not report.failed
    assert all(engine.begin_seconds >= 1.0 for engine in report.engines)
    for made in await asyncio.gather(*stragglers):
        assert made.finish_reason is FinishReason.ABORT
        assert made.version_spans == (VersionSpan(base + 1, 0, len(made.output_ids)),)
    await slow_down(fleet, 0.0)
    assert {g.output_ids for g in await ask_both(fleet)} == {expected(merged(model, lora(model, 3)))}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda parts: parts[1:], "lora_A.weight is missing"),
        (lambda parts: parts[:1] + parts[2:], "lora_B.weight is missing"),
        (lambda parts: [(parts[0][0], parts[0][1][:2]), *parts[1:]], "with rank 4 they must be"),
        (lambda parts: [(parts[0][0], parts[0][1][:, :8]), *parts[1:]], "but the adapter's is"),
        (lambda parts: [(n.replace("layers.1", "layers.7"), t) for n, t in parts], "the model has no model.layers.7"),
        (
            lambda parts: [(n.replace("q_proj", "x_proj"), t) for n, t in parts],
            "x_proj is not among the target_modules",
        ),
        (
            lambda parts: [(n.replace(".weight", ".default.weight"), t) for n, t in parts],
            "is not a name that PEFT uses",
        ),
        (lambda parts: [p for p in parts if "down_proj" not in p[0]], "target_modules names down_proj"),
        (lambda parts: [*parts, parts[0]], "named a tensor twice"),
        (lambda parts: [(n, t.double()) for n, t in parts], "is torch.float64"),
        (lambda parts: [(n, t * float("nan")) for n, t in parts], "have NaN or infinite values"),
        (lambda parts: [], "has no tensors"),
    ],
    ids=["a", "b", "rank", "width", "module", "target", "name", "absent", "twice", "dtype", "nan", "none"],
)
async def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_sent(
    fleet: Fleet, model: PreTrainedModel, spoil: Callable[[NamedTensors], NamedTensors], says: str
) -> None:
    version = highest(fleet) + 1
    good = lora(model, 1)
    if served(fleet) == version - 1:
        await publish(fleet, good, version)
    with pytest.raises(PublishError, match=says):
        await fleet.publish_lora(spoil(good), version + 1, config=CONFIG)
    assert served(fleet) == version
    assert {g.output_ids for g in await ask_both(fleet)} == {expected(merged(model, good))}


async def test_adapters_and_whole_versions_are_numbered_alike(fleet: Fleet, model: PreTrainedModel) -> None:
    version = served(fleet) + 5
    await publish(fleet, lora(model, 1), version)
    for older in (version, version - 2):
        with pytest.raises(PublishError, match=f"is not newer than version {version}"):
            await fleet.publish_lora(lora(model, 2), older, config=CONFIG)
        with pytest.raises(PublishError, match=f"is not newer than version {version}"):
            await fleet.publish(tensors(model), older)
    first = asyncio.create_task(fleet.publish_lora(lora(model, 2), version + 1, config=CONFIG))
    await asyncio.sleep(0)
    with pytest.raises(PublishError, match="another version is being published"):
        await fleet.publish(tensors(model), version + 2)
    await first


async def test_an_engine_that_refuses_an_adapter_is_out_until_the_next(fleet: Fleet, model: PreTrainedModel) -> None:
    version = served(fleet) + 1
    await publish(fleet, lora(model, 1), version)
    await embedded(fleet)[0].inject_fault("refuse_update", count=1)
    report = await fleet.publish_lora(lora(model, 2), version + 1, config=CONFIG)
    assert list(report.failed) == ["embedded-0"]
    assert fleet.snapshot.get("embedded-0").phase is Phase.READY
    assert not fleet.snapshot.get("embedded-0").routable
    assert {g.version_spans for g in await ask_both(fleet)} == {(VersionSpan(version + 1, 0, 12),)}
    await publish(fleet, lora(model, 3), version + 2)
    assert {g.output_ids for g in await ask_both(fleet)} == {expected(merged(model, lora(model, 3)))}


async def test_if_all_refuse_the_old_adapter_goes_on_serving(fleet: Fleet, model: PreTrainedModel) -> None:
    version = served(fleet) + 1
    await publish(fleet, lora(model, 1), version)
    for engine in embedded(fleet):
        await engine.inject_fault("refuse_update", count=1)
    with pytest.raises(PublishError, match="no engine took the adapter of version"):
        await fleet.publish_lora(lora(model, 2), version + 1, config=CONFIG)
    made = await ask_both(fleet)
    assert {(g.output_ids, g.version_spans) for g in made} == {
        (expected(merged(model, lora(model, 1))), (VersionSpan(version, 0, 12),))
    }
    await publish(fleet, lora(model, 2), version + 1)  # the version number is free


async def test_an_engine_that_hangs_is_out_and_the_other_serves(doomed_fleet: Fleet, model: PreTrainedModel) -> None:
    fleet = doomed_fleet
    await embedded(fleet)[0].inject_fault("slow", seconds=0.02)
    stuck = asyncio.create_task(embedded(fleet)[0].generate(greedy("stuck", 200), deadline=60))
    await busy(fleet)
    await embedded(fleet)[0].inject_fault("hang")  # it hangs in its next step
    report = await fleet.publish_lora(lora(model, 1), 1, config=CONFIG, deadline=2)
    assert list(report.failed) == ["embedded-0"]
    assert fleet.snapshot.get("embedded-0").phase is Phase.QUARANTINED
    made = await fleet.generate(greedy("after"), deadline=20)
    assert (made.output_ids, made.version_spans) == (expected(merged(model, lora(model, 1))), (VersionSpan(1, 0, 12),))
    stuck.cancel()
    await asyncio.gather(stuck, return_exceptions=True)


async def test_a_restarted_engine_gets_the_base_and_the_adapter_before_its_first_request(
    doomed_fleet: Fleet, model: PreTrainedModel, tmp_path: Path
) -> None:
    fleet = doomed_fleet
    seen: list[int] = []

    async def watch() -> None:
        nonlocal seen
        while True:
            state = fleet.snapshot.get("embedded-0")
            seen += [state.version] if state.routable and state.version is not None else []
            async with fleet.replicas.changed:
                await fleet.replicas.changed.wait()

    watching = asyncio.create_task(watch())
    await publish(fleet, lora(model, 1), 1)  # over the weights of the start
    await fleet.restart("embedded-0")
    await fleet.publish(tensors(model, 1.5), 2)
    await publish(fleet, lora(model, 2), 3)  # over the version in the store
    await fleet.restart("embedded-0")
    watching.cancel()
    scaled = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.5)
    for name in ("embedded-0", "embedded-1"):
        extra = {"lora_path": fleet.snapshot.get(name).lora}
        made = await fleet.engines[name].generate(replace(greedy("each"), extra=extra), deadline=20)
        assert made.output_ids == expected(merged(scaled, lora(model, 2)))
    assert seen == sorted(seen)  # the base alone never answered
    assert set(seen) == {0, 1, 2, 3}
    assert [path.name for path in (tmp_path / "versions").glob("adapter-*")] == ["adapter-00000003"]


async def test_sleep_without_the_weights_keeps_the_adapter_and_with_them_takes_it(
    fleet: Fleet, model: PreTrainedModel
) -> None:
    version = served(fleet) + 1
    await publish(fleet, lora(model, 1), version)
    await fleet.sleep(frozenset({MemoryTag.KV_CACHE}))
    await fleet.wake()
    assert {g.output_ids for g in await ask_both(fleet)} == {expected(merged(model, lora(model, 1)))}
    await fleet.sleep()
    with pytest.raises(PublishError, match="asleep; wake them"):
        await fleet.publish_lora(lora(model, 2), version + 1, config=CONFIG)
    await fleet.wake()
    with pytest.raises(PublishError, match="it does not hold the whole version"):
        await fleet.publish_lora(lora(model, 2), version + 1, config=CONFIG)
    await fleet.publish(tensors(model), version + 1)
    assert {g.output_ids for g in await ask_both(fleet)} == {expected(model)}


async def test_an_adapter_of_the_callers_own_is_left_as_it_is(
    fleet: Fleet, model: PreTrainedModel, tmp_path: Path
) -> None:
    version = served(fleet) + 1
    own = write_lora(tmp_path, "own", 1, dict(lora(model, 4)), CONFIG)
    for engine in fleet.engines.values():
        await engine.load_lora("own", str(own.path))
    await publish(fleet, lora(model, 1), version)
    made = await fleet.generate(replace(greedy("own"), extra={"lora_path": "own"}), deadline=20)
    assert made.output_ids == expected(merged(model, lora(model, 4)))
    assert made.version_spans == (VersionSpan(version - 1, 0, 12),)


async def test_an_engine_that_can_not_read_the_adapters_folder_is_refused(tmp_path: Path) -> None:
    """Nothing is written for these engines, and nothing is sent."""
    away = PublishTarget(
        EmbeddedEngine("away", "http://192.0.2.1:8000"),
        EngineInfo("embedded", "1", "model", 0, 10, 10, frozenset({Capability.LORA})),
    )

    async def apply(engine: str, event: Event) -> None:
        raise AssertionError(f"{engine} gets no adapter")

    with pytest.raises(PublishError, match="away can't read files of this host; set publish.folder"):
        async with PublishedLoras(None, apply).written([away], 1, {}, CONFIG):
            raise AssertionError("it must not be written")
    async with PublishedLoras(tmp_path, apply).written([away], 1, {}, CONFIG) as written:
        assert written.path.parent == tmp_path
    assert not written.path.exists()
    await away.engine.close()
