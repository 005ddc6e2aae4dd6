"""Measures what a step costs if the trainer does not wait for slow samples: the wall time of the same number of steps
on a load with a long tail.

    OMP_NUM_THREADS=1 python -m benchmarks.pace [--engines 2] [--steps 8] [--repeats 3]

Each step takes 8 groups of 4 samples. The lengths of the samples are drawn, and few of them are long. A wait stands for
the training step, since training would not use the engines' hardware. A publish follows it. These take turns:

- barrier: a step starts its groups, waits for all of them, trains, and publishes (on-policy);
- over-sampling: a step starts half as many groups more, takes the first complete, and gives up the rest (on-policy);
- recycled: a step starts twice as many groups, takes the first complete, and interrupts the rest, which continue in the
  next step with the tokens that they have (the engines generate nothing while the trainer trains);
- pace 1, 2, 4, 8: engines go on generating while the trainer trains, at most so many versions ahead (`max_staleness`).

The floor is the larger of two times: the engines' work alone (all samples of all steps at once, without a trainer), and
the training alone.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM

from benchmarks.routing import VOCAB, make_model
from millrace.config import EmbeddedEngineConfig
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.rollout.buffer import RolloutBuffer, StalenessPolicy
from millrace.rollout.sample import Episode, EpisodeEnd, Problem, Sample, SampleStatus
from millrace.rollout.scheduler import RolloutScheduler
from millrace.types import GenerateRequest, MemoryTag, RoutingContext, SamplingParams

GROUPS, SAMPLES = 8, 4
PROMPT = 64  # tokens
TRAINING = 2.0  # seconds
PROBLEMS = [Problem.of_question(str(i), str(i), str(i)) for i in range(1024)]
POLICIES = {
    "barrier": StalenessPolicy(GROUPS, SAMPLES),
    "over-sampling": StalenessPolicy(GROUPS, SAMPLES, extra=GROUPS // 2),
    "recycled": StalenessPolicy(GROUPS, SAMPLES, max_staleness=4, extra=GROUPS),
    **{f"pace {n}": StalenessPolicy(GROUPS, SAMPLES, max_staleness=n, ahead=n) for n in (1, 2, 4, 8)},
}


class Work:
    """What the engines do: `tokens` that they have generated, and how many requests they have at once."""

    def __init__(self) -> None:
        self.tokens, self._requests, self._area = 0, 0, 0.0
        self._began = self._changed = time.monotonic()

    def change(self, by: int) -> None:
        now = time.monotonic()
        self._area, self._changed = self._area + self._requests * (now - self._changed), now
        self._requests += by

    def at_once(self) -> float:
        """Returns the mean since the beginning."""
        self.change(0)
        return self._area / (self._changed - self._began)


@dataclass(frozen=True, slots=True)
class LongTail:
    """A runner whose samples have one turn of a drawn length."""

    fleet: Fleet
    work: Work

    async def run(self, sample_id: str, group_id: str, problem: Problem) -> Sample:
        draw = random.Random(sample_id)
        prompt = tuple(random.Random(group_id).randrange(VOCAB) for _ in range(PROMPT))
        length = min(1024, max(16, int(draw.lognormvariate(4.2, 0.9))))
        request = GenerateRequest(prompt, SamplingParams(length, ignore_eos=True), request_id=sample_id)
        routing = RoutingContext(sample_id, group_id)
        self.work.change(1)
        try:
            made = await self.fleet.generate(request, deadline=600.0, routing=routing, retries=1)
        finally:
            self.work.change(-1)
        self.work.tokens += len(made.output_ids)
        tokens = prompt + made.output_ids
        episode = Episode(
            tokens,
            np.arange(len(tokens)) >= PROMPT,
            np.concatenate([np.zeros(PROMPT, np.float32), made.logprobs]),
            made.version_spans,
            turns=1,
            end=EpisodeEnd.ANSWERED,
        )
        return Sample(sample_id, group_id, problem, SampleStatus.FINISHED, episode, float(draw.random() < 0.5))

    def finish_group(self, samples: Sequence[Sample]) -> None:
        """They are complete."""


@dataclass(frozen=True, slots=True)
class Result:
    """`tokens` counts the tokens that were trained on. `waited` is the seconds in which the trainer was idle. `made`
    counts the tokens that the engines generated, and `at_once` is how many requests they had at once."""

    seconds: float
    tokens: int
    waited: float
    staleness: float
    most_stale: int
    made: int
    at_once: float


class Publisher:
    """Publishes the model's own weights again, as the next version."""

    def __init__(self, fleet: Fleet, model: Path) -> None:
        self.fleet, self.version = fleet, 0
        loaded = AutoModelForCausalLM.from_pretrained(model)
        self.tensors = [(name, parameter.detach()) for name, parameter in loaded.named_parameters()]

    async def publish(self) -> None:
        self.version += 1
        await self.fleet.publish(self.tensors, self.version)


