"""Checks of requests against the limits of any model: token ids, lengths and sampling parameters. Pure."""

from math import isfinite

from millrace.engines.stock.facts import Limits
from millrace.engines.stock.state import InvalidStateError, require
from millrace.types import GenerateRequest

INT32, INT64 = 2**31, 2**63  # upper bounds (exclusive) of token ids and of seeds, on any server
LONGEST_ID = 480  # characters of a request id
MOST_PENALTY = 2.0  # SGLang and vLLM refuse a larger frequency or presence penalty
LEAST_REPETITION, MOST_REPETITION = 0.01, 2.0  # outside of them, SGLang refuses it or probabilities become NaN
MOST_BIAS = 100.0  # vLLM cuts larger ones


def check_values(request: GenerateRequest) -> None:
    """Raise InvalidStateError for values that no engine accepts, whatever its model."""
    sampling = request.sampling
    require(0 < len(request.request_id) <= LONGEST_ID, f"request_id must have 1 to {LONGEST_ID} characters")
    require(bool(request.input_ids), "input_ids is empty")
    _check_range("input_ids", request.input_ids, INT32)
    _check_range("stop_token_ids", sampling.stop_token_ids, INT32)
    require(sampling.max_new_tokens > 0, "max_new_tokens must be 1 or more")
    require(sampling.temperature >= 0 and isfinite(sampling.temperature), "temperature must be finite and 0 or more")
    require(0 < sampling.top_p <= 1, "top_p must be above 0 and at most 1")
    require(sampling.top_k == -1 or 0 < sampling.top_k < INT32, "top_k must be 1 or more, or -1 for no limit")
    require(0 <= sampling.min_p <= 1, "min_p must be from 0 to 1")
    require(sampling.seed is None or 0 <= sampling.seed < INT64, "seed must be from 0 to 2**63 - 1")
    require(all(sampling.stop), "stop has an empty text")
    require(0 <= sampling.min_new_tokens <= sampling.max_new_tokens, "min_new_tokens must be from 0 to max_new_tokens")
    require(not (sampling.min_new_tokens and sampling.stop), "min_new_tokens and stop can't be used together")
    require(
        LEAST_REPETITION <= sampling.repetition_penalty <= MOST_REPETITION,
        f"repetition_penalty must be from {LEAST_REPETITION:g} to {MOST_REPETITION:g}",
    )
    for name in ("frequency_penalty", "presence_penalty"):
        require(
            abs(getattr(sampling, name)) <= MOST_PENALTY, f"{name} must be from {-MOST_PENALTY:g} to {MOST_PENALTY:g}"
        )
    _check_range("logit_bias", tuple(sampling.logit_bias), INT32)
    require(
        all(abs(bias) <= MOST_BIAS for bias in sampling.logit_bias.values()),
        f"the values of logit_bias must be from {-MOST_BIAS:g} to {MOST_BIAS:g}",
    )
    require(
        request.continued_tokens <= len(request.input_ids), "continued_tokens must be at most the number of input_ids"
    )
    require(
        request.routed_experts_start <= len(request.input_ids),
        "routed_experts_start must be at most the number of input_ids",
    )


def check_ids(request: GenerateRequest, limits: Limits) -> None:
    """Raise InvalidStateError for token ids outside the model's vocabulary."""
    _check_range("input_ids", request.input_ids, limits.vocab_size)
    _check_range("stop_token_ids", request.sampling.stop_token_ids, limits.vocab_size)
    _check_range("logit_bias", tuple(request.sampling.logit_bias), limits.vocab_size)


def _check_range(name: str, ids: tuple[int, ...], end: int) -> None:
    if ids and (min(ids) < 0 or max(ids) >= end):
        wrong = next(i for i in ids if not 0 <= i < end)
        known = f"the vocabulary ends at {end - 1}" if end < INT32 else "no vocabulary has it"
        raise InvalidStateError(f"{name} has token {wrong}; {known}")


def check_stop(request: GenerateRequest, limits: Limits) -> None:
    """Raise InvalidStateError for a request with stop texts if the server can't find them."""
    require(
        limits.stop_texts or not request.sampling.stop,
        "the server has no tokenizer, which stop texts need; start it with one, or use stop_token_ids",
    )


def check_schema(request: GenerateRequest, limits: Limits) -> None:
    """Raise InvalidStateError for a request with a JSON schema if the server can't follow one."""
    if request.sampling.json_schema is None:
        return
    require(
        limits.json_schema,
        "the server has no grammar backend or no tokenizer, which a json_schema needs; start it with both",
    )
    require(not request.continued_tokens, "an output with a json_schema can't be continued; ask for all of it at once")


def check_length(request: GenerateRequest, limits: Limits) -> None:
    """Raise InvalidStateError for a request whose prompt and output do not fit into the context."""
    room = request.sampling.max_new_tokens
    require(
        len(request.input_ids) + room <= limits.context_length,
        f"{len(request.input_ids)} prompt tokens and max_new_tokens {room} do not fit into the server's context of "
        f"{limits.context_length}",
    )
