"""A router in front of a stock engine. It uses the server that other tests have started."""

import asyncio
from functools import partial
from pathlib import Path

from transformers import AutoModelForCausalLM

from millrace.config.routers import SGLangRouterConfig, VLLMRouterConfig
from millrace.engines.stock.engine import StockEngine
from millrace.fleet.event_log import Outcome
from millrace.fleet.external_router import ExternalRouter
from millrace.fleet.fleet import Fleet
from millrace.routers.start import start_router
from millrace.types import FinishReason, RoutingContext
from tests.conformance.in_flight import LONG, generate_across_update, greedy, start_in_flight
from tests.fleet.test_fleet import expected


async def check_router(
    fleet: Fleet, tiny_model: Path, config: SGLangRouterConfig | VLLMRouterConfig, log_dir: Path, version: int
) -> None:
    """Through the router, outputs equal the engine's own, a publish interrupts no request, and a cancelled request is
    aborted."""
    [engine] = fleet.engines.values()
    assert isinstance(engine, StockEngine)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    await fleet.publish(tensors, version)
    start = partial(start_router, config, log_dir=log_dir, engine_key=engine.api_key if config.kind == "vllm" else None)
    by_router = (f"{config.kind}-router", Outcome.FINISHED)
    async with ExternalRouter.open(
        fleet.replicas, fleet.event_log, start, fallback=False, restarts=0
    ) as fleet.external_router:
        try:
            for number in range(2):
                made = await fleet.generate(greedy(f"by{number}"), deadline=60, routing=RoutingContext(session="one"))
                assert made.output_ids == expected(model)
                assert [span.version for span in made.version_spans] == [version]
            assert fleet.event_log.metrics.requests[by_router] == 2
            number, made = await generate_across_update(
                fleet,
                version + 1,
                lambda number: fleet.publish(tensors, number),
                lambda number: fleet.publish(tensors, number),
            )
            assert made.finish_reason is FinishReason.LENGTH
            assert made.request_id.startswith("across")
            assert (len(made.output_ids), len(made.logprobs)) == (LONG, LONG)
            assert [span.version for span in made.version_spans] == [number, number + 1]
            given_up = await start_in_flight(fleet, "given-up")
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
            await engine.flush_cache(deadline=1.0)  # refused while anything runs
            assert not (await engine.loads()).running_requests
        finally:
            fleet.external_router = None
