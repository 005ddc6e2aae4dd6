"""One generation from several calls: each call continues from the tokens that the calls before it made.

A call may end early because weights are updated, a router is interrupted, or an engine dies. The tokens that it made
are kept, and the next call asks for the rest.
"""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from millrace.types import ExpertArray, FinishReason, Float32Array, GenerateRequest, Generation, VersionSpan

SEEDS = 2**63


@dataclass(slots=True)
class Continuation:
    """A request and the parts of its answer so far.

    >>> continuation = Continuation(request)
    >>> continuation.add(await engine.generate(continuation.rest, deadline=30))  # an update ended it early
    >>> continuation.add(await engine.generate(continuation.rest, deadline=30))
    >>> continuation.result
    """

    request: GenerateRequest
    parts: list[Generation] = field(default_factory=list)

    @property
    def rest(self) -> GenerateRequest:
        """The request for the tokens that are missing. The tokens so far are appended to the prompt, and the seed is
        increased by their number, or the engine would draw the same random numbers again."""
        made = tuple(token for part in self.parts for token in part.output_ids)
        scored = self._prompt_logprobs(self.parts) is not None
        routed = joined_experts(part.routed_experts for part in self.parts)
        if not made and not scored and routed is None:
            return self.request
        sampling = self.request.sampling
        seed = None if sampling.seed is None else (sampling.seed + len(made)) % SEEDS
        return replace(
            self.request,
            input_ids=self.request.input_ids + made,
            sampling=replace(
                sampling,
                max_new_tokens=sampling.max_new_tokens - len(made),
                min_new_tokens=max(sampling.min_new_tokens - len(made), 0),
                seed=seed,
            ),
            continued_tokens=self.request.continued_tokens + len(made),
            prompt_logprobs=self.request.prompt_logprobs and not scored,
            routed_experts_start=self.request.routed_experts_start + (0 if routed is None else len(routed)),
        )

    def add(self, part: Generation) -> None:
        """Add the answer to `rest`. A part that was aborted at the last token completes the generation."""
        made = sum(len(one.output_ids) for one in self.parts) + len(part.output_ids)
        if part.finish_reason is FinishReason.ABORT and made >= self.request.sampling.max_new_tokens:
            part = replace(part, finish_reason=FinishReason.LENGTH)
        if self._begins_anew(part):
            nothing = part.logprobs[:0]
            part = replace(
                part, output_ids=(), logprobs=nothing, version_spans=(), penalty_restarts=(), routed_experts=None
            )
        self.parts.append(part)

    def _begins_anew(self, part: Generation) -> bool:
        """Return whether a part's tokens are dropped: an engine's grammar begins with the first token that it samples,
        so it can't match an output that another call began."""
        return part.finish_reason is FinishReason.ABORT and self.request.sampling.json_schema is not None

    @property
    def aborted(self) -> bool:
        """Whether the last part was aborted, so that tokens are missing."""
        return bool(self.parts) and self.parts[-1].finish_reason is FinishReason.ABORT

    @property
    def result(self) -> Generation:
        """All parts as one generation. Aborted and empty if there are none. The text is that of the last part, which
        covers the parts before it."""
        return self.with_part(None)

    def with_part(self, part: Generation | None) -> Generation:
        """Return the result as if `part` had been added."""
        parts = self.parts if part is None else [*self.parts, part]
        if not parts:
            prompt_tokens = len(self.request.input_ids)
            nothing = np.empty(0, np.float32)
            return Generation(self.request.request_id, (), nothing, FinishReason.ABORT, (), prompt_tokens, 0)
        return replace(
            parts[-1],
            request_id=self.request.request_id,
            output_ids=tuple(token for one in parts for token in one.output_ids),
            logprobs=np.concatenate([one.logprobs for one in parts]) if len(parts) > 1 else parts[0].logprobs,
            version_spans=_joined_spans(parts),
            prompt_tokens=parts[0].prompt_tokens,
            cached_tokens=parts[0].cached_tokens,
            prompt_logprobs=self._prompt_logprobs(parts),
            prompt_ids=_prompt_ids(parts),
            penalty_restarts=_joined_restarts(parts),
            routed_experts=joined_experts(part.routed_experts for part in parts),
            queue_seconds=sum(one.queue_seconds for one in parts),
        )

    def _prompt_logprobs(self, parts: list[Generation]) -> Float32Array | None:
        """The prompt's logprobs from the first part that has them. A later part's prompt ends in tokens of others."""
        found = next((one.prompt_logprobs for one in parts if one.prompt_logprobs is not None), None)
        return None if found is None else found[: len(self.request.input_ids)]


def joined_experts(arrays: Iterable[ExpertArray | None]) -> ExpertArray | None:
    """Return routed experts [N, L, K] of successive calls, one after the other; None if no call has any.

    Each call was asked for those that the calls before it left open, so a token has the experts of the first call that
    read it.
    """
    found = [one for one in arrays if one is not None]
    if len(found) < 2:
        return found[0] if found else None
    return np.concatenate(found)


async def generate_in_parts(
    request: GenerateRequest,
    call: Callable[[GenerateRequest], Awaitable[Generation | None]],
    *,
    goes_on: Callable[[], bool],
) -> Generation:
    """Call until the generation is complete.

    Args:
        call: sends a request and returns its answer, or None if nothing was made and it is to be called again.
            What it raises is raised.
        goes_on: asked after a call that was aborted: whether to continue.
    """
    continuation = Continuation(request)
    while True:
        part = await call(continuation.rest)
        if part is None:
            continue
        continuation.add(part)
        if not (continuation.aborted and goes_on()):
            return continuation.result


def call_id(request_id: str, number: int) -> str:
    """Return the id of one of the calls that a request is made of. An engine must never see an id twice: it may still
    hold the earlier call, and SGLang aborts an id again two seconds after its stream has ended."""
    return f"{request_id}~{number}"


def _prompt_ids(parts: list[Generation]) -> tuple[int, ...] | None:
    """Return the prompt from the first part that has it, without the tokens of the parts before."""
    made = 0
    for part in parts:
        if part.prompt_ids is not None:
            return part.prompt_ids[: len(part.prompt_ids) - made]
        made += len(part.output_ids)
    return None


def _joined_restarts(parts: list[Generation]) -> tuple[int, ...]:
    """Return the parts' penalty restarts as positions in the whole output."""
    restarts: set[int] = set()
    start = 0
    for part in parts:
        restarts |= {start + place for place in part.penalty_restarts if place < len(part.output_ids)}
        start += len(part.output_ids)
    return tuple(sorted(restarts))


def _joined_spans(parts: list[Generation]) -> tuple[VersionSpan, ...]:
    """Return the parts' spans as positions in the whole output. Adjacent spans of one version are merged."""
    spans: list[VersionSpan] = []
    start = 0
    for part in parts:
        for span in part.version_spans:
            if spans and spans[-1].version == span.version:
                spans[-1] = replace(spans[-1], end=start + span.end)
            else:
                spans.append(VersionSpan(span.version, start + span.start, start + span.end))
        start += len(part.output_ids)
    return tuple(spans)
