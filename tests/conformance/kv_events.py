"""Routing by the KV cache events of a stock engine. It uses the server that other tests have started."""

import asyncio
from collections import Counter
from pathlib import Path

from transformers import AutoModelForCausalLM

from millrace.fleet.fleet import Fleet
from millrace.fleet.replica_state import Attested, ReplicaState, Snapshot, after
from millrace.fleet.routing import Choice, Why
from millrace.types import GenerateRequest, SamplingParams

DEADLINE = 60.0
PROMPT = tuple(7 + i % 90 for i in range(200))


def asking(name: str, prompt: tuple[int, ...] = PROMPT) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(4, temperature=0.0, ignore_eos=True), request_id=name)


async def check_routing_by_kv_events(fleet: Fleet, tiny_model: Path, version: int) -> None:
    """A prompt that another client has computed on the engine draws requests to it, as long as the engine caches it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    await fleet.publish([(name, parameter.detach()) for name, parameter in model.named_parameters()], version)
    [(name, engine)] = fleet.engines.items()
    # This engine serves the same version, has less to do, and reports an empty cache.
    other = after(ReplicaState("other", "http://other"), Attested(version))
    router, snapshot = fleet._router, Snapshot(0, (*fleet.snapshot.replicas, other))
    router.follow("other")

    def drawn() -> bool:
        choice = router.choose(snapshot, Counter({name: 10, "other": 0}), asking("asked"))
        return choice == Choice(name, Why.PREFIX)

    async def until(there: bool) -> None:
        async with asyncio.timeout(DEADLINE):
            while drawn() is not there:
                await asyncio.sleep(0.01)

    async def decided(by: Why) -> None:
        before = fleet.event_log.metrics.routed[by]
        await fleet.generate(asking("by the fleet"), deadline=DEADLINE)
        assert fleet.event_log.metrics.routed[by] == before + 1

    try:
        assert not drawn()
        made = await engine.generate(asking("from another client"), deadline=DEADLINE)
        assert made.cached_tokens == 0
        await until(True)
        await decided(Why.PREFIX)
        await engine.flush_cache(deadline=DEADLINE)
        # VLLM reports the flush only with the next request.
        await engine.generate(asking("the next", (5,) * 20), deadline=DEADLINE)
        await until(False)
        await decided(Why.LEAST_LOADED)
        await until(True)  # the fleet's own request is reported like any other
    finally:
        router.unfollow("other")
