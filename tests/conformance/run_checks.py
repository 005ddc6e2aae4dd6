"""Runs the conformance checks on one engine. Each engine has its own test file, so that pytest-xdist runs them in
parallel."""

from pathlib import Path
from typing import Any

import pytest

from millrace.buckets import DiskBucket
from millrace.config.engines import SGLangEngineConfig, VLLMEngineConfig
from millrace.conformance import CHECKS, Check, Outcome, Runner, Subject
from millrace.conformance.attach import find_kind
from millrace.engines.spec import LaunchSpec
from millrace.engines.start import ADMIN_KEY, API_KEY, start
from millrace.engines.stock.engine import StockEngine
from millrace.errors import ConfigError, EngineRefused
from millrace.fleet.fleet import Fleet
from millrace.types import Capability, GenerateRequest, SamplingParams

START_TIMEOUT = 240.0  # seconds; a stock engine takes 20 on a quiet machine
# These checks need a server that was started with LoRA enabled.
WITHOUT_LORA = frozenset(check.name for check in CHECKS if Capability.LORA in check.needs)
# This check needs a server that keeps KV cache in host memory.
WITHOUT_OFFLOAD = frozenset(check.name for check in CHECKS if Capability.KV_OFFLOAD in check.needs)
# These checks need a server of a vision-language model.
WITHOUT_IMAGES = frozenset(check.name for check in CHECKS if Capability.IMAGES in check.needs)
# These checks need a server of a mixture of experts that returns the routed experts.
VLLM_UPDATES = frozenset({  # the checks of updates that vLLM on the CPU can't run
    "update.bare_nccl",  # on the CPU
    "update.checksums",
    "update.cuda_ipc",  # on the CPU
    "update.process_group",  # it takes whole buckets
    "update.rollback",
    "update.torch_storage",
})  # fmt: skip
WITHOUT_EXPERTS = frozenset(check.name for check in CHECKS if Capability.ROUTED_EXPERTS in check.needs)
every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)


async def make_runner(fleet: Fleet, model: Path, other: Path) -> Runner:
    """Returns a runner for the fleet's only engine. Nothing else may use the engine while a check runs."""
    [engine] = fleet.engines.values()
    return Runner(Subject(engine, await engine.info(), model, other))


async def check_kind_is_found(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    [engine] = fleet.engines.values()
    assert isinstance(engine, StockEngine)
    monkeypatch.setenv(API_KEY, str(engine.api_key))
    assert await find_kind(engine.url) == (await engine.info()).kind


async def check_dtype_is_read(fleet: Fleet, config: SGLangEngineConfig | VLLMEngineConfig, model: Path) -> None:
    """Millrace reads the dtype of a server that it did not start. It refuses a config with another dtype."""
    [engine] = fleet.engines.values()
    assert (
        await engine.info()
    ).dtype == "float32"  # the model folder's dtype; the engine's own `auto` would pick another
    assert isinstance(engine, StockEngine)
    keys = engine._http._keys
    with pytest.MonkeyPatch.context() as patch:
        for variable, key in ((API_KEY, keys["data"]), (ADMIN_KEY, keys["control"])):
            patch.setenv(variable, str(key))
        there = config.model_copy(update={"urls": (engine.url,), "python": None, "kv_events": False})
        started = await start(there, LaunchSpec(model_path=model, log_dir=model))
        assert started.info.dtype == "float32"
        await started.end()
        with pytest.raises(ConfigError, match=r"engine\.dtype is float16, and the server at .* computes in float32"):
            other = there.model_copy(update={"dtype": "float16"})
            await start(other, LaunchSpec(model_path=model, log_dir=model))


async def check_update_after_a_trainer_died(runner: Runner) -> None:
    """A new client can update a server whose last client died in the middle of an update."""
    subject = runner.subject
    first = subject.engine
    assert isinstance(first, StockEngine)
    assert subject.folder is not None
    assert subject.other is not None
    await first.begin_update(100)
    await first.load(DiskBucket(str(subject.other)), deadline=60)
    keys = first._http._keys
    second = type(first)("second", first.url, api_key=keys["data"], admin_key=keys["control"])
    try:
        await second.initialize()
        await second.begin_update(101)
        await second.load(DiskBucket(str(subject.folder)), deadline=60)
        await second.commit()
        assert (await second.info()).weight_version == 101
        request = GenerateRequest((5, 6, 7), SamplingParams(4, temperature=0.0, ignore_eos=True), request_id="after")
        assert len((await second.generate(request, deadline=60)).output_ids) == 4
        await check_another_owner_is_noticed(second, subject.folder, subject.other)
    finally:
        await second.close()


async def check_another_owner_is_noticed(engine: StockEngine[Any], folder: Path, other: Path) -> None:
    """Of two owners that publish at once, one succeeds. The other one fails, and says why. `engine`: attached."""
    keys = engine._http._keys
    third = type(engine)("third", engine.url, api_key=keys["data"], admin_key=keys["control"])
    try:
        await third.initialize()
        await engine.begin_update(102)
        await engine.load(DiskBucket(str(other)), deadline=60)
        await third.begin_update(103)
        await third.load(DiskBucket(str(folder)), deadline=60)
        await third.commit()
        says = "another process publishes to it too: it reports weight version 103, and this process left it at 101"
        with pytest.raises(EngineRefused, match=says):
            await engine.commit()
        with pytest.raises(EngineRefused, match="its old weights are overwritten"):
            await engine.rollback()
        with pytest.raises(EngineRefused, match=says):
            await engine.begin_update(104)
        request = GenerateRequest((5, 6, 7), SamplingParams(4, temperature=0.0, ignore_eos=True))
        made = await third.generate(request, deadline=60)
        assert [span.version for span in made.version_spans] == [103]
    finally:
        await third.close()


async def run_check(runner: Runner, check: Check, lacking: frozenset[str]) -> None:
    """Runs one check. `lacking` names the checks that this engine can't run. Every other check must run and pass, since
    a check that does not run proves nothing."""
    result = await runner.examine(check)
    expected = Outcome.LACKING if check.name in lacking else Outcome.PASSED
    assert result.outcome is expected, result.reason
