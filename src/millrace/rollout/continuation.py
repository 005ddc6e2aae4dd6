"""A generation that outlives its engine: what was made stays, and another engine makes the rest."""

import zlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace

import numpy as np

from millrace.errors import EngineFailed, EngineUnreachable, LocalError
from millrace.fleet.journal import Journal
from millrace.rollout.agent import AbortedGeneration
from millrace.types import FinishReason, GenerateRequest, Generation, Segment

Send = Callable[[GenerateRequest], Coroutine[object, object, Generation]]


@dataclass(slots=True)
class Attempts:
    """How often a sample may still lose its engine, which `journal` is told of."""

    left: int
    journal: Journal
    used: int = 0

    def spend(self, error: Exception, *, continued: bool) -> None:
        """Raises the error where none is left. `continued`: the sample goes on from what it has."""
        if not self.left:
            raise error
        self.left -= 1
        self.used += 1
        engine = error.engine if isinstance(error, EngineUnreachable | EngineFailed) else None
        self.journal.retried(engine, attempt=self.used, continued=continued)


async def generate_whole(
    request: GenerateRequest, send: Send, attempts: Attempts, *, interrupted: Callable[[], bool] = lambda: False
) -> Generation:
    """Sends the request, and what is left of it again where an engine dies or aborts it, each time under an id of its
    own: the engine may still hold the one before. Raises what ended it when no attempt is left. An abort while
    `interrupted` is wanted, and costs none."""
    pieces: list[Generation] = []
    sent = 0
    while True:
        rest = remaining(request, pieces)
        if sent:
            rest = replace(rest, request_id=f"{request.request_id}~{sent}")
        sent += 1
        try:
            piece = await send(rest)
        except (EngineUnreachable, EngineFailed, LocalError) as error:
            attempts.spend(error, continued=True)
            continue
        pieces.append(piece)
        whole = joined(request, pieces)
        if whole.finish_reason is not FinishReason.ABORT:
            return whole
        if not interrupted():
            attempts.spend(AbortedGeneration(request.request_id), continued=True)


def remaining(request: GenerateRequest, pieces: Sequence[Generation]) -> GenerateRequest:
    """What is still to be asked for. A seed would draw the same random numbers again, so the rest gets another."""
    made = tuple(token for piece in pieces for token in piece.output_ids)
    if not made:
        return request
    sampling = request.sampling
    seed = None if sampling.seed is None else zlib.crc32(f"{sampling.seed}~{len(made)}".encode())
    left = sampling.max_new_tokens - len(made)
    return replace(
        request, input_ids=request.input_ids + made, sampling=replace(sampling, max_new_tokens=left, seed=seed)
    )


def joined(request: GenerateRequest, pieces: Sequence[Generation]) -> Generation:
    """The pieces as the answer to the request. One that was aborted at its last token is complete."""
    first, last = pieces[0], pieces[-1]
    output = tuple(token for piece in pieces for token in piece.output_ids)
    segments: list[Segment] = []
    start = 0
    for piece in pieces:
        for one in piece.segments:
            if segments and segments[-1].version == one.version:
                segments[-1] = replace(segments[-1], end=one.end + start)
            else:
                segments.append(Segment(one.version, one.start + start, one.end + start))
        start += len(piece.output_ids)
    full = len(output) >= request.sampling.max_new_tokens and last.finish_reason is FinishReason.ABORT
    return replace(
        first,
        request_id=request.request_id,
        output_ids=output,
        logprobs=np.concatenate([piece.logprobs for piece in pieces]),
        finish_reason=FinishReason.LENGTH if full else last.finish_reason,
        segments=tuple(segments),
        extra=last.extra,
    )