async def run(publisher: Publisher, policy: StalenessPolicy, steps: int) -> Result:
    tokens, waited, lags = 0, 0.0, list[int]()
    started, work = time.monotonic(), Work()
    async with RolloutScheduler(LongTail(publisher.fleet, work), SAMPLES) as scheduler:
        buffer = RolloutBuffer(scheduler, PROBLEMS, policy, seed=0, position=0, version=publisher.version, steps=steps)
        for _ in range(steps):
            asked = time.monotonic()
            taken = await buffer.take(publisher.version, lambda _: None)
            waited += time.monotonic() - asked
            buffer.give_up_old(publisher.version + 1)
            for sample in taken.samples:
                assert sample.episode is not None
                assert sample.oldest_version is not None
                tokens += int(sample.episode.loss_mask.sum())
                lags.append(publisher.version - sample.oldest_version)
            if interrupted := policy.max_staleness > policy.ahead:
                await publisher.fleet.sleep(frozenset({MemoryTag.KV_CACHE}), interrupt=True)
            await asyncio.sleep(TRAINING)  # stands for the training step
            await publisher.publish()
            if interrupted:
                await publisher.fleet.wake()
            if policy.ahead:
                buffer.top_up(publisher.version)
        seconds, at_once = time.monotonic() - started, work.at_once()
    return Result(seconds, tokens, waited, statistics.mean(lags), max(lags), work.tokens, at_once)


async def floor(publisher: Publisher, steps: int) -> float:
    started, work = time.monotonic(), Work()
    async with RolloutScheduler(LongTail(publisher.fleet, work), SAMPLES) as scheduler:
        scheduler.start(((str(i), problem) for i, problem in enumerate(PROBLEMS[: GROUPS * steps])), version=0)
        for _ in range(GROUPS * steps):
            await scheduler.next_group()
    seconds = time.monotonic() - started
    print(
        f"floor: {seconds:.1f} s, {work.tokens / seconds:.0f} tokens/s, {work.at_once():.0f} requests at once",
        flush=True,
    )
    return seconds


async def compare(engines: int, steps: int, repeats: int) -> None:
    results: dict[str, list[Result]] = {name: [] for name in POLICIES}
    floors = []
    with tempfile.TemporaryDirectory() as place:
        make_model(model := Path(place) / "model")
        config = EmbeddedEngineConfig(kind="embedded", replicas=engines, threads=1, context_length=PROMPT + 1024)
        async with open_fleet(config, model, log_dir=Path(place)) as fleet:
            publisher = Publisher(fleet, model)
            for _ in range(repeats):
                floors.append(await floor(publisher, steps))
                for name, policy in POLICIES.items():
                    results[name].append(await run(publisher, policy, steps))
                    print(f"{name}: {results[name][-1]}", flush=True)
    print(f"{steps} steps of {GROUPS} groups of {SAMPLES}, {engines} embedded engines, medians of {repeats}")
    print(f"floor: the engines' work alone {statistics.median(floors):.1f} s; training {steps * TRAINING:.1f} s")
    larger = max(statistics.median(floors), steps * TRAINING)
    barrier = statistics.median(result.seconds for result in results["barrier"])
    for name, rounds in results.items():
        seconds = statistics.median(one.seconds for one in rounds)
        rate = statistics.median(one.tokens / one.seconds for one in rounds)
        waited = statistics.median(one.waited for one in rounds)
        made = statistics.median(one.made / one.seconds for one in rounds)
        at_once = statistics.median(one.at_once for one in rounds)
        lag = statistics.mean(one.staleness for one in rounds)
        longest = max(one.most_stale for one in rounds)
        print(
            f"{name:<14} {seconds:6.1f} s ({seconds / larger:.2f} of the floor, the barrier is {barrier / seconds:.2f} "
            f"times as slow), the trainer waited {waited:5.1f} s, "
            f"{rate:6.0f} trained tokens/s, {made:6.0f} generated by {at_once:3.0f} requests at once, "
            f"staleness {lag:.2f}, at most {longest}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    asyncio.run(compare(given.engines, given.steps, given.repeats))


if __name__ == "__main__":
    main()
