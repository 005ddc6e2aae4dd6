"""Many requests at once: the samples of a request, and jobs that run side by side, a limited number at a time."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from millrace import arguments
from millrace.errors import MillraceError
from millrace.types import EngineInfo, GenerateRequest, Generation, RoutingContext

ASSUMED_RUNNING = 256  # requests that an engine runs at once if it does not say

J = TypeVar("J")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Completion:
    """One result of `FleetClient.generate_many`: either `generation` or `error` is set.

    index: the position of the request among the requests. sample: the number of the sample of this request, from 0.
    request: the request as it was sent, with the sample's own id and seed. generation: the result. error: why the
    request failed.
    """

    index: int
    sample: int
    request: GenerateRequest
    generation: Generation | None = None
    error: MillraceError | None = None

    def result(self) -> Generation:
        """Return the generation. Raises the request's error if it failed."""
        if self.error is not None:
            raise self.error
        assert self.generation is not None
        return self.generation


def samples_of(request: GenerateRequest, n: int) -> Iterator[GenerateRequest]:
    """Yield the requests for n samples. They differ in their ids and, if the request has a seed, in their seeds.

    The first sample keeps the request's seed. A single sample is the request itself.
    """
    if n == 1:
        yield request
        return
    for sample in range(n):
        sampling = replace(request.sampling, seed=seed_of(request.sampling.seed, sample))
        yield replace(request, request_id=f"{request.request_id}-{sample}", sampling=sampling)


def seed_of(seed: int | None, sample: int) -> int | None:
    """Return the seed of a sample of a request with this seed, from 0 to 2**63 - 1.

    It is a hash, because a request that is continued after k tokens uses the seed plus k.
    """
    if seed is None or sample == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def routed_samples(
    requests: Iterable[GenerateRequest],
    n: int,
    routing: RoutingContext | Callable[[GenerateRequest], RoutingContext],
) -> Iterator[tuple[Completion, RoutingContext]]:
    """Yield n samples of each request, as completions without a result, and how each is routed.

    Raises ArgumentError for an item that is no request, and for a function that returns no RoutingContext.
    """
    for index, request in enumerate(requests):
        arguments.instance("request", request, GenerateRequest)
        context = routing if isinstance(routing, RoutingContext) else routing(request)
        arguments.instance("routing", context, RoutingContext)
        if n > 1 and context.group is None:
            context = replace(context, group=request.request_id)
        for sample, one in enumerate(samples_of(request, n)):
            yield Completion(index, sample, one), context


def most_at_once(infos: Iterable[EngineInfo]) -> int:
    """Return how many requests may run or wait on these engines: twice as many as they run at once."""
    return 2 * max(sum(info.max_running or ASSUMED_RUNNING for info in infos), 1)


async def as_completed(
    jobs: Iterator[J], run: Callable[[J], Awaitable[T]], most: Callable[[], int]
) -> AsyncGenerator[T, None]:
    """Run the jobs concurrently, and yield their results in the order in which they end.

    `jobs` is read only as fast as results are taken: at most `most()` jobs run or wait to be taken. If the generator is
    closed, or a job or the iterator raises, the jobs that still run are cancelled.
    """
    running: set[asyncio.Task[T]] = set()
    ended: asyncio.Queue[asyncio.Task[T]] = asyncio.Queue()

    async def awaited(job: J) -> T:
        return await run(job)

    def end(task: asyncio.Task[T]) -> None:
        running.discard(task)
        ended.put_nowait(task)

    try:
        while True:
            while len(running) + ended.qsize() < most():
                try:
                    job = next(jobs)
                except StopIteration:
                    break
                task = asyncio.create_task(awaited(job))
                running.add(task)
                task.add_done_callback(end)
            if not running and ended.empty():
                return
            yield (await ended.get()).result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
