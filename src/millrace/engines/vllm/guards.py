"""Refuse requests that would crash vLLM, hang it, or silently do something else. Pure.

Each case was observed on vLLM 0.32.0. `millrace.conformance.poison` sends each to a real server.
"""

from collections.abc import Mapping
from difflib import get_close_matches

from millrace.engines.stock.facts import Limits
from millrace.engines.stock.model import Model
from millrace.engines.stock.state import InvalidStateError, require
from millrace.engines.stock.tokens import check_ids, check_length, check_values
from millrace.engines.vllm.facts import Server
from millrace.types import GenerateRequest

COLDEST, HOTTEST = 0.01, 2.0
PENALTY_RANGE = (0.01, 100.0)
BIAS_LIMIT = 100.0
OURS = frozenset({"sampling_params", "lora_path"})  # fields that are encoded differently on the wire

# Fields that Millrace sets; `extra` must not have them.
OWN_FIELDS = frozenset({
    "request_id", "token_ids", "prompt", "stream", "stream_options", "return_token_ids", "output_mode",
})  # fmt: skip
OWN_SAMPLING = frozenset({
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos", "logprobs",
    "detokenize", "output_kind", "stream_interval",
    "n",  # one request is one sample
    "logprob_token_ids",  # replaces the sampled token's logprob
    "trace_decode_token_ids",
    "prompt_logprobs", "prompt_logprob_token_ids",  # a Generation has no field for them
})  # fmt: skip


def check_reload(model: Model, server: Server) -> None:
    """Raise InvalidStateError if vLLM's own reload would silently leave wrong weights."""
    shapes = model.shapes or {}
    tied = bool(shapes) and "lm_head.weight" not in shapes
    require(
        not server.on_cpu or not (tied or any(".experts." in name for name in shapes)),
        "on the CPU, vLLM's own reload gives wrong weights if the model has tied embeddings or experts; start the "
        "server with Millrace's extension and one data-parallel rank",
    )


def check_request(request: GenerateRequest, limits: Limits, server: Server) -> None:
    """Raise InvalidStateError for a request that would harm the server, or that it would not honour."""
    sampling = request.sampling
    check_values(request)
    check_ids(request, limits)
    check_length(request, limits)
    require(
        sampling.temperature == 0 or COLDEST <= sampling.temperature <= HOTTEST,
        f"temperature must be 0, or {COLDEST:g} to {HOTTEST:g}: vLLM would raise a lower value and refuse a higher one",
    )
    require(
        server.logprobs_mode == "processed_logprobs" or sampling.temperature in (0.0, 1.0),
        f"the server's logprobs are those of temperature 1 ({server.logprobs_mode}); start it with --logprobs-mode "
        "processed_logprobs",
    )
    further = request.extra.get("sampling_params", {})
    require(isinstance(further, Mapping), "extra.sampling_params must be a mapping")
    assert isinstance(further, Mapping)
    _check_names("extra", request.extra, OWN_FIELDS, server.fields | OURS)
    _check_names("extra.sampling_params", further, OWN_SAMPLING, server.sampling)
    _check_further(further, limits)


def _check_further(sampling: Mapping[str, object], limits: Limits) -> None:
    """Refuse values that make probabilities NaN: vLLM then answers with arbitrary tokens."""
    low, high = PENALTY_RANGE
    penalty = sampling.get("repetition_penalty", 1.0)
    require(
        isinstance(penalty, int | float) and low <= penalty <= high,
        f"extra.sampling_params.repetition_penalty must be {low:g} to {high:g}",
    )
    bias = sampling.get("logit_bias") or {}
    require(
        isinstance(bias, Mapping)
        and all(str(token).isdecimal() and int(token) < limits.vocab_size for token in bias)
        and all(isinstance(value, int | float) and abs(value) <= BIAS_LIMIT for value in bias.values()),
        f"extra.sampling_params.logit_bias must map tokens of the model to numbers of at most {BIAS_LIMIT:g}",
    )


def _check_names(where: str, given: Mapping[str, object], own: frozenset[str], known: frozenset[str]) -> None:
    for name in given:
        require(name not in own, f"{where}.{name} is set by Millrace, or has no field in a Generation")
        if name not in known:
            near = get_close_matches(name, known - own, n=1)
            raise InvalidStateError(
                f"the server would ignore {where}.{name}, which it does not know"
                + (f"; did you mean {near[0]}?" if near else "")
            )
