"""Measures admission by headroom against fixed limits of running requests, on a load whose lengths have a long tail.

    OMP_NUM_THREADS=1 python -m benchmarks.headroom --engine sglang [--samples 192] [--repeats 3]

All samples are asked for at once, with the same limit on output tokens. A sample ends at a drawn length, which only
the benchmark knows: until then its end token can't be sampled, and after that nothing else. The engine's KV cache is
too small for all samples. Fixed limits (of requests that are sent to the engine and have not come back) and headroom
take turns. Each turn of headroom begins without knowing any length.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from millrace.config import EmbeddedEngineConfig
from millrace.config.engines import EngineArgument, SGLangEngineConfig, VLLMEngineConfig
from millrace.config.sources import TinyModelConfig
from millrace.engines.base import Engine
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.engines.vllm.metrics import read_metrics
from millrace.fleet.follower import follow_fleet
from millrace.fleet.local import open_fleet
from millrace.train.tiny import make_tiny_model
from millrace.types import GenerateRequest, Generation, RoutingContext, SamplingParams

LIMITS = (12, 40, 192)
SAMPLES = 4  # of a prompt
PROMPT = 64  # tokens
MOST = 512  # output tokens
MODEL = TinyModelConfig(kind="tiny", hidden_size=64, heads=2, context_length=2048)
END, VOCAB = 5, 200
CACHE = 8192  # tokens; the embedded engine has a slot of the whole context for each of 64 requests instead
# Of SGLang's own admission, 1.0 by default. With that, it reserves so much of a cache of this size that it keeps most
# samples in its own queue, whatever the limit is.
CONSERVATIVE = 0.3
DEADLINE = 900.0


@dataclass(frozen=True, slots=True)
class Result:
    """waited: the mean of the seconds before a sample was sent to the engine."""

    seconds: float
    tokens: int
    retractions: int
    waited: float


def samples(seed: int, count: int) -> list[tuple[GenerateRequest, RoutingContext]]:
    draw = random.Random(seed)
    made = []
    for number in range(count):
        group = random.Random(f"{seed}/{number // SAMPLES}")
        prompt = tuple(group.randrange(10, VOCAB) for _ in range(PROMPT))
        length = min(MOST - 1, max(16, int(draw.lognormvariate(4.8, 0.8))))
        sampling = SamplingParams(MOST, min_new_tokens=length, logit_bias={END: 100.0}, stop_token_ids=(END,))
        request = GenerateRequest(prompt, sampling, request_id=f"{seed}-{number}")
        made.append((request, RoutingContext(request.request_id, f"{seed}-{number // SAMPLES}")))
    return made


async def preempted(engine: Engine) -> int:
    """Return how often vLLM has preempted a request so far. Other engines count that in their answers."""
    if not isinstance(engine, VLLMEngine):
        return 0
    return int(read_metrics(await engine._ask("/metrics"))["num_preemptions_total"])


def retractions(made: list[Generation]) -> int:
    counts = [one.extra.get("num_retractions", 0) for one in made]
    return sum(count for count in counts if isinstance(count, int))


async def fixed(engine: Engine, limit: int, seed: int, count: int) -> Result:
    free, before, started, waits = asyncio.Semaphore(limit), await preempted(engine), time.monotonic(), list[float]()

    async def ask(request: GenerateRequest) -> Generation:
        async with free:
            waits.append(time.monotonic() - started)
            return await engine.generate(request, deadline=DEADLINE)

    made = await asyncio.gather(*(ask(request) for request, _ in samples(seed, count)))
    seconds, retracted = time.monotonic() - started, retractions(made) + await preempted(engine) - before
    return Result(seconds, sum(len(one.output_ids) for one in made), retracted, statistics.mean(waits))


async def headroom(engine: Engine, url: str, key: str, seed: int, count: int) -> Result:
    async with follow_fleet(url, key, seed=0) as fleet:
        before, started = await preempted(engine), time.monotonic()
        asked = samples(seed, count)
        made = await asyncio.gather(*(fleet.generate(one, deadline=DEADLINE, routing=where) for one, where in asked))
        seconds, retracted = time.monotonic() - started, retractions(made) + await preempted(engine) - before
        waits = fleet.event_log.metrics.waits
        return Result(seconds, sum(len(one.output_ids) for one in made), retracted, waits.seconds / waits.count)


def engine_config(kind: str) -> EmbeddedEngineConfig | SGLangEngineConfig | VLLMEngineConfig:
    match kind:
        case "sglang":
            arguments: dict[str, EngineArgument] = {"schedule_conservativeness": CONSERVATIVE}
            return SGLangEngineConfig(
                kind="sglang",
                device="cpu",
                threads=1,
                max_running_requests=max(LIMITS),
                max_total_tokens=CACHE,
                engine_args=arguments,
            )
        case "vllm":
            size = CACHE * 2 * MODEL.layers * MODEL.hidden_size * 4  # bytes
            return VLLMEngineConfig(
                kind="vllm",
                device="cpu",
                threads=1,
                max_running_requests=max(LIMITS),
                kv_cache_memory_bytes=size,
                engine_args={"block_size": 32},
            )
    return EmbeddedEngineConfig(kind="embedded", threads=1, context_length=PROMPT + MOST)


async def compare(kind: str, count: int, repeats: int) -> None:
    results: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as place:
        make_tiny_model(MODEL, 0, model := Path(place) / "model")
        async with open_fleet(engine_config(kind), model, log_dir=Path(place)) as fleet, fleet.share() as shared:
            [engine] = fleet.engines.values()
            await fixed(engine, 32, -1, 32)  # warms the engine up
            for seed in range(repeats):
                for limit in LIMITS:
                    results.setdefault(str(limit), []).append(await fixed(engine, limit, seed, count))
                results.setdefault("headroom", []).append(await headroom(engine, shared.url, shared.key, seed, count))
    ours = statistics.median(one.seconds for one in results["headroom"])
    print(f"{kind}, {count} samples, medians of {repeats}")
    for name, rounds in results.items():
        seconds = statistics.median(one.seconds for one in rounds)
        rate = statistics.median(one.tokens / one.seconds for one in rounds)
        waited = statistics.median(one.waited for one in rounds)
        retracted = [one.retractions for one in rounds]
        print(
            f"{name:<9} {seconds:6.1f} s ({seconds / ours:.2f} of headroom), {rate:6.0f} tokens/s, "
            f"retractions {retracted}, a sample waited {waited:5.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("embedded", "sglang", "vllm"), default="embedded")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    asyncio.run(compare(given.engine, given.samples, given.repeats))


if __name__ == "__main__":
    main()
