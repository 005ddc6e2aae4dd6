"""A trainer publishes adapters to a stock engine. This is beyond the conformance checks and uses the same server. A
server that was started for adapters must also pass all other checks."""

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoModelForCausalLM

from millrace.config.engines import EngineArgument
from millrace.engines.stock.engine import StockEngine
from millrace.fleet.fleet import Fleet
from millrace.types import VersionSpan
from tests.conformance.in_flight import LONG, generate_across_update, greedy, start_in_flight
from tests.fleet.test_fleet import expected
from tests.lora import CONFIG, lora, merged

# Arguments that start a server for adapters. SGLang also asks for the modules.
WITH_LORA: Mapping[str, EngineArgument] = {"enable_lora": True, "max_lora_rank": 8}
MODULES: EngineArgument = list(CONFIG.target_modules)


async def check_lora_publishes(fleet: Fleet, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    whole = [(name, parameter.detach() * 1.5) for name, parameter in model.named_parameters()]
    first, second = lora(model, 1), lora(model, 2)
    version = 1000
    await fleet.publish([(name, parameter.detach()) for name, parameter in model.named_parameters()], version)
    base = await start_in_flight(fleet, "base")
    report = await fleet.publish_lora(first, version + 1, config=CONFIG)
    assert not report.failed
    running = await start_in_flight(fleet, "running", other=base)
    await fleet.publish_lora(second, version + 2, config=CONFIG)
    after = await fleet.generate(greedy("after"), deadline=120)
    assert (after.output_ids, after.version_spans) == (
        expected(merged(model, second)),
        (VersionSpan(version + 2, 0, 12),),
    )
    assert (await base).version_spans == (VersionSpan(version, 0, LONG),)
    assert (await base).output_ids[:12] == expected(model)
    assert (await running).version_spans == (VersionSpan(version + 1, 0, LONG),)
    assert (await running).output_ids[:12] == expected(merged(model, first))
    number, made = await generate_across_update(
        fleet,
        version + 3,
        lambda number: fleet.publish_lora(second, number, config=CONFIG),
        lambda number: fleet.publish(whole, number),
    )
    assert [span.version for span in made.version_spans] == [number, number + 1]
    scaled = AutoModelForCausalLM.from_pretrained(tiny_model)
    scaled.load_state_dict(dict(whole), strict=False)
    assert (await fleet.generate(greedy("whole"), deadline=120)).output_ids == expected(scaled)


async def check_stale_adapters_are_unloaded(fleet: Fleet) -> None:
    [engine] = fleet.engines.values()
    assert isinstance(engine, StockEngine)
    model = AutoModelForCausalLM.from_pretrained((await engine.info()).model_path)
    await fleet.publish_lora(lora(model, 1), 2000, config=CONFIG)
    [state] = fleet.snapshot.replicas
    assert state.lora is not None
    keys = engine._http._keys
    second = type(engine)("second", engine.url, api_key=keys["data"], admin_key=keys["control"])
    try:
        await second.initialize()
        names = [model["id"] for model in (await second._ask("/v1/models"))["data"]]
        assert state.lora not in names
    finally:
        await second.close()
