"""Token ids and sampling values that a caller may pass. Every form has one outcome, whatever the engine."""

from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

from millrace import GenerateRequest, LoraConfig, RoutingContext, SamplingParams
from millrace.engines.stock.state import InvalidStateError
from millrace.engines.stock.tokens import check_values
from millrace.errors import ArgumentError, MillraceError

FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "array of int32": lambda ids: np.array(ids, np.int32),
    "array of uint64": lambda ids: np.array(ids, np.uint64),
    "array [1, T]": lambda ids: np.array([ids]),
    "numpy's integers": lambda ids: [np.int64(i) for i in ids],
    "tensor": torch.tensor,
    "tensor of int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "tensor [1, T]": lambda ids: torch.tensor([ids]),
    "tensors of one element": lambda ids: [torch.tensor(i) for i in ids],
    "a row in a list": lambda ids: [ids],
    "a tensor in a list": lambda ids: [torch.tensor(ids)],
    "dict": lambda ids: {"input_ids": ids, "attention_mask": [1] * len(ids)},
    "BatchEncoding": lambda ids: BatchEncoding({"input_ids": ids}),
    "BatchEncoding of tensors": lambda ids: BatchEncoding({"input_ids": torch.tensor([ids])}),
    "UserDict": lambda ids: UserDict(input_ids=np.array([ids])),
}


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20), st.sampled_from(sorted(FORMS)))
def test_every_form_of_token_ids_is_the_same_request(ids: list[int], form: str) -> None:
    request = GenerateRequest(FORMS[form](ids), SamplingParams(4, stop_token_ids=FORMS[form](ids)), request_id="r")
    assert request == GenerateRequest(tuple(ids), SamplingParams(4, stop_token_ids=tuple(ids)), request_id="r")
    assert set(map(type, request.input_ids)) == {int}
    check_values(request)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ("Tom has", "input_ids is text, 'Tom has'; pass its token ids"),
        (b"Tom", "input_ids is text"),
        (None, r"input_ids must be a list, tuple, array or tensor of integers, and is None \(NoneType\)"),
        (5, "input_ids must be a list"),
        ({5, 6}, r"\(set\)"),
        (iter([5]), "list_iterator"),
        (torch.tensor(5), "and is tensor"),
        ((True, False), r"input_ids\[0\] is True \(bool\); token ids are integers"),
        ([1, np.True_], r"input_ids\[1\]"),
        (torch.tensor([True]), r"input_ids\[0\] is True"),
        ([torch.tensor(True)], r"input_ids\[0\]"),
        ((5.0,), r"input_ids\[0\] is 5.0 \(float\)"),
        (np.array([5.0]), r"input_ids\[0\] is 5.0"),
        (["5"], r"input_ids\[0\] is '5' \(str\)"),
        ([None], r"input_ids\[0\] is None"),
        ([[5], [6]], "input_ids holds 2 prompts; a request has one"),
        (torch.zeros((3, 2), dtype=torch.int64), "input_ids holds 3 prompts"),
        ({"ids": [5]}, "input_ids is a mapping without input_ids"),
        ("x" * 10**6, "^.{0,200}$"),
    ],
)
def test_wrong_token_ids_are_refused(ids: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says) as raised:
        GenerateRequest(ids, SamplingParams(4), request_id="r")
    assert isinstance(raised.value, MillraceError)
    with pytest.raises(ArgumentError):
        SamplingParams(4, stop_token_ids=ids)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": np.int64(3)},
        {"seed": np.uint32(7)},
        {"top_k": torch.tensor(5)},
        {"temperature": np.float32(0.5)},
        {"temperature": 1},
        {"ignore_eos": np.True_},
        {"stop_token_ids": [np.int64(3)]},
        {"stop_token_ids": []},
        {"stop": ["a", "b"]},
        {"min_new_tokens": np.int32(3)},
        {"repetition_penalty": 1, "frequency_penalty": np.float32(0.5), "presence_penalty": 0},
        {"logit_bias": {np.int64(3): np.float32(0.5), 4: 1}},
    ],
)
def test_numbers_of_numpy_are_numbers(fields: Any) -> None:
    sampling = SamplingParams(**{"max_new_tokens": 8, **fields})
    plain = (int, float, bool, tuple, dict, type(None))
    assert all(type(getattr(sampling, name)) in plain for name in sampling.__slots__)
    check_values(GenerateRequest((1,), sampling, request_id="r"))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 8.0},
        {"max_new_tokens": "8"},
        {"max_new_tokens": None},
        {"max_new_tokens": True},
        {"seed": 1.5},
        {"seed": True},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"temperature": None},
        {"top_p": np.nan},
        {"top_k": 2.5},
        {"ignore_eos": 1},
        {"ignore_eos": "no"},
        {"min_p": [0.1]},
        {"stop": "a"},
        {"stop": [3]},
        {"min_new_tokens": 1.5},
        {"repetition_penalty": None},
        {"frequency_penalty": float("nan")},
        {"logit_bias": [1]},
        {"logit_bias": {"3": 1.0}},
        {"logit_bias": {3: "x"}},
    ],
)
def test_a_wrong_sampling_value_names_its_field(fields: Any) -> None:
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        SamplingParams(**{"max_new_tokens": 8, **fields})


