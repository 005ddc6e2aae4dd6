"""Requests to vLLM and the meaning of its answers. tests/conformance shows that real servers speak like this."""

import base64
import io
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.engines.experts import Experts
from millrace.engines.vllm.metrics import read_metrics
from millrace.engines.vllm.wire import COMPLETIONS, GENERATE, Answer, encode, wire_id
from millrace.types import FinishReason, GenerateRequest, Generation, SamplingParams, VersionSpan

REQUEST = GenerateRequest((1, 2, 3), SamplingParams(8, temperature=0.5, seed=7), request_id="r")


def choice(path: str, ids: list[int], finish: str | None = None, **more: object) -> dict[str, Any]:
    logprobs: object = {"content": [{"token_id": i, "logprob": -i / 8} for i in ids]}
    if path == COMPLETIONS:
        logprobs = {"token_logprobs": [-i / 8 for i in ids]}
    return {"choices": [{"token_ids": ids, "finish_reason": finish, "logprobs": logprobs, **more}]}


def answered(path: str, *bodies: dict[str, Any]) -> Generation:
    answer = Answer()
    for body in bodies:
        answer.take(path, body)
    return answer.generation(REQUEST, 4)


def test_both_forms_ask_the_same() -> None:
    tokens, completions = encode(GENERATE, REQUEST), encode(COMPLETIONS, REQUEST)
    assert (tokens["token_ids"], completions["prompt"]) == (REQUEST.input_ids, REQUEST.input_ids)
    sampling = tokens["sampling_params"]
    assert isinstance(sampling, dict)
    assert {name: completions[name] for name in sampling if name != "detokenize"} == {
        name: value for name, value in sampling.items() if name != "detokenize"
    }
    assert (sampling["max_tokens"], sampling["temperature"], sampling["seed"], sampling["top_k"]) == (8, 0.5, 7, -1)


def test_a_lora_adapter_is_a_model_and_extra_passes() -> None:
    request = GenerateRequest(
        (1,),
        SamplingParams(1),
        request_id="r",
        extra={"lora_path": "a", "priority": 3, "sampling_params": {"bad_words": ["x"]}},
    )
    body = encode(GENERATE, request)
    sampling = body["sampling_params"]
    assert isinstance(sampling, dict)
    assert (body["model"], body["priority"], sampling["bad_words"]) == ("a", 3, ["x"])
    assert "lora_path" not in body


def test_what_changes_the_distribution_is_sent_and_the_prompt_can_be_scored() -> None:
    sampling = SamplingParams(8, stop=("a", "b"), min_new_tokens=2, presence_penalty=0.5, logit_bias={7: -1.5})
    for path in (GENERATE, COMPLETIONS):
        body: Any = encode(path, GenerateRequest((1, 2), sampling, prompt_logprobs=True))
        params = body["sampling_params"] if path == GENERATE else body
        assert (params["stop"], params["min_tokens"], params["presence_penalty"]) == (("a", "b"), 2, 0.5)
        assert (params["logit_bias"], params["prompt_logprobs"]) == ({"7": -1.5}, 0)
        assert params.get("detokenize", True)
    scored = [None, {"2": {"logprob": -1.5}, "9": {"logprob": -0.1}}, {"3": {"logprob": -9999.0}}]
    request = replace(REQUEST, prompt_logprobs=True)
    for path, where in ((GENERATE, "body"), (COMPLETIONS, "choice")):
        answer, one = Answer(), choice(path, [5], "length")["choices"][0]
        body = {"choices": [one | ({"prompt_logprobs": scored} if where == "choice" else {})]}
        answer.take(path, body | ({"prompt_logprobs": scored} if where == "body" else {}))
        made = answer.generation(request, 1).prompt_logprobs
        assert made is not None
        np.testing.assert_array_equal(made, np.array([np.nan, -1.5, np.nan], np.float32))
        assert answer.generation(REQUEST, 1).prompt_logprobs is None


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS])
@given(st.lists(st.integers(0, 500), max_size=12), st.data())
def test_a_stream_comes_to_what_one_answer_would_be(path: str, ids: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    pieces = [ids[begin:end] for begin, end in pairwise([0, *cuts, len(ids)])]
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}}
    streamed = answered(path, *(choice(path, piece) for piece in pieces), choice(path, [], "length"), usage)
    whole = answered(path, {**choice(path, ids, "length"), "usage": usage["usage"]})
    assert streamed.output_ids == whole.output_ids == tuple(ids)
    assert streamed.logprobs.tolist() == whole.logprobs.tolist() == [-i / 8 for i in ids]
    assert (streamed.finish_reason, streamed.cached_tokens) == (FinishReason.LENGTH, 2)
    assert streamed.version_spans == whole.version_spans == ((VersionSpan(4, 0, len(ids)),) if ids else ())


