"""What is refused before it is sent, because vLLM would die of it, hang, or do something else without a word. Pure.

Every line was seen on vLLM 0.32.0; `millrace.conformance.poison` sends each to a real server.
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
OURS = frozenset({"sampling_params", "lora_path"})  # what has a form of its own on the wire

# What Millrace itself sends; `extra` may not say otherwise.
OWN_FIELDS = frozenset({
    "request_id", "token_ids", "prompt", "stream", "stream_options", "return_token_ids", "output_mode",
})  # fmt: skip
OWN_SAMPLING = frozenset({
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos", "logprobs",
    "detokenize", "output_kind", "stream_interval",
    "n",  # one request is one sample
    "logprob_token_ids",  # in the place of the drawn token's logprob
    "trace_decode_token_ids",
    "prompt_logprobs", "prompt_logprob_token_ids",  # a Generation has no place for them
})  # fmt: skip


def check_reload(model: Model, server: Server) -> None:
    """Raises InvalidStateError where vLLM's own reload leaves other weights than it read, without a word."""
    shapes = model.shapes or {}
    tied = bool(shapes) and "lm_head.weight" not in shapes
    require(
        not server.on_cpu or not (tied or any(".experts." in name for name in shapes)),
        "on the CPU, vLLM's own reload is wrong where the embedding is tied or there are experts; start the server "
        "with Millrace's extension, and one data-parallel rank",
    )


def check_request(request: GenerateRequest, limits: Limits, server: Server) -> None:
    """Raises InvalidStateError for a request that would harm the server or come back as something else than asked."""
    sampling = request.sampling
    check_values(request)
    check_ids(request, limits)
    check_length(request, limits)
    require(
        sampling.temperature == 0 or COLDEST <= sampling.temperature <= HOTTEST,
        f"temperature must be 0, or {COLDEST:g} to {HOTTEST:g}: vLLM raises what is below and refuses what is above",
    )
    require(
        server.logprobs_mode == "processed_logprobs" or sampling.temperature in (0.0, 1.0),
        f"the server gives logprobs of temperature 1 ({server.logprobs_mode}); start it with --logprobs-mode "
        "processed_logprobs",
    )
    further = request.extra.get("sampling_params", {})
    require(isinstance(further, Mapping), "extra.sampling_params must be a mapping")
    assert isinstance(further, Mapping)
    _check_names("extra", request.extra, OWN_FIELDS, server.fields | OURS)
    _check_names("extra.sampling_params", further, OWN_SAMPLING, server.sampling)
    _check_further(further, limits)


def _check_further(sampling: Mapping[str, object], limits: Limits) -> None:
    """What makes probabilities that are no numbers, which vLLM answers with a token of no meaning."""
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
        require(name not in own, f"{where}.{name} is Millrace's own to set, or has no place in a Generation")
        if name not in known:
            near = get_close_matches(name, known - own, n=1)
            raise InvalidStateError(
                f"the server would ignore {where}.{name}, which it does not know"
                + (f"; did you mean {near[0]}?" if near else "")
            )