@pytest.mark.parametrize(
    ("ids", "fields"),
    [
        ((), {}),
        ((-1,), {}),
        ((2**31,), {}),
        ((2**70,), {}),
        ((1,), {"max_new_tokens": 0}),
        ((1,), {"max_new_tokens": -1}),
        ((1,), {"temperature": -1.0}),
        ((1,), {"temperature": float("inf")}),
        ((1,), {"top_p": 0.0}),
        ((1,), {"top_p": 1.1}),
        ((1,), {"top_k": 0}),
        ((1,), {"top_k": -2}),
        ((1,), {"top_k": 2**40}),
        ((1,), {"min_p": 1.1}),
        ((1,), {"seed": -1}),
        ((1,), {"seed": 2**63}),
        ((1,), {"seed": 2**64}),
        ((1,), {"stop_token_ids": (-1,)}),
        ((1,), {"stop": ("a", "")}),
        ((1,), {"min_new_tokens": -1}),
        ((1,), {"min_new_tokens": 9}),
        ((1,), {"min_new_tokens": 1, "stop": ("a",)}),
        ((1,), {"repetition_penalty": 0.0}),
        ((1,), {"repetition_penalty": 2.1}),
        ((1,), {"frequency_penalty": 2.1}),
        ((1,), {"presence_penalty": -2.1}),
        ((1,), {"logit_bias": {-1: 1.0}}),
        ((1,), {"logit_bias": {1: 100.5}}),
    ],
)
def test_a_request_that_no_engine_can_serve_is_refused_before_it_is_sent(ids: tuple[int, ...], fields: Any) -> None:
    request = GenerateRequest(ids, SamplingParams(**{"max_new_tokens": 8, **fields}), request_id="r")
    with pytest.raises(InvalidStateError, match=next(iter(fields), "input_ids")):
        check_values(request)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GenerateRequest((1,), SamplingParams(4), request_id=7), r"request_id must be text, and is 7 \(int\)"),  # type: ignore[arg-type]
        (lambda: GenerateRequest((1,), SamplingParams(4), request_id="\ud800"), "half a character"),
        (lambda: GenerateRequest((1,), {"max_new_tokens": 4}), r"write SamplingParams\(max_new_tokens=...\)"),  # type: ignore[arg-type]
        (lambda: GenerateRequest((1,), SamplingParams(4), continued_tokens=-1), "continued_tokens must be 0 or more"),
        (lambda: GenerateRequest((1,), SamplingParams(4), prompt_logprobs=1), "prompt_logprobs must be True or False"),  # type: ignore[arg-type]
        (lambda: GenerateRequest((1,), SamplingParams(4), request_id="r", extra=[1]), "extra must be a mapping"),  # type: ignore[arg-type]
        (lambda: RoutingContext(session=3), "session must be text"),  # type: ignore[arg-type]
        (lambda: RoutingContext(min_version="1"), "min_version must be an integer"),  # type: ignore[arg-type]
        (lambda: LoraConfig(8, 16.0, "q_proj"), r"target_modules must be a list.*write \['q_proj'\]"),  # type: ignore[arg-type]
        (lambda: LoraConfig(8.0, 16.0, ("q_proj",)), "rank must be an integer"),  # type: ignore[arg-type]
    ],
)
def test_other_wrong_arguments_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        make()


def test_requests_have_ids_of_their_own() -> None:
    ids = {GenerateRequest((1,), SamplingParams(4)).request_id for _ in range(100)}
    assert len(ids) == 100
    assert all(len(one) == 32 and one.isalnum() for one in ids)


def test_a_name_may_have_any_letters_and_has_an_end() -> None:
    check_values(GenerateRequest((1,), SamplingParams(4), request_id="r-é-\u2028/7"))
    for name in ("", "x" * 5000):
        with pytest.raises(InvalidStateError, match="request_id must have"):
            check_values(GenerateRequest((1,), SamplingParams(4), request_id=name))
