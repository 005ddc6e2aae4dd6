"""How a judge's grade is read."""

from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.config.engines import EmbeddedEngineConfig
from millrace.config.models import JudgeConfig
from millrace.config.sources import TinyModelConfig
from millrace.fleet.event_log import EventLog
from millrace.fleet.fleet import Fleet
from millrace.rollout.chat import check_chat_format
from millrace.rollout.judge import Judge, read_grade
from millrace.rollout.sample import Problem
from millrace.train.tiny import make_tiny_tokenizer
from millrace.types import FinishReason, GenerateRequest, Generation, RoutingContext, VersionSpan


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


class SaysOnly:
    """Takes the place of a judge's fleet. Every engine answers with this text."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.event_log, self.context_length = tokens, EventLog(), 1000

    async def generate(
        self, request: GenerateRequest, *, deadline: float, routing: RoutingContext, retries: int
    ) -> Generation:
        logprobs, version_spans = np.zeros(len(self.tokens), np.float32), (VersionSpan(0, 0, len(self.tokens)),)
        made = len(request.input_ids)
        return Generation(request.request_id, self.tokens, logprobs, FinishReason.STOP, version_spans, made, 0)


@pytest.mark.parametrize(
    ("said", "grade", "unread"),
    [
        ("<think>Grade: 2? No.</think>Grade: 8", 0.8, 0),
        ("<think>Grade: 2</think>It is good.", 0.0, 1),
        ("<think>Grade: 2, or", 0.0, 1),
        ("Grade: 8", 0.8, 0),
    ],
)
async def test_a_grade_inside_the_judges_reasoning_does_not_count(said: str, grade: float, unread: int) -> None:
    chat = check_chat_format(make_tiny_tokenizer(), "judge")
    config = JudgeConfig(
        model=TinyModelConfig(kind="tiny"), engine=EmbeddedEngineConfig(kind="embedded"), max_new_tokens=64
    )
    judge = Judge(cast(Fleet, SaysOnly(*chat.turn(said))), chat, config, retries=0)
    assert await judge.grade(Problem.of_question("p", "How many?", "12"), "#### 12", deadline=60) == grade
    assert judge.counts.unread == unread


def test_a_group_that_holds_no_number_is_no_grade() -> None:
    assert read_grade("Verdict: good", r"Verdict: (\w+)", 10) is None
    assert read_grade("Verdict: nan", r"Verdict: (\w+)", 10) is None
    assert read_grade("Verdict: inf", r"Verdict: (\w+)", 10) is None


@pytest.mark.parametrize(
    ("said", "grade"),
    [("Grade: 7/10", 0.7), ("**Grade: 7**", 0.7), ("Grade: **7**/10.", 0.7), ("Grade: 7 / 10", 0.7),
     ("Grade: 7, since", 0.7), ("Grade: \\boxed{7}", 0.7), ("Grade: .5", 0.05), ("Grade: 7\u2009", 0.7),
     ("Grade: 1e1", 1.0), ("Grade: 1/2", None),
     ("Grade: -5", None), ("Grade: \u22125", None), ("Grade: 1,5", None), ("Grade: 1,000", None), ("Grade: 7-8", None),
     ("Grade: 7 or 8", None), ("Grade: 7 to 8", None), ("Grade: 8.5.2", None), ("Grade: 7/8/10", None),
     ("Grade: 5\nGrade: 1.5e3", None), ("Grade: 9/5", None), ("Grade: 10x", None)],
)  # fmt: skip
def test_no_part_of_a_grade_is_the_grade(said: str, grade: float | None) -> None:
    found = read_grade(said, JudgeConfig.model_fields["verdict"].default, 10)
    assert found == (None if grade is None else pytest.approx(grade))
