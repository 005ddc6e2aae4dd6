"""Refuse requests that would crash SGLang, hang it, or silently do something else. Pure.

Each case was observed on SGLang 0.5.15 or 0.5.23. `millrace.conformance.poison` sends each to a real server.
"""

from collections.abc import Mapping
from math import isfinite

from millrace.engines.stock.facts import Limits
from millrace.engines.stock.state import InvalidStateError, require
from millrace.engines.stock.tokens import check_ids, check_length, check_values
from millrace.types import GenerateRequest

# Fields that Millrace sets; `extra` must not have them.
OWN_FIELDS = frozenset({"rid", "input_ids", "return_logprob", "stream"})
# They crash the server with any value, or replace the prompt.
LETHAL_FIELDS = frozenset({"text", "input_embeds", "positional_embed_overrides", "lora_id", "http_worker_ipc"})
# Crashes 0.5.15 if a request without it is in the same batch.
LETHAL_FIELDS |= {"token_ids_logprob"}
OWN_SAMPLING = frozenset({
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop_token_ids", "ignore_eos", "sampling_seed",
    "n",  # one request is one sample
    "is_normalized",  # crashes the server
})  # fmt: skip
BIAS_LIMIT = 1e6  # larger values overflow float32 and make the probabilities NaN
PENALTY_RANGE = (0.01, 100.0)  # likewise
HEALTH_CHECK = "HEALTH_CHECK"  # ids with this prefix are the server's own; it never answers them


def check_request(request: GenerateRequest, limits: Limits) -> None:
    """Raise InvalidStateError for a request that would harm the server, or that it would not honour."""
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
    require(
        not request.request_id.startswith(HEALTH_CHECK),
        f"request ids that begin with {HEALTH_CHECK} are reserved by SGLang",
    )
    if request.extra:
        _check_extra(request.extra, limits)


def _check_extra(extra: Mapping[str, object], limits: Limits) -> None:
    for name in sorted(OWN_FIELDS & extra.keys()):
        raise InvalidStateError(f"extra.{name} is set by Millrace")
    for name in sorted(LETHAL_FIELDS & extra.keys()):
        raise InvalidStateError(f"extra.{name} can crash the server or replace the prompt")
    top = extra.get("top_logprobs_num", 0)
    require(
        type(top) is int and 0 <= top <= limits.vocab_size,
        "extra.top_logprobs_num must be from 0 to the vocabulary size",
    )
    start = extra.get("logprob_start_len", -1)
    require(type(start) is int and start >= -1, "extra.logprob_start_len must be an integer, -1 or more")
    require(isinstance(extra.get("extra_key", ""), str), "extra.extra_key must be text")
    further = extra.get("sampling_params", {})
    require(isinstance(further, dict), "extra.sampling_params must be a mapping")
    assert isinstance(further, dict)
    for name in sorted(OWN_SAMPLING & further.keys()):
        raise InvalidStateError(f"extra.sampling_params.{name} is set by request.sampling or Millrace")
    _check_further(further)


def _check_further(sampling: Mapping[str, object]) -> None:
    """Check the sampling parameters that only SGLang has."""
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
