"""How a judge's grade is read. Pure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.config.models import JudgeConfig
from millrace.rollout.judge import read_grade


@given(
    st.lists(st.sampled_from(["it is", " Grade: 7", "grade 10.5", "\n**Grade:** 3.5", "GRADE = 12", "Grade: x", "11"])),
    st.sampled_from([10.0, 11.0]),
)
def test_the_last_grade_counts_if_it_can_be_one(parts: list[str], best: float) -> None:
    numbers = {" Grade: 7": 7.0, "grade 10.5": 10.5, "\n**Grade:** 3.5": 3.5, "GRADE = 12": 12.0}
    given_grades = [numbers[part] for part in parts if part in numbers]
    grade = read_grade(" and ".join(parts), JudgeConfig.model_fields["verdict"].default, best)
    if not given_grades or given_grades[-1] > best:
        assert grade is None
    else:
        assert grade == pytest.approx(given_grades[-1] / best)


def test_a_group_that_holds_no_number_is_no_grade() -> None:
    assert read_grade("Verdict: good", r"Verdict: (\w+)", 10) is None
    assert read_grade("Verdict: nan", r"Verdict: (\w+)", 10) is None
    assert read_grade("Verdict: inf", r"Verdict: (\w+)", 10) is None
