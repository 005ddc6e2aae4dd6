"""Refuse requests that would crash SGLang, hang it, or silently do something else. Pure.

Each case was observed on SGLang 0.5.15 or 0.5.23. `millrace.conformance.poison` sends each to a real server.
"""

from collections.abc import Mapping

from millrace.engines.sglang_wire import PENALTIES
from millrace.engines.stock.facts import Limits
from millrace.engines.stock.images import check_images
from millrace.engines.stock.state import InvalidStateError, require
from millrace.engines.stock.tokens import check_ids, check_length, check_schema, check_stop, check_values
from millrace.types import GenerateRequest

# Fields that Millrace sets; `extra` must not have them.
OWN_FIELDS = frozenset({
    "rid", "input_ids", "return_logprob", "stream", "return_prompt_token_ids", "return_routed_experts",
    "routed_experts_start_len",
})  # fmt: skip
# They crash the server with any value, or replace the prompt.
LETHAL_FIELDS = frozenset({"text", "input_embeds", "positional_embed_overrides", "lora_id", "http_worker_ipc"})
# Crashes 0.5.23 if an image of another hash is in the prefix cache.
LETHAL_FIELDS |= {"mm_hashes"}
# Crashes 0.5.15 if a request without it is in the same batch.
LETHAL_FIELDS |= {"token_ids_logprob"}
OWN_SAMPLING = frozenset({
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop_token_ids", "ignore_eos", "sampling_seed",
    "stop", "no_stop_trim", "skip_special_tokens", "min_new_tokens", "logit_bias", "json_schema", *PENALTIES,
    "n",  # one request is one sample
    "is_normalized",  # crashes the server
})  # fmt: skip
MEDIA = frozenset({"image_data", "video_data", "audio_data"})  # they add tokens to the prompt
HEALTH_CHECK = "HEALTH_CHECK"  # ids with this prefix are the server's own; it never answers them


def check_request(request: GenerateRequest, limits: Limits) -> None:
    """Raise InvalidStateError for a request that would harm the server, or that it would not honour."""
    sampling = request.sampling
    check_values(request)
    check_ids(request, limits)
    check_length(request, limits)
    check_stop(request, limits)
    check_schema(request, limits)
    check_images(request, limits)
    require(
        sampling.seed is None or limits.seeds,
        "the server would ignore the seed; start it with engine_args: {enable_deterministic_inference: true}",
    )
    require(
        not (sampling.ignore_eos and sampling.stop_token_ids),
        "with ignore_eos the server would ignore stop_token_ids too; give one of them",
    )
    require(
        limits.penalties or not sampling.penalizes,
        "the server would count penalties one token late, and the prompt's last token as output; start it with "
        "engine_args: {disable_overlap_schedule: true}",
    )
    require(
        not (request.prompt_logprobs and request.extra.keys() & {*MEDIA, "logprob_start_len"}),
        "prompt_logprobs are for prompts of text, and set logprob_start_len; leave it and media out of extra",
    )
    require(not (request.images and request.extra.keys() & MEDIA), "give the media in images or in extra, not in both")
    require(
        not request.images or request.input_ids[0] != limits.image_token,
        "input_ids begins with an image, and SGLang would tokenize the prompt again; begin it with another token",
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
