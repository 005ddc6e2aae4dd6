"""One generation from several calls. A weight update interrupts what runs; each interrupted request goes on afterwards
from the tokens it has, so that every call is the work of one version and the segments are exact. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from millrace.types import FinishReason, GenerateRequest, Generation, Segment

LEAST_TOKENS = ("min_tokens", "min_new_tokens")  # vLLM's and SGLang's name, in extra
SEEDS = 2**63


def rest_of(request: GenerateRequest, pieces: Sequence[Generation]) -> GenerateRequest:
    """The request for what is still missing: the tokens so far become a part of the prompt. A seed is moved on, or the
    server would draw by the same random numbers again."""
    if not pieces:
        return request
    made = tuple(token for piece in pieces for token in piece.output_ids)
    sampling = request.sampling
    seed = None if sampling.seed is None else (sampling.seed + len(made)) % SEEDS
    return replace(
        request,
        input_ids=request.input_ids + made,
        sampling=replace(sampling, max_new_tokens=sampling.max_new_tokens - len(made), seed=seed),
        extra=_fewer(request.extra, len(made)),
    )


def _fewer(extra: Mapping[str, object], made: int) -> Mapping[str, object]:
    """`extra` for what is missing: the least number of tokens counts those that were made."""
    further = extra.get("sampling_params")
    if not isinstance(further, Mapping) or not (least := further.keys() & set(LEAST_TOKENS)):
        return extra
    return {**extra, "sampling_params": {**further, **{name: max(further[name] - made, 0) for name in least}}}


def joined(pieces: Sequence[Generation]) -> Generation:
    """The pieces as one generation, which ended as the last of them did. Neighbouring segments of one version become
    one."""
    if len(pieces) == 1:
        return pieces[0]
    segments: list[Segment] = []
    start = 0
    for piece in pieces:
        for segment in piece.segments:
            moved = Segment(segment.version, start + segment.start, start + segment.end)
            if segments and segments[-1].version == moved.version:
                moved = replace(moved, start=segments.pop().start)
            segments.append(moved)
        start += len(piece.output_ids)
    return replace(
        pieces[-1],
        output_ids=tuple(token for piece in pieces for token in piece.output_ids),
        logprobs=np.concatenate([piece.logprobs for piece in pieces]),
        segments=tuple(segments),
        prompt_tokens=pieces[0].prompt_tokens,
        cached_tokens=pieces[0].cached_tokens,
    )


def cut_off(request: GenerateRequest) -> Generation:
    """What a request comes to that was aborted before its first token."""
    return Generation(
        request.request_id, (), np.empty(0, np.float32), FinishReason.ABORT, (), len(request.input_ids), 0
    )


def is_full(request: GenerateRequest, pieces: Sequence[Generation]) -> bool:
    """Whether nothing is missing although the last piece was interrupted."""
    return sum(len(piece.output_ids) for piece in pieces) >= request.sampling.max_new_tokens
