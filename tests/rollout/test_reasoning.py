"""How a turn is split into reasoning and answer. All functions are pure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.rollout.reasoning import Reasoning

THINK = Reasoning("<think>", "</think>")
OPENED = Reasoning("<think>", "</think>", opened=True)
PLAIN = st.text(alphabet="ab #<>/\n", max_size=8)  # contains no marker


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 12", "#### 12"),
        ("<think>#### 9</think>\n#### 12", "\n#### 12"),
        ("<think>#### 9", ""),
        ("#### 9 <think> or", ""),
        ("a<think>#### 9</think>b<think>#### 8</think>c", "abc"),
        ("#### 9</think>#### 12", "#### 12"),  # the opening marker was in the prompt
        ("<think>a<think>b</think>#### 9</think>#### 12", "#### 12"),
        ("<think></think>", ""),
    ],
)
def test_text_outside_the_reasoning_counts(text: str, answer: str) -> None:
    assert THINK.answer(text) == answer


def test_a_turn_that_begins_inside_the_reasoning() -> None:
    assert OPENED.answer("#### 9") == ""
    assert OPENED.answer("#### 9\n</think>\n\n#### 12") == "\n\n#### 12"
    assert OPENED.answer("<think>#### 9</think>#### 12") == "#### 12"


@given(PLAIN, st.lists(st.tuples(PLAIN, PLAIN)), st.booleans())
def test_closed_reasoning_is_removed_and_all_else_stays(first: str, rest: list[tuple[str, str]], opened: bool) -> None:
    blocks = "".join(f"<think>{thought}</think>{said}" for thought, said in rest)
    answer = first + "".join(said for _, said in rest)
    assert THINK.answer(first + blocks) == answer
    assert THINK.answer(f"{first}{blocks}<think>{first}") == ""
    assert OPENED.answer(f"thought</think>{first}{blocks}") == answer


@given(st.text())
def test_a_model_that_does_not_reason_is_not_touched(text: str) -> None:
    if "<think>" not in text and "</think>" not in text:
        assert THINK.answer(text) == text
