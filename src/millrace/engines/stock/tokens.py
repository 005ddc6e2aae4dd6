"""What no server takes well: token ids that are none of the model's, and more of them than fit. Pure."""

from millrace.engines.stock.facts import Limits
from millrace.engines.stock.state import ForbiddenError, require
from millrace.types import GenerateRequest


def check_ids(ids: tuple[int, ...], limits: Limits) -> None:
    """Raises ForbiddenError for token ids that the model has not."""
    require(bool(ids), "input_ids is empty")
    require(set(map(type, ids)) == {int}, "input_ids must be integers")
    if min(ids) < 0 or max(ids) >= limits.vocab_size:
        wrong = next(i for i in ids if not 0 <= i < limits.vocab_size)
        raise ForbiddenError(f"input_ids has token {wrong}, the vocabulary ends at {limits.vocab_size - 1}")


def check_length(request: GenerateRequest, limits: Limits) -> None:
    """Raises ForbiddenError for a request that can't have all its tokens."""
    room = request.sampling.max_new_tokens
    require(type(room) is int and room > 0, "max_new_tokens must be 1 or more")
    require(
        len(request.input_ids) + room <= limits.context_length,
        f"{len(request.input_ids)} tokens and max_new_tokens {room} do not fit into the "
        f"{limits.context_length} that the server takes",
    )
