"""The rule reward compares numbers, not texts."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import DataError
from millrace.rollout.reward import final_number, rule_reward


@pytest.mark.parametrize(
    ("text", "answer"),
    [("#### 7", "7"), ("#### 7.0<|im_end|>", "7"), ("#### 7", "7.00"), ("So it is\n#### 1,234", "1234"),
     ("#### 3\nno:\n#### 4", "4"), ("####-5", "-5"), ("#### $18.", "18"), ("#### -$3", "-3"), ("#### .5", "0.50"),
     ("#### 84 apples", "84")],
)  # fmt: skip
def test_right(text: str, answer: str) -> None:
    assert rule_reward(text, answer) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [("", "7"), ("7", "7"), ("#### ", "7"), ("#### seven", "7"), ("#### 77", "7"), ("#### 7 #### x", "7"),
     ("### 7", "7"), ("#### 7.01", "7"), ("#### 5", "-5"), ("####\n\n#### -", "7"), ("#### 1 234", "1234")],
)  # fmt: skip
def test_wrong(text: str, answer: str) -> None:
    assert rule_reward(text, answer) == 0.0


def test_an_answer_that_is_no_number_says_so() -> None:
    with pytest.raises(DataError, match="the answer 'blue' is not a number"):
        rule_reward("#### 7", "blue")


@given(st.integers(-(10**9), 10**9))
def test_thousands_separators_and_decimals_change_nothing(number: int) -> None:
    assert rule_reward(f"#### {number:,}", str(number)) == 1.0
    assert rule_reward(f"#### {number}.0", str(number)) == 1.0
    assert rule_reward(f"#### {number + 1}", str(number)) == 0.0


@given(st.text())
def test_any_text_has_a_number_or_none(text: str) -> None:
    number = final_number(f"####{text}")
    assert number is None or isinstance(number, Fraction)
