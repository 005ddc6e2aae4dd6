"""A fleet whose engine writes what a script says, and keeps what it was asked and what it answered."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from millrace.types import (
    ANYWHERE,
    Capability,
    ExpertArray,
    FinishReason,
    GenerateRequest,
    Generation,
    RoutingContext,
    VersionSpan,
)

# What the model writes next: for the text of a prompt, its turn as text.
Script = Callable[[str], str | Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request and the tokens of its answer."""

    request: GenerateRequest
    output_ids: tuple[int, ...]


def experts_naming(token_ids: Sequence[int], start: int = 0) -> ExpertArray:
    """Routed experts of all tokens but the last, from `start` on, by which each token can be told: [N, 2, 1]."""
    named = np.array(token_ids[start:-1], np.int64) % 251
    return np.repeat(named.astype(np.uint8), 2).reshape(-1, 2, 1)


@dataclass
class ScriptedFleet:
    """Stands for a fleet of one engine.

    tokenizer: of the model. end: the token that ends each turn, unless max_new_tokens cuts it. version: of the weights.

    pace: awaited before each token of a stream, if given. routed: whether whole answers have routed experts, which name
    their token (`experts_naming`).
    """

    tokenizer: Any
    end: int
    script: Script
    context_length: int = 100_000
    version: int = 1
    capabilities: frozenset[Capability] = frozenset()
    pace: Callable[[], Awaitable[None]] | None = None
    routed: bool = False
    asked: list[Asked] = field(default_factory=list)

    async def generate(
        self,
        request: GenerateRequest,
        *,
        deadline: float,
        routing: RoutingContext = ANYWHERE,
        retries: int = 0,
    ) -> Generation:
        return self._made(request, await self._answer(request))

    async def stream(
        self,
        request: GenerateRequest,
        *,
        deadline: float,
        routing: RoutingContext = ANYWHERE,
        retries: int = 0,
    ) -> AsyncGenerator[Generation, None]:
        output = await self._answer(request)
        for length in range(1, len(output)):
            if self.pace is not None:
                await self.pace()
            yield self._made(request, output[:length], FinishReason.ABORT)
        await asyncio.sleep(0)
        yield self._made(request, output)

    async def _answer(self, request: GenerateRequest) -> tuple[int, ...]:
        text = self.script(self.tokenizer.decode(list(request.input_ids)))
        written = text if isinstance(text, str) else await text
        ids = [*self.tokenizer.encode(written, add_special_tokens=False), self.end]
        output = tuple(ids[: request.sampling.max_new_tokens])
        self.asked.append(Asked(request, output))
        return output

    def _made(
        self, request: GenerateRequest, output: tuple[int, ...], finish: FinishReason | None = None
    ) -> Generation:
        ended = FinishReason.STOP if output[-1:] == (self.end,) else FinishReason.LENGTH
        return Generation(
            request.request_id,
            output,
            np.linspace(-2.0, -0.1, len(output), dtype=np.float32),
            finish or ended,
            (VersionSpan(self.version, 0, len(output)),),
            len(request.input_ids),
            0,
            routed_experts=experts_naming(request.input_ids + output, request.routed_experts_start)
            if self.routed and finish is None
            else None,
        )
