"""A judge: a frozen model on its own engines that grades answers."""

import asyncio
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from millrace.config.models import JudgeConfig
from millrace.errors import DataError, EngineError, JudgeError, NoEngineError
from millrace.fleet.fleet import Fleet
from millrace.rollout.agent import last_answer
from millrace.rollout.chat import ChatFormat
from millrace.rollout.numbers import parse_number
from millrace.rollout.reward import reference
from millrace.rollout.sample import Group, Problem, Sample, SampleStatus
from millrace.types import FinishReason, GenerateRequest, RoutingContext, SamplingParams

AFTER_GRADE = ".,;:!?)*_`\"'"  # characters that may follow a grade directly and are not part of it


@dataclass(slots=True)
class JudgeCounts:
    """Statistics of a judge's grades.

    graded: how many answers were graded. unread: how many of the judge's replies had no grade; these count as grade 0.
    total: the sum of the grades.
    """

    graded: int = 0
    unread: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float | None:
        """The mean grade; None if there is none."""
        return self.total / self.graded if self.graded else None

    def count(self, grade: float | None) -> None:
        """Count a grade; None stands for a reply without one."""
        self.graded += 1
        self.unread += grade is None
        self.total += grade or 0.0

    def clear(self) -> None:
        """Set all counts to 0."""
        self.graded, self.unread, self.total = 0, 0, 0.0


@dataclass(frozen=True, slots=True)
class Judge:
    """A judge model, which grades answers.

    fleet: the judge's engines. chat: the chat format of its model. config: `weight` is the grade's share of the reward.
    retries: how many engines may fail during one grading.
    """

    fleet: Fleet
    chat: ChatFormat
    config: JudgeConfig
    retries: int
    counts: JudgeCounts = field(default_factory=JudgeCounts)
    _numbers: Iterator[int] = field(default_factory=itertools.count, init=False)

    def combine(self, grade: float, reward: float) -> float:
        """Return the weighted mean of a grade and the reward of the functions."""
        return self.config.weight * grade + (1 - self.config.weight) * reward

    async def grade(self, problem: Problem, text: str, *, deadline: float) -> float:
        """Return the grade, from 0 to 1, of a model's last turn.

        deadline: in seconds. Raises JudgeError if the deadline passes, more than `retries` engines fail, or the text is
        too long for the judge.
        """
        try:
            async with asyncio.timeout(deadline):
                reply = await self._ask(self.prompt(problem, text), problem.problem_id, deadline)
        except TimeoutError:
            raise JudgeError(f"the judge did not grade it within {deadline:.1f} s") from None
        except (EngineError, NoEngineError) as error:
            raise JudgeError(f"the judge did not grade it: {error}") from error
        grade = read_grade(reply, self.config.verdict, self.config.best)
        self.counts.count(grade)
        return grade or 0.0

    def prompt(self, problem: Problem, text: str) -> tuple[int, ...]:
        """Return the judge's prompt as token ids.

        Control tokens in the texts stay text, so a model can't end its turn in the judge's prompt and grade itself.
        """
        texts = {"question": problem.question, "answer": text, "reference": reference(problem.answer or "")}
        return self.chat.prompt(self.config.template.format(**texts))

    def require_room(self, problems: Sequence[Problem]) -> None:
        """Raise DataError if a question leaves no room for an answer in the judge's context."""
        for problem in problems:
            if self._lacks_room(length := len(self.prompt(problem, ""))):
                raise DataError(
                    f"the judge's prompt for problem {problem.problem_id} has {length} tokens before any answer, and "
                    f"with judges.max_new_tokens ({self.config.max_new_tokens}) it exceeds the context of "
                    f"{self.fleet.context_length}; lower judges.max_new_tokens, use a judge with a longer context, "
                    "shorten judges.template, or drop the problem"
                )

    def _lacks_room(self, length: int) -> bool:
        return length + self.config.max_new_tokens > self.fleet.context_length

    async def _ask(self, prompt: tuple[int, ...], problem_id: str, deadline: float) -> str:
        if self._lacks_room(len(prompt)):
            raise JudgeError(
                f"the judge can't grade it: the prompt's {len(prompt)} tokens and judges.max_new_tokens "
                f"({self.config.max_new_tokens}) are more than its context of {self.fleet.context_length}"
            )
        sampling = SamplingParams(self.config.max_new_tokens, temperature=0.0, stop_token_ids=(self.chat.end_of_turn,))
        request = GenerateRequest(prompt, sampling, request_id=f"judge/{next(self._numbers)}")
        routing = RoutingContext(group=problem_id)  # the prompts for one question share a prefix
        generation = await self.fleet.generate(request, deadline=deadline, routing=routing, retries=self.retries)
        if generation.finish_reason is FinishReason.ABORT:
            raise JudgeError("the judge did not grade it: its engines aborted the request")
        return self.chat.answer(generation.output_ids)


async def grade_in_turn(
    judge: Judge, groups: Sequence[Group], chat: ChatFormat, *, deadline: float
) -> tuple[list[Group], list[Sample]]:
    """Wake a colocated judge, grade the groups, and put the judge to sleep again.

    chat: the chat format of the model that made the groups. deadline: seconds for each grade. Returns the groups with
    their rewards, without the samples that were not graded, and these samples, with status FAILED.
    """
    await judge.fleet.restore(deadline=judge.config.engine.start_timeout)  # which loads its weights again

    async def graded(sample: Sample) -> Sample:
        assert sample.episode is not None
        try:
            grade = await judge.grade(sample.problem, last_answer(sample.episode, chat), deadline=deadline)
        except JudgeError as error:
            return replace(sample, status=SampleStatus.FAILED, episode=None, reward=0.0, reason=str(error))
        return replace(sample, reward=judge.combine(grade, sample.reward), rewards={**sample.rewards, "judge": grade})

    async with asyncio.TaskGroup() as tasks:
        pending = [[tasks.create_task(graded(sample)) for sample in group.samples] for group in groups]
    await judge.fleet.sleep()
    rewarded: list[Group] = []
    failed: list[Sample] = []
    for group, ended in zip(groups, pending, strict=True):
        samples = [task.result() for task in ended]
        failed += [sample for sample in samples if sample.status is SampleStatus.FAILED]
        if finished := tuple(sample for sample in samples if sample.status is SampleStatus.FINISHED):
            rewarded.append(replace(group, samples=finished))
    return rewarded, failed


def read_grade(reply: str, verdict: str, best: float) -> float | None:
    """Return the grade in a judge's reply, divided by `best`; None if there is no grade from 0 to `best`.

    verdict: a regular expression whose group must be one number, with or without `/BEST` after it. The last match
    counts, because judges reason before they grade.
    """
    matches = re.findall(verdict, reply)
    grade, slash, out_of = matches[-1].rstrip(AFTER_GRADE).partition("/") if matches else ("", "", "")
    number = parse_number(grade.rstrip(AFTER_GRADE))
    if number is None or not 0 <= number <= best or (slash and parse_number(out_of) != best):
        return None
    return float(number) / best
