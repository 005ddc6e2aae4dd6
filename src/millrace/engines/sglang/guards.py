"""What is refused before it is sent, because a server would die of it, hang, or do something else without a word. Pure.

Every line was seen on SGLang 0.5.15 or 0.5.23; `millrace.conformance.poison` sends each to a real server.
"""

from collections.abc import Mapping
from math import isfinite

from millrace.engines.stock.facts import Limits
from millrace.engines.stock.state import InvalidStateError, require
from millrace.engines.stock.tokens import check_ids, check_length, check_values
from millrace.types import GenerateRequest

# What Millrace itself sends; `extra` may not say otherwise.
OWN_FIELDS = frozenset({"rid", "input_ids", "return_logprob", "stream"})
# They kill the server whatever is in them, or take the place of the prompt.
LETHAL_FIELDS = frozenset({"text", "input_embeds", "positional_embed_overrides", "lora_id", "http_worker_ipc"})
# Kills 0.5.15 as soon as a request without it is in the same batch.
LETHAL_FIELDS |= {"token_ids_logprob"}
OWN_SAMPLING = frozenset({
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop_token_ids", "ignore_eos", "sampling_seed",
    "n",  # one request is one sample
    "is_normalized",  # kills
})  # fmt: skip
BIAS_LIMIT = 1e6  # beyond float32's range the probabilities are no numbers
PENALTY_RANGE = (0.01, 100.0)  # likewise
HEALTH_CHECK = "HEALTH_CHECK"  # requests of such names are the server's own, and are never answered


def check_request(request: GenerateRequest, limits: Limits) -> None:
    """Raises InvalidStateError for a request that would harm the server or come back as something else than asked."""
    sampling = request.sampling
    check_values(request)
    check_ids(request, limits)
    check_length(request, limits)
    require(
        sampling.seed is None or limits.seeds,
        "the server would ignore the seed; start it with engine_args: {enable_deterministic_inference: true}",
    )
    require(
        not (sampling.ignore_eos and sampling.stop_token_ids),
        "with ignore_eos the server would ignore stop_token_ids too; give one of them",
    )
    require(not request.request_id.startswith(HEALTH_CHECK), f"names that begin with {HEALTH_CHECK} are SGLang's own")
    if request.extra:
        _check_extra(request.extra, limits)


def _check_extra(extra: Mapping[str, object], limits: Limits) -> None:
    for name in sorted(OWN_FIELDS & extra.keys()):
        raise InvalidStateError(f"extra.{name} is Millrace's own to set")
    for name in sorted(LETHAL_FIELDS & extra.keys()):
        raise InvalidStateError(f"extra.{name} can kill the server, or replace the prompt")
    top = extra.get("top_logprobs_num", 0)
    require(type(top) is int and 0 <= top <= limits.vocab_size, "extra.top_logprobs_num must be in the vocabulary")
    start = extra.get("logprob_start_len", -1)
    require(type(start) is int and start >= -1, "extra.logprob_start_len must be an integer, -1 or more")
    require(isinstance(extra.get("extra_key", ""), str), "extra.extra_key must be text")
    further = extra.get("sampling_params", {})
    require(isinstance(further, dict), "extra.sampling_params must be a mapping")
    assert isinstance(further, dict)
    for name in sorted(OWN_SAMPLING & further.keys()):
        raise InvalidStateError(f"extra.sampling_params.{name} is set by the request's own sampling")
    _check_further(further)


def _check_further(sampling: Mapping[str, object]) -> None:
    """The sampling parameters that Millrace has no name for."""
    bias = sampling.get("logit_bias") or {}
    require(
        isinstance(bias, dict) and all(_within(value, -BIAS_LIMIT, BIAS_LIMIT) for value in bias.values()),
        f"extra.sampling_params.logit_bias must map tokens to numbers of at most {BIAS_LIMIT:g}",
    )
    low, high = PENALTY_RANGE
    require(
        _within(sampling.get("repetition_penalty", 1.0), low, high),
        f"extra.sampling_params.repetition_penalty must be {low:g} to {high:g}",
    )
    require(
        isinstance(sampling.get("skip_special_tokens", True), bool),
        "extra.sampling_params.skip_special_tokens must be true or false",
    )


def _within(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and isfinite(value) and low <= value <= high
