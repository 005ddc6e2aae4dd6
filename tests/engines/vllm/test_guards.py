"""Requests that Millrace refuses before vLLM sees them. tests/conformance shows that a real server would ignore them or
die of them."""

from dataclasses import replace

import pytest

from millrace.engines.stock.facts import Limits
from millrace.engines.stock.model import Model
from millrace.engines.stock.state import InvalidStateError
from millrace.engines.vllm.facts import Server
from millrace.engines.vllm.guards import OWN_FIELDS, OWN_SAMPLING, check_reload, check_request
from millrace.engines.vllm.wire import GENERATE
from millrace.types import GenerateRequest, SamplingParams

LIMITS = Limits(vocab_size=100, context_length=50, seeds=True)
SERVER = Server(
    path=GENERATE,
    extension=True,
    replicas=1,
    transfer=False,
    checker=False,
    versions=True,
    aborts=True,
    logprobs_mode="processed_logprobs",
    total_tokens=1000,
    fields=OWN_FIELDS | {"sampling_params", "priority", "cache_salt", "content_parts"},
    sampling=OWN_SAMPLING | {"bad_words", "allowed_token_ids"},
    on_cpu=True,
)
PNG = b"\x89PNG\r\n\x1a\n...IEND"  # an engine would say that it is damaged
SOUND = GenerateRequest((1, 2, 3), SamplingParams(8), request_id="r")


@pytest.mark.parametrize(
    "request_",
    [
        SOUND,
        replace(SOUND, extra={"cache_salt": "s", "lora_path": "a", "sampling_params": {"bad_words": ["x"]}}),
        replace(SOUND, sampling=SamplingParams(8, stop=("a",), logit_bias={1: 2.0}, presence_penalty=-1.0)),
        replace(SOUND, sampling=SamplingParams(8, min_new_tokens=3), prompt_logprobs=True),
        replace(SOUND, sampling=SamplingParams(8, temperature=0.3, top_k=5, seed=1, stop_token_ids=(4,))),
    ],
)
def test_a_request_that_the_server_takes_passes(request_: GenerateRequest) -> None:
    check_request(request_, LIMITS, SERVER)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (replace(SOUND, input_ids=(1, 100)), "token 100; the vocabulary ends at 99"),
        (replace(SOUND, sampling=SamplingParams(48)), "do not fit into the server's context of 50"),
        (replace(SOUND, sampling=SamplingParams(8, top_k=0)), "top_k"),
        (replace(SOUND, extra={"stream": True}), "extra.stream is set by Millrace"),
        (replace(SOUND, extra={"cache_slat": "s"}), "would ignore extra.cache_slat.*did you mean cache_salt"),
        (replace(SOUND, extra={"sampling_params": {"n": 2}}), "extra.sampling_params.n is set by Millrace"),
        (replace(SOUND, extra={"sampling_params": {"bad_wrods": []}}), "did you mean bad_words"),
        (replace(SOUND, extra={"sampling_params": {"min_tokens": 2}}), "min_tokens is set by Millrace"),
        (replace(SOUND, sampling=SamplingParams(8, logit_bias={100: 1.0})), "logit_bias has token 100"),
        (replace(SOUND, extra={"content_parts": []}, prompt_logprobs=True), "prompts of text"),
        (replace(SOUND, extra={"sampling_params": 3}), "must be a mapping"),
        (replace(SOUND, images=(PNG,)), "takes no images"),
    ],
)
def test_a_request_that_the_server_would_ignore_or_die_of_is_refused(request_: GenerateRequest, says: str) -> None:
    with pytest.raises(InvalidStateError, match=says):
        check_request(request_, LIMITS, SERVER)


def test_images_are_given_once() -> None:
    limits = replace(LIMITS, image_token=7)
    request = replace(SOUND, input_ids=(7, 2), images=(PNG,))
    check_request(request, limits, SERVER)
    with pytest.raises(InvalidStateError, match="in images or in extra"):
        check_request(replace(request, extra={"content_parts": []}), limits, SERVER)


def test_logprobs_of_another_temperature_are_refused() -> None:
    raw = replace(SERVER, logprobs_mode="raw_logprobs")
    for temperature in (0.0, 1.0):
        check_request(replace(SOUND, sampling=SamplingParams(8, temperature=temperature)), LIMITS, raw)
    with pytest.raises(InvalidStateError, match="processed_logprobs"):
        check_request(replace(SOUND, sampling=SamplingParams(8, temperature=0.7)), LIMITS, raw)
    with pytest.raises(InvalidStateError, match="processed_logprobs"):
        check_request(replace(SOUND, sampling=SamplingParams(8, repetition_penalty=1.1)), LIMITS, raw)


@pytest.mark.parametrize(
    ("names", "on_cpu", "fine"),
    [
        (["model.embed_tokens.weight", "lm_head.weight"], True, True),
        (["model.embed_tokens.weight"], True, False),
        (["model.embed_tokens.weight"], False, True),
        (["lm_head.weight", "model.layers.0.mlp.experts.0.up_proj.weight"], True, False),
    ],
)
def test_a_reload_that_would_be_wrong_is_refused(names: list[str], on_cpu: bool, fine: bool) -> None:
    model, server = Model(100, dict.fromkeys(names, (2, 2))), replace(SERVER, on_cpu=on_cpu)
    if fine:
        check_reload(model, server)
    else:
        with pytest.raises(InvalidStateError, match="own reload"):
            check_reload(model, server)
