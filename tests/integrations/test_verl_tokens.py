"""verl's sampling parameters and token outputs, without verl."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.integrations.verl.tokens import Limits, output_of, request_of
from millrace.types import FinishReason, Generation, SamplingParams, VersionSpan

LIMITS = Limits(prompt=100, response=50, context=256)


def generation(spans: tuple[VersionSpan, ...], finish_reason: FinishReason = FinishReason.STOP) -> Generation:
    tokens = tuple(range(spans[-1].end if spans else 0))
    return Generation("r", tokens, np.full(len(tokens), -0.5, np.float32), finish_reason, spans, 4, 2)


@given(st.integers(1, 400), st.none() | st.integers(1, 400))
def test_a_call_gets_at_least_one_token_and_never_more_than_the_context_holds(prompt: int, asked: int | None) -> None:
    if prompt >= LIMITS.context:
        with pytest.raises(ValueError, match=f"the prompt has {prompt} tokens"):
            LIMITS.of(prompt, asked)
        return
    limit = LIMITS.of(prompt, asked)
    assert 1 <= limit <= LIMITS.context - prompt
    if asked is not None:
        assert limit <= asked


def test_the_default_is_what_is_left_of_the_sample() -> None:
    assert LIMITS.of(80, None) == 50
    assert LIMITS.of(120, None) == 30
    assert LIMITS.of(200, None) == 1


def test_verl_s_parameters_become_millrace_s() -> None:
    params = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "logprobs": True,
        "stop_token_ids": [7],
        "max_tokens": 8,
    }
    request = request_of("id", [1, 2, 3], params, LIMITS, ignore_eos=True)
    assert request.input_ids == (1, 2, 3)
    assert request.request_id == "id"
    assert request.sampling == SamplingParams(8, temperature=0.7, top_p=0.9, stop_token_ids=(7,), ignore_eos=True)
    assert request.extra == {}


def test_other_parameters_go_to_the_engine() -> None:
    params = {"repetition_penalty": 1.1, "stop": ["\n"], "min_tokens": 2, "skip_special_tokens": False, "seed": None}
    request = request_of("id", [1], params, LIMITS, ignore_eos=False)
    assert request.sampling == SamplingParams(50, repetition_penalty=1.1, stop=("\n",), min_new_tokens=2)
    assert request.extra == {"sampling_params": {"skip_special_tokens": False}}


def test_an_output_names_the_steps_of_its_oldest_and_newest_weights() -> None:
    made = generation((VersionSpan(3, 0, 2), VersionSpan(4, 2, 5)))
    output = output_of(made, {2: 10, 3: 11, 4: 12}, logprobs=True)
    assert output["token_ids"] == [0, 1, 2, 3, 4]
    assert output["log_probs"] == [-0.5] * 5
    assert output["stop_reason"] == "completed"
    steps = {name: value for name, value in output["extra_fields"].items() if name.endswith("global_steps")}
    assert steps == {"global_steps": 11, "min_global_steps": 11, "max_global_steps": 12}


def test_an_aborted_output_without_tokens_has_the_newest_step() -> None:
    output = output_of(generation((), FinishReason.ABORT), {3: 11, 4: 12}, logprobs=False)
    assert output["stop_reason"] == "aborted"
    assert output["log_probs"] is None
    assert output["extra_fields"]["global_steps"] == 12


def test_weights_that_no_trainer_published_have_no_step() -> None:
    assert output_of(generation((VersionSpan(None, 0, 1),)), {}, logprobs=False)["extra_fields"]["global_steps"] is None
