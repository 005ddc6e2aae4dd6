"""What is refused before it is sent, because a server would die of it. Pure; docs/engines.md has the list."""

from collections.abc import Sequence
from dataclasses import dataclass

from millrace.engines.sglang.state import ForbiddenError
from millrace.types import GenerateRequest

# What Millrace itself sends; `extra` may not say otherwise.
OWN_FIELDS = frozenset({"rid", "input_ids", "text", "input_embeds", "return_logprob", "stream", "extra_key"})


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model takes."""

    vocab_size: int
    context_length: int


def check_request(request: GenerateRequest, limits: Limits) -> None:
    """Raises ForbiddenError for a request that would kill the server or come back as something else than asked."""
    _check_ids("input_ids", request.input_ids, limits)
    room = limits.context_length - len(request.input_ids)
    if request.sampling.max_new_tokens > room:
        raise ForbiddenError(
            f"{len(request.input_ids)} tokens and max_new_tokens {request.sampling.max_new_tokens} do not fit into the "
            f"context of {limits.context_length}"
        )
    if taken := OWN_FIELDS & request.extra.keys():
        raise ForbiddenError(f"extra.{sorted(taken)[0]} is Millrace's own to set")


def _check_ids(name: str, ids: Sequence[int], limits: Limits) -> None:
    if not ids:
        raise ForbiddenError(f"{name} is empty")
    if min(ids) < 0 or max(ids) >= limits.vocab_size:
        wrong = next(i for i in ids if not 0 <= i < limits.vocab_size)
        raise ForbiddenError(f"{name} has token {wrong}, the vocabulary ends at {limits.vocab_size - 1}")