def test_the_versions_that_a_server_reports_are_used() -> None:
    spans = [{"version": "6", "start": 0, "end": 1}, {"version": "default", "start": 1, "end": 3}]
    made = answered(GENERATE, choice(GENERATE, [5, 6, 7], "stop", weight_versions=spans))
    assert made.version_spans == (VersionSpan(6, 0, 1), VersionSpan(None, 1, 3))


def test_a_stream_without_an_end_was_aborted() -> None:
    assert answered(GENERATE, choice(GENERATE, [5])).finish_reason is FinishReason.ABORT


def test_fields_that_millrace_does_not_use_are_passed_on() -> None:
    made = answered(GENERATE, choice(GENERATE, [5], "stop", routed_experts="...", sampling_mask=None, stop_reason=5))
    assert made.extra == {"routed_experts": "...", "stop_reason": 5}


def test_routed_experts_are_decoded_at_the_end_of_an_answer() -> None:
    table = np.arange(16, dtype=np.uint8).reshape(4, 2, 2) % 4
    file = io.BytesIO()
    np.save(file, table)
    text = base64.b64encode(file.getvalue()).decode()
    answer, experts = Answer(), Experts(layers=(1,), decoder_layers=2, count=4)
    answer.take(GENERATE, choice(GENERATE, [5, 6]))
    assert answer.generation(REQUEST, 4, experts).routed_experts is None
    answer.take(GENERATE, choice(GENERATE, [], "length", routed_experts=text))
    made = answer.generation(REQUEST, 4, experts)
    assert made.routed_experts is not None
    assert made.routed_experts.tolist() == table[:, 1:].tolist()
    assert made.extra == {}
    later = encode(GENERATE, replace(REQUEST, routed_experts_start=2))["sampling_params"]
    assert isinstance(later, dict)
    assert later["routed_experts_prompt_start"] == 2


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [{"token_ids": [1], "finish_reason": "stop", "logprobs": None}]},
        {"choices": [{"token_ids": [1], "finish_reason": "bored", "logprobs": {"content": [{"logprob": 0.0}]}}]},
        {"choices": [{"token_ids": [1]}]},
        {"object": "error"},
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error(body: dict[str, Any]) -> None:
    with pytest.raises((KeyError, ValueError)):
        answered(GENERATE, body)


def test_the_servers_id_of_a_request() -> None:
    assert wire_id(GENERATE, "r#1") == "generate-tokens-r#1"
    assert wire_id(COMPLETIONS, "r#1") == "cmpl-r#1-0"


def test_metrics_are_summed_over_their_labels() -> None:
    text = (
        '# HELP x\nvllm:running{engine="0",why="a b"} 2.0\nvllm:running{engine="1"} 3.0\nprocess_fds 7\nvllm:e 1e-1\n'
    )
    assert read_metrics(text) == {"running": 5.0, "e": 0.1}


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS])
@pytest.mark.parametrize("logprob", [-9999.0, None, float("nan")])
def test_a_logprob_that_is_no_number_is_nan(path: str, logprob: float | None) -> None:
    body = choice(path, [5, 6], "stop")
    logprobs = body["choices"][0]["logprobs"]
    if path == COMPLETIONS:
        logprobs["token_logprobs"][1] = logprob
    else:
        logprobs["content"][1]["logprob"] = logprob
    assert np.isnan(answered(path, body).logprobs).tolist() == [False, True]
