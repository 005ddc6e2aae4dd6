"""The blocking API is what its generator makes of the async classes, and it works without an event loop."""

import asyncio
import itertools
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from millrace import EmbeddedEngineConfig, Fleet, GenerateRequest, Generation, SamplingParams, VersionSpan, sync
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import ArgumentError, NoEngineError, PublishError
from millrace.http.portal import Portal
from millrace.types import Capability, EngineInfo, Health

ROOT = Path(__file__).resolve().parent.parent


def test_the_generated_file_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools/generate_sync.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_a_trainer_without_an_event_loop(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    request = GenerateRequest((5, 17, 42), SamplingParams(8, ignore_eos=True), request_id="sample-0")
    config = EmbeddedEngineConfig(kind="embedded", threads=1)
    with sync.open_fleet(config, tiny_model, log_dir=tmp_path) as fleet:
        assert fleet.generate(request, deadline=20).version_spans == (VersionSpan(0, 0, 8),)
        assert not fleet.publish(tensors, 1).failed
        assert fleet.generate(request, deadline=20).version_spans == (VersionSpan(1, 0, 8),)
        with pytest.raises(PublishError, match="not newer"):
            fleet.publish(tensors, 1)
        [state] = fleet.snapshot.replicas
        assert state.routable
        assert repr(fleet) == "<Fleet of 1 engine: 1 ready>"
        [replica] = fleet._wrapped.replicas.by_name.values()
        assert repr(fleet._wrapped.replicas) == "<OwnedReplicaSet of 1 engine: 1 ready>"
        assert repr(replica) == f"<Replica embedded-0 at {state.url}>"
        assert repr(replica.engine) == f"<EmbeddedEngine embedded-0 at {state.url}>"
        with fleet.share() as shared, sync.follow_fleet(shared.url, shared.key) as follower:
            assert fleet.publish(tensors, label="step 2").version == 2
            follower.reached(2, deadline=20)
            assert follower.generate(request, deadline=20).version_spans == (VersionSpan(2, 0, 8),)
            assert (follower.version, follower.labels, follower.asleep) == (2, {2: "step 2"}, False)
            with pytest.raises(PublishError, match="this process follows the fleet"):
                follower.publish(tensors)


def test_the_module_exports_only_its_own() -> None:
    assert sync.__all__ == ["Engine", "Fleet", "Follower", "follow_fleet", "open_fleet"]


def test_an_async_function_runs_in_the_fleets_loop(tiny_model: Path, tmp_path: Path) -> None:
    async def many(fleet: Fleet) -> list[Generation]:
        requests = [GenerateRequest((5, 17, 42), SamplingParams(8, ignore_eos=True)) for _ in range(3)]
        return list(await asyncio.gather(*(fleet.generate(request, deadline=20) for request in requests)))

    async def forever(_: Fleet) -> None:
        started.set()
        await asyncio.Event().wait()

    started = threading.Event()
    config = EmbeddedEngineConfig(kind="embedded", threads=1)
    with ThreadPoolExecutor(1) as thread:
        with sync.open_fleet(config, tiny_model, log_dir=tmp_path) as fleet:
            assert [len(generation.output_ids) for generation in fleet.run(many)] == [8, 8, 8]
            running = thread.submit(fleet.run, forever)
            assert started.wait(20)
        with pytest.raises(CancelledError):  # by the end of the fleet's block
            running.result(20)
    with pytest.raises(NoEngineError, match="the fleet is closed"):
        fleet.run(many)


def test_attaching_to_a_running_engine(tiny_model: Path, tmp_path: Path) -> None:
    with sync.open_fleet(EmbeddedEngineConfig(kind="embedded", threads=1), tiny_model, log_dir=tmp_path) as fleet:
        [replica] = fleet._wrapped.replicas.by_name.values()
        assert isinstance(replica.engine, EmbeddedEngine)
        keys = replica.engine._http._keys
        with Portal() as portal:
            attached = EmbeddedEngine("attached", replica.engine.url, api_key=keys["data"], admin_key=keys["control"])
            engine = sync.Engine(portal, attached)
            assert engine.health() is Health.READY
            info: EngineInfo = engine.info()
            assert Capability.STAGED_UPDATE in info.capabilities
            chunks = list(
                engine.stream(
                    GenerateRequest((1, 2, 3), SamplingParams(12, ignore_eos=True), request_id="s"), deadline=20
                )
            )
            assert len(chunks[-1].output_ids) == 12
            engine.close()


def test_many_requests_from_many_threads(tiny_model: Path, tmp_path: Path) -> None:
    sampling = SamplingParams(8, temperature=0.0, ignore_eos=True)

    def ask(fleet: sync.Fleet, prompt: int) -> set[tuple[int, ...]]:
        requests = (GenerateRequest((prompt, token), sampling) for token in range(5, 10))
        completions = list(fleet.generate_many(requests, n=2, deadline=20))
        assert sorted((one.index, one.sample) for one in completions) == [(i, s) for i in range(5) for s in range(2)]
        return {one.result().output_ids for one in completions}

    with sync.open_fleet({"kind": "embedded", "threads": 1}, tiny_model, log_dir=tmp_path) as fleet:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(partial(ask, fleet), (3, 4, 3, 4)))
        assert (found[0], found[1]) == (found[2], found[3])

        items = list(fleet.stream(GenerateRequest((3, 5), sampling), deadline=20))
        assert items[-1].output_ids in found[0]
        [again] = fleet.generate_all([GenerateRequest((3, 5), sampling)], deadline=20, retries=1)
        assert again.output_ids == items[-1].output_ids

        for completion in fleet.generate_many(itertools.repeat(GenerateRequest((3,), sampling)), n=2, deadline=20):
            assert completion.error is None or "in flight" in str(completion.error)
            break  # closes the generator, which aborts the others
        blocking: Any = (fleet.generate(GenerateRequest((3,), sampling), deadline=1) for _ in range(2))
        with pytest.raises(ArgumentError, match="blocking call"):
            list(fleet.generate_many(blocking, deadline=20))
    with pytest.raises(NoEngineError, match="closed"):
        next(iter(fleet.generate_many([], deadline=20)))
