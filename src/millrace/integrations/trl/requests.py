"""The requests of one call of a trainer: sent at once, answered in order, and the first failure named."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from millrace.errors import DataError, MillraceError, RolloutError
from millrace.fleet.client import FleetClient
from millrace.rollout.agent import AbortedGeneration
from millrace.types import FinishReason, GenerateRequest, Generation, RoutingContext, SamplingParams

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """The completions that a trainer asks for in one call.

    name: unique among the calls of all ranks. step: of the trainer. size: the number of completions. per_prompt: how
    many of them in a row have the same prompt. version: the weight version that must make them.
    """

    name: str
    step: int
    size: int
    per_prompt: int
    version: int | None

    def routing(self, index: int) -> RoutingContext:
        """Return the routing of a completion's requests."""
        group = f"{self.name}/{index // self.per_prompt}"
        return RoutingContext(session=f"{self.name}-{index}", group=group, exact_version=self.version)

    async def all(self, make: Callable[[int], Awaitable[T]]) -> list[T]:
        """Make all completions at once, and return them in order.

        If one fails, the others are cancelled. Raises RolloutError, whose message names the one that failed.
        """

        async def one(index: int) -> T:
            try:
                return await make(index)
            except MillraceError as error:
                which = f"completion {index + 1} of {self.size} at step {self.step}"
                raise RolloutError(f"{which} could not be generated: {error}") from error

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index)) for index in range(self.size)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
        return [task.result() for task in tasks]


@dataclass(frozen=True, slots=True)
class Sender:
    """How requests are sent. deadline: seconds for one request, retries included. retries: the engine failures that one
    request survives."""

    deadline: float
    retries: int

    async def send(self, fleet: FleetClient, request: GenerateRequest, routing: RoutingContext) -> Generation:
        """Send a request, and return its generation.

        Raises what `Fleet.generate` raises, and AbortedGeneration if engines aborted it too often.
        """
        made = await fleet.generate(request, deadline=self.deadline, routing=routing, retries=self.retries)
        if made.finish_reason is FinishReason.ABORT:
            raise AbortedGeneration(request.request_id)
        return made


def sampling_params(source: Any, max_new_tokens: int, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    """Return the sampling parameters of a trainer or of its config, which have the same names.

    Raises ArgumentError if one of them is invalid.
    """
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=source.temperature,
        top_p=source.top_p,
        top_k=source.top_k or -1,  # TRL's 0 is off, too
        min_p=source.min_p or 0.0,
        repetition_penalty=source.repetition_penalty,
        stop_token_ids=stop_token_ids,
    )


def room(prompt_tokens: int, wanted: int, context_length: int) -> int:
    """Return how many of the `wanted` tokens fit into the context behind a prompt. Raises DataError if none fits."""
    if prompt_tokens >= context_length:
        raise DataError(f"its prompt has {prompt_tokens} tokens, and the engines' context is {context_length}")
    return min(wanted, context_length - prompt_tokens)
