"""Checks of routed experts."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from millrace.conformance.check import Check, CheckFailed, Subject, check, expect
from millrace.conformance.requests import GENERATE_DEADLINE, Flight, alike, ask, catch, generate
from millrace.conformance.weights import folder, next_version, one_way
from millrace.continuation import Continuation
from millrace.types import Capability, ExpertArray, FinishReason, Generation

PROMPT = 48  # tokens; caches keep complete pages of up to 32


@check(
    "experts.shape",
    "each token but the last has different experts in each layer; they are the same again, also from the cache",
    Capability.ROUTED_EXPERTS,
)
async def shape(subject: Subject) -> None:
    await subject.engine.flush_cache()
    first = await generate(subject, ask(subject, "experts", length=PROMPT))
    again = await generate(subject, ask(subject, "experts", length=PROMPT))
    routed = _routed(first)
    ordered = np.sort(routed, axis=-1)
    expect(bool((ordered[..., 1:] != ordered[..., :-1]).all()), "a token is routed to an expert twice")
    expect(alike(first, again), "greedy tokens differ")
    differing = int((_routed(again) != routed).any(axis=(1, 2)).sum())
    expect(not differing, f"{differing} tokens have other experts, with {again.cached_tokens} tokens from the cache")


@check(
    "experts.start", "they begin where the request says, and a stream has them at its end", Capability.ROUTED_EXPERTS
)
async def start(subject: Subject) -> None:
    request = ask(subject, "start", length=PROMPT)
    whole = _routed(await generate(subject, request))
    for place in (1, PROMPT - 1, PROMPT):
        later = ask(subject, "start", length=PROMPT)
        part = _routed(await generate(subject, replace(later, routed_experts_start=place)), place)
        expect(np.array_equal(part, whole[place:]), f"from position {place} on, they differ from those of the whole")
    again = ask(subject, "start", length=PROMPT)
    streamed = [one async for one in subject.engine.stream(again, deadline=GENERATE_DEADLINE)]
    expect(np.array_equal(_routed(streamed[-1]), whole), "a stream ends with others")


@check(
    "experts.partial", "an aborted generation has those of its tokens, and keeps them as it continues",
    Capability.ROUTED_EXPERTS,
)  # fmt: skip
async def partial(subject: Subject) -> None:
    async def look(flight: Flight) -> bool:
        await subject.engine.abort(flight.request.request_id)
        made = await flight.task
        if made.finish_reason is not FinishReason.ABORT:
            return False
        kept = _routed(made)
        continuation = Continuation(flight.request, [made])
        left = replace(continuation.rest, request_id=f"{flight.request.request_id}-rest")
        few = replace(left, sampling=replace(left.sampling, max_new_tokens=8))
        continuation.add(await generate(subject, few))
        expect(np.array_equal(_routed(continuation.result)[: len(kept)], kept), "those of the first part changed")
        return True

    await catch(subject, "experts-partial", look)


@check(
    "experts.across", "a generation that runs during an update has those of all tokens", Capability.ROUTED_EXPERTS
)  # fmt: skip
async def across(subject: Subject) -> None:
    async def look(flight: Flight) -> bool:
        await one_way(subject)(subject, folder(subject), await next_version(subject))
        made = await flight.task
        _routed(made)
        return len(made.version_spans) > 1

    await catch(subject, "experts-across", look)


def _routed(made: Generation, start: int = 0) -> ExpertArray:
    """Return a generation's experts. Raises CheckFailed unless there is a row for every token from `start` on."""
    routed = made.routed_experts
    if routed is None:
        raise CheckFailed("there are none")
    due = made.prompt_tokens + len(made.output_ids) - 1 - start
    expect(routed.ndim == 3 and len(routed) == due, f"their shape is {routed.shape}, and {due} tokens have some")
    expect(routed.dtype in (np.uint8, np.uint16), f"their dtype is {routed.dtype}")
    return routed


CHECKS: Sequence[Check] = (shape, start, partial, across)
