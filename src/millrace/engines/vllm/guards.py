"""Refuse requests that would crash vLLM, hang it, or silently do something else. Pure.

Each case was observed on vLLM 0.32.0. `millrace.conformance.poison` sends each to a real server.
"""

from collections.abc import Mapping
from difflib import get_close_matches

from millrace.engines.stock.facts import Limits
from millrace.engines.stock.images import check_images
from millrace.engines.stock.model import Model
from millrace.engines.stock.state import InvalidStateError, require
from millrace.engines.stock.tokens import check_ids, check_length, check_schema, check_stop, check_values
from millrace.engines.vllm.facts import Server
from millrace.types import GenerateRequest

COLDEST, HOTTEST = 0.01, 2.0
MEDIA = frozenset({"content_parts", "features"})  # they add tokens to the prompt
OURS = frozenset({"sampling_params", "lora_path"})  # fields that are encoded differently on the wire

# Fields that Millrace sets; `extra` must not have them.
OWN_FIELDS = frozenset({
    "request_id", "token_ids", "prompt", "stream", "stream_options", "return_token_ids", "output_mode",
})  # fmt: skip
OWN_SAMPLING = frozenset({
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos", "logprobs",
    "detokenize", "output_kind", "stream_interval",
    "n",  # one request is one sample
    "stop", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "min_tokens",
    "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "prompt_logprobs",
    "structured_outputs",
    "logprob_token_ids",  # replaces the sampled token's logprob
    "trace_decode_token_ids", "routed_experts_prompt_start",
    "prompt_logprob_start", "prompt_logprob_token_ids",  # a Generation has no field for them
})  # fmt: skip


def check_reload(model: Model, server: Server) -> None:
    """Raise InvalidStateError if vLLM's own reload would silently leave wrong weights."""
    shapes = model.shapes or {}
    tied = bool(shapes) and "lm_head.weight" not in shapes
    require(
        not server.on_cpu or not (tied or any(".experts." in name for name in shapes)),
        "on the CPU, vLLM's own reload gives wrong weights if the model has tied embeddings or experts; start the "
        "server with Millrace's extension, and with its middleware if it has several data-parallel ranks",
    )


def check_request(request: GenerateRequest, limits: Limits, server: Server) -> None:
    """Raise InvalidStateError for a request that would harm the server, or that it would not honour."""
    sampling = request.sampling
    check_values(request)
    check_ids(request, limits)
    check_length(request, limits)
    check_stop(request, limits)
    check_schema(request, limits)
    check_images(request, limits)
    require(
        sampling.temperature == 0 or COLDEST <= sampling.temperature <= HOTTEST,
        f"temperature must be 0, or {COLDEST:g} to {HOTTEST:g}: vLLM would raise a lower value and refuse a higher one",
    )
    plain = not (sampling.penalizes or sampling.logit_bias or sampling.min_new_tokens)
    require(
        server.logprobs_mode == "processed_logprobs" or (plain and sampling.temperature in (0.0, 1.0)),
        f"the server's logprobs are those of temperature 1, without penalties and bias ({server.logprobs_mode}); start "
        "it with --logprobs-mode processed_logprobs",
    )
    require(not (request.prompt_logprobs and request.extra.keys() & MEDIA), "prompt_logprobs are for prompts of text")
    require(not (request.images and request.extra.keys() & MEDIA), "give the media in images or in extra, not in both")
    further = request.extra.get("sampling_params", {})
    require(isinstance(further, Mapping), "extra.sampling_params must be a mapping")
    assert isinstance(further, Mapping)
    _check_names("extra", request.extra, OWN_FIELDS, server.fields | OURS)
    _check_names("extra.sampling_params", further, OWN_SAMPLING, server.sampling)


def _check_names(where: str, given: Mapping[str, object], own: frozenset[str], known: frozenset[str]) -> None:
    for name in given:
        require(name not in own, f"{where}.{name} is set by Millrace, or has no field in a Generation")
        if name not in known:
            near = get_close_matches(name, known - own, n=1)
            raise InvalidStateError(
                f"the server would ignore {where}.{name}, which it does not know"
                + (f"; did you mean {near[0]}?" if near else "")
            )
