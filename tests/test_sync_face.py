"""The blocking face is what its generator makes of the async classes, and it works without an event loop."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from millrace import EmbeddedEngineConfig, GenerateRequest, SamplingParams, VersionSpan, sync
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.errors import PublishError
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
    request = GenerateRequest("sample-0", (5, 17, 42), SamplingParams(8, ignore_eos=True))
    config = EmbeddedEngineConfig(kind="embedded", threads=1)
    with sync.open_fleet(config, tiny_model, log_dir=tmp_path) as fleet:
        assert fleet.generate(request, deadline=20).version_spans == (VersionSpan(0, 0, 8),)
        assert not fleet.publish(tensors, 1).failed
        assert fleet.generate(request, deadline=20).version_spans == (VersionSpan(1, 0, 8),)
        with pytest.raises(PublishError, match="not newer"):
            fleet.publish(tensors, 1)
        [state] = fleet.snapshot.replicas
        assert state.routable
        with fleet.share() as shared, sync.follow_fleet(shared.url, shared.key) as follower:
            assert fleet.publish(tensors, label="step 2").version == 2
            follower.reached(2, deadline=20)
            assert follower.generate(request, deadline=20).version_spans == (VersionSpan(2, 0, 8),)
            assert (follower.version, follower.labels, follower.asleep) == (2, {2: "step 2"}, False)
            with pytest.raises(PublishError, match="this process follows the fleet"):
                follower.publish(tensors)


def test_an_engine_that_somebody_else_started(tiny_model: Path, tmp_path: Path) -> None:
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
                engine.stream(GenerateRequest("s", (1, 2, 3), SamplingParams(12, ignore_eos=True)), deadline=20)
            )
            assert len(chunks[-1].output_ids) == 12
            engine.close()
