"""Measures routing: the microseconds of a decision, and its gain on a multi-turn load with a long tail.

    OMP_NUM_THREADS=1 python -m benchmarks.routing [--engines 4] [--sessions 96] [--repeats 3] [--router cache_aware]

The load has sessions in groups of four with one prompt. Each session has one to eight turns, and the prompt of each
turn has everything before it. The lengths and numbers of turns are drawn, and few of them are long. Every policy gets
the same load with cold caches. The policies take turns, and the median round counts. Round-robin and least-loaded know
no affinity. --router adds the real sglang-router in front of the same engines, with its own policy of that name
(`millrace engines install sglang-router`).
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from transformers import Qwen3Config, Qwen3ForCausalLM

from millrace.config import EmbeddedEngineConfig
from millrace.config.routers import SGLangRouterConfig
from millrace.engines.stock.kv_events import Stored
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.fleet.replica_state import Attested, ReplicaState, Snapshot, after
from millrace.fleet.routing import RoutingPolicy, Why
from millrace.types import ANYWHERE, GenerateRequest, RoutingContext, SamplingParams

VOCAB = 300
PROMPT, ANSWER = 256, 48  # tokens of the first prompt, and of the text between two turns
DEADLINE = 600.0

Choose = Callable[[Snapshot, Mapping[str, int], GenerateRequest, RoutingContext], str]


@dataclass(frozen=True, slots=True)
class Session:
    name: str
    group: str
    prompt: tuple[int, ...]
    turns: tuple[int, ...]  # tokens that each turn makes


@dataclass(frozen=True, slots=True)
class Result:
    seconds: float
    cached: float  # cached tokens of the prompts


def snapshot_of(names: list[str]) -> Snapshot:
    return Snapshot(0, tuple(after(ReplicaState(name, f"http://{name}"), Attested(1)) for name in names))


def decisions(engines: int = 64, sessions: int = 10_000, count: int = 50_000) -> None:
    """Prints the microseconds of each kind of decision."""
    draw = random.Random(0)
    snapshot = snapshot_of([f"engine-{i}" for i in range(engines)])
    outstanding = Counter({name: draw.randrange(50_000, 60_000) for name in snapshot.routable})
    router, told = RoutingPolicy(), RoutingPolicy()
    sampling = SamplingParams(max_new_tokens=512)
    prompts = [tuple(draw.randrange(VOCAB) for _ in range(1024)) for _ in range(256)]
    placed = [RoutingContext(f"s{i}", f"g{i // 8}") for i in range(sessions)]
    for i, routing in enumerate(placed):
        router.choose(snapshot, outstanding, GenerateRequest(prompts[i // 8 % 256], sampling, request_id="r"), routing)

    spans = []
    for engine in snapshot.routable:
        told.follow(engine)
    for i, prompt in enumerate(prompts):  # each prompt is in the caches of four engines, in blocks of 16 tokens
        blocks = tuple((hash(prompt[: end + 16]), prompt[end : end + 16]) for end in range(0, 1024, 16))
        for number in range(i, i + 4):
            started = time.perf_counter_ns()
            told.learn(f"engine-{number % engines}", Stored(None, blocks))
            spans.append((time.perf_counter_ns() - started) / 1000 / len(blocks))
    print(f"an event, for each block of 16 tokens that it says is stored: median {statistics.median(spans):.2f} us")

    def of(kind: str, routing: Callable[[int], RoutingContext], router: RoutingPolicy = router) -> None:
        work = [
            (GenerateRequest(prompts[draw.randrange(256)], sampling, request_id="r"), routing(draw.randrange(sessions)))
            for _ in range(count)
        ]
        decided: Counter[Why] = Counter()
        spans = []
        for request, where in work:
            started = time.perf_counter_ns()
            choice = router.choose(snapshot, outstanding, request, where)
            spans.append((time.perf_counter_ns() - started) / 1000)
            assert choice is not None
            decided[choice.why] += 1
        most = max(decided, key=lambda why: decided[why])
        spans.sort()
        print(
            f"{kind:<42} median {statistics.median(spans):6.2f} us, 99 % below {spans[len(spans) * 99 // 100]:6.2f} us "
            f"({decided[most] / count:.0%} by {most})"
        )

    print(f"one decision, {engines} engines, {sessions} live sessions, prompts of 1,024 tokens")
    of("a session's next turn", lambda i: placed[i])
    of("a new session of a known group", lambda i: RoutingContext(f"new-{i}", placed[i].group))
    of("a prompt alone, known", lambda _: ANYWHERE)
    of("a prompt alone, known by events", lambda _: ANYWHERE, told)


def make_model(folder: Path) -> None:
    """Makes a model that is large enough for its prompt computation to matter: 8 layers, 256 wide."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def load(seed: int, sessions: int) -> list[Session]:
    draw = random.Random(seed)
    prompts = [tuple(draw.randrange(VOCAB) for _ in range(PROMPT)) for _ in range(sessions // 4)]

    def turns() -> tuple[int, ...]:
        count = min(8, 1 + int(draw.expovariate(0.5)))
        return tuple(min(256, max(8, int(draw.lognormvariate(3.2, 0.9)))) for _ in range(count))

    return [Session(f"s{i}", f"g{i // 4}", prompts[i // 4], turns()) for i in range(sessions)]


def policies(seed: int) -> dict[str, Choose]:
    router, turn = RoutingPolicy(seed), iter(range(10**9))

    def round_robin(snapshot: Snapshot, *_: object) -> str:
        return list(snapshot.routable)[next(turn) % len(snapshot.routable)]

    def least_loaded(snapshot: Snapshot, outstanding: Mapping[str, int], *_: object) -> str:
        return min(snapshot.routable, key=lambda name: outstanding[name])

    def ours(
        snapshot: Snapshot, outstanding: Mapping[str, int], request: GenerateRequest, routing: RoutingContext
    ) -> str:
        choice = router.choose(snapshot, outstanding, request, routing)
        assert choice is not None
        return choice.engine

    return {"round-robin": round_robin, "least-loaded": least_loaded, "millrace": ours}


async def play(fleet: Fleet, sessions: list[Session], choose: Choose | None) -> Result:
    """Plays the load once. With None as the policy, the fleet itself routes, by its external router."""
    engines = fleet.engines
    await asyncio.gather(*(engine.flush_cache() for engine in engines.values()))
    snapshot, outstanding = snapshot_of(list(engines)), Counter(dict.fromkeys(engines, 0))
    asked = cached = 0

    async def one(session: Session) -> None:
        nonlocal asked, cached
        tokens = session.prompt
        for turn, length in enumerate(session.turns):
            sampling = SamplingParams(max_new_tokens=length, ignore_eos=True)
            request = GenerateRequest(tokens, sampling, request_id=f"{session.name}/{turn}")
            routing = RoutingContext(session.name, session.group)
            if choose is None:
                made = await fleet.generate(request, deadline=DEADLINE, routing=routing)
            else:
                name = choose(snapshot, outstanding, request, routing)
                need = len(tokens) + length
                outstanding[name] += need
                made = await engines[name].generate(request, deadline=DEADLINE)
                outstanding[name] -= need
            asked, cached = asked + made.prompt_tokens, cached + made.cached_tokens
            tokens += made.output_ids + tuple(range(ANSWER))

    started = time.monotonic()
    await asyncio.gather(*map(one, sessions))
    return Result(time.monotonic() - started, cached / asked)


async def compare(engines: int, sessions: int, repeats: int, policy: str | None) -> None:
    router = TypeAdapter(SGLangRouterConfig).validate_python({"kind": "sglang", "policy": policy}) if policy else None
    with tempfile.TemporaryDirectory() as place:
        make_model(Path(place) / "model")
        config = EmbeddedEngineConfig(kind="embedded", replicas=engines, threads=1)
        async with open_fleet(config, Path(place) / "model", log_dir=Path(place), router=router) as fleet:
            results: dict[str, list[Result]] = {}
            for repeat in range(-1, repeats):
                ways: dict[str, Choose | None] = {**policies(repeat)}
                if router is not None:
                    ways[f"sglang-router, {policy}"] = None
                for name, choose in ways.items():
                    result = await play(fleet, load(max(repeat, 0), sessions), choose)
                    if repeat >= 0:  # the first round warms up
                        results.setdefault(name, []).append(result)
    print(f"\n{sessions} sessions on {engines} embedded engines of one thread each, medians of {repeats}")
    floor = statistics.median(result.seconds for result in results["millrace"])
    for name, rounds in results.items():
        seconds = statistics.median(result.seconds for result in rounds)
        cached = statistics.median(result.cached for result in rounds)
        print(
            f"{name:<27} {seconds:6.2f} s ({seconds / floor:.2f} of ours), {cached:.1%} of the prompts' tokens cached"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--sessions", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--router", metavar="POLICY")
    given = parser.parse_args()
    decisions()
    asyncio.run(compare(given.engines, given.sessions, given.repeats, given.router))


if __name__ == "__main__":
    main()
