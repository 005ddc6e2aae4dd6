"""Adapters on a stock engine, besides what the contract says of them: a trainer's publishes, on the server that the
checks were held against. One that is started for adapters does everything else as any other."""

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoModelForCausalLM

from millrace.config.models import EngineArgument
from millrace.engines.stock.engine import StockEngine
from millrace.fleet.fleet import Fleet
from millrace.types import Segment
from tests.adapters import CONFIG, adapter, merged
from tests.conformance.middle import LONG, across, begun, greedy
from tests.fleet.test_fleet import expected

# Of the command line that starts a server for adapters. SGLang also asks for the modules.
WITH_ADAPTERS: Mapping[str, EngineArgument] = {"enable_lora": True, "max_lora_rank": 8}
MODULES: EngineArgument = list(CONFIG.target_modules)


async def hold_publishes_over_whole_versions(fleet: Fleet, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    whole = [(name, parameter.detach() * 1.5) for name, parameter in model.named_parameters()]
    first, second = adapter(model, 1), adapter(model, 2)
    version = 1000
    await fleet.publish([(name, parameter.detach()) for name, parameter in model.named_parameters()], version)
    base = await begun(fleet, "base")
    report = await fleet.publish_adapter(first, version + 1, config=CONFIG)
    assert not report.failed
    running = await begun(fleet, "running", beside=base)
    await fleet.publish_adapter(second, version + 2, config=CONFIG)
    after = await fleet.generate(greedy("after"), deadline=120)
    assert (after.output_ids, after.segments) == (expected(merged(model, second)), (Segment(version + 2, 0, 12),))
    assert (await base).segments == (Segment(version, 0, LONG),)
    assert (await base).output_ids[:12] == expected(model)
    assert (await running).segments == (Segment(version + 1, 0, LONG),)
    assert (await running).output_ids[:12] == expected(merged(model, first))
    number, made = await across(
        fleet,
        version + 3,
        lambda number: fleet.publish_adapter(second, number, config=CONFIG),
        lambda number: fleet.publish(whole, number),
    )
    assert [segment.version for segment in made.segments] == [number, number + 1]
    scaled = AutoModelForCausalLM.from_pretrained(tiny_model)
    scaled.load_state_dict(dict(whole), strict=False)
    assert (await fleet.generate(greedy("whole"), deadline=120)).output_ids == expected(scaled)


async def hold_what_a_dead_trainer_left_is_taken_away(fleet: Fleet) -> None:
    [engine] = fleet.engines.values()
    assert isinstance(engine, StockEngine)
    model = AutoModelForCausalLM.from_pretrained((await engine.info()).model_path)
    await fleet.publish_adapter(adapter(model, 1), 2000, config=CONFIG)
    [member] = fleet.snapshot.members
    assert member.adapter is not None
    keys = engine._http._keys
    second = type(engine)("second", engine.url, api_key=keys["data"], admin_key=keys["control"])
    try:
        await second.settle()
        names = [model["id"] for model in (await second._ask("/v1/models"))["data"]]
        assert member.adapter not in names
    finally:
        await second.close()
