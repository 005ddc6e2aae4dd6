"""A judge: a frozen model, with engines of its own, that is asked how good an answer is."""

import asyncio
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from millrace.config.models import JudgeConfig
from millrace.errors import DataError, EngineError, JudgeError, NoEngineError
from millrace.fleet.fleet import Fleet
from millrace.rollout.agent import AbortedGeneration, last_answer
from millrace.rollout.attempts import Attempts, generate_whole
from millrace.rollout.chat import ChatFormat
from millrace.rollout.numbers import parse_number
from millrace.rollout.reward import rule_reward
from millrace.rollout.sample import Group, Problem, Sample, SampleStatus
from millrace.types import GenerateRequest, Generation, RoutingContext, SamplingParams

AFTER_GRADE = ".,;:!?)*_`\"'"  # what may stand right behind a grade and is no part of it


@dataclass(slots=True)
class JudgeCounts:
    """`unread`: answers of the judge in which no grade was found, which count as grade 0. `total`: of all grades."""

    graded: int = 0
    unread: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float | None:
        return self.total / self.graded if self.graded else None

    def count(self, grade: float | None) -> None:
        self.graded += 1
        self.unread += grade is None
        self.total += grade or 0.0

    def clear(self) -> None:
        self.graded, self.unread, self.total = 0, 0, 0.0


@dataclass(frozen=True, slots=True)
class Judge:
    """Asks the engines of `fleet`, whose model writes a conversation as `chat`. A Reward: its grade, or by
    `config.weight` that and the rule reward. `retries`: engines that it may lose over one answer."""

    fleet: Fleet
    chat: ChatFormat
    config: JudgeConfig
    retries: int
    counts: JudgeCounts = field(default_factory=JudgeCounts)
    _numbers: Iterator[int] = field(default_factory=itertools.count, init=False)

    async def __call__(self, problem: Problem, text: str, *, deadline: float) -> float:
        grade, weight = await self.grade(problem, text, deadline=deadline), self.config.weight
        return weight * grade + (1 - weight) * rule_reward(text, problem.answer)

    async def grade(self, problem: Problem, text: str, *, deadline: float) -> float:
        """From 0 to 1, of the answer in a model's last turn. Raises JudgeError where no engine of the judge's answers
        within `deadline` seconds, or it loses more than `retries` of them, or the text is too long for it."""
        try:
            async with asyncio.timeout(deadline):
                said = await self._ask(self.prompt(problem, text), problem.problem_id, deadline)
        except TimeoutError:
            raise JudgeError(f"the judge did not grade it within {deadline:.1f} s") from None
        except (EngineError, NoEngineError, AbortedGeneration) as error:
            raise JudgeError(f"the judge did not grade it: {error}") from error
        grade = read_grade(said, self.config.verdict, self.config.best)
        self.counts.count(grade)
        return grade or 0.0

    def prompt(self, problem: Problem, text: str) -> tuple[int, ...]:
        """What it is asked, as token ids. Control tokens in the texts stay text: a model can't end its turn in the
        judge's prompt and grade itself."""
        texts = {"question": problem.question, "answer": text, "reference": problem.answer}
        return self.chat.prompt(self.config.template.format(**texts))

    def require_room(self, problems: Sequence[Problem]) -> None:
        """Raises DataError where a question leaves no room for any answer."""
        for problem in problems:
            if self._lacks_room(length := len(self.prompt(problem, ""))):
                raise DataError(
                    f"the judge's prompt for problem {problem.problem_id} has {length} tokens before any answer, and "
                    f"with judges.max_new_tokens ({self.config.max_new_tokens}) fills its context of "
                    f"{self.fleet.context_length}; lower judges.max_new_tokens, take a judge with a longer context, "
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
        now = asyncio.get_running_loop().time
        ends = now() + deadline
        sampling = SamplingParams(self.config.max_new_tokens, temperature=0.0, stop_token_ids=(self.chat.end_of_turn,))
        request = GenerateRequest(f"judge/{next(self._numbers)}", prompt, sampling)
        routing = RoutingContext(group=problem_id)  # the answers to one question share what comes before them

        async def send(request: GenerateRequest) -> Generation:
            return await self.fleet.generate(request, deadline=ends - now(), routing=routing)

        made = await generate_whole(request, send, Attempts(self.retries, self.fleet.event_log))
        return self.chat.answer(made.output_ids)


async def grade_in_turn(
    judge: Judge, groups: Sequence[Group], chat: ChatFormat, *, deadline: float
) -> tuple[list[Group], list[Sample]]:
    """Wakes a judge that shares its memory with others, has it grade these groups, whose model writes as `chat`, and
    puts it to sleep again. A sample that it does not grade within `deadline` seconds comes back among the second,
    FAILED, and its group is without it."""
    await judge.fleet.restore(deadline=judge.config.engine.start_timeout)  # it reads its weights as at its start

    async def graded(sample: Sample) -> Sample:
        assert sample.episode is not None
        try:
            reward = await judge(sample.problem, last_answer(sample.episode, chat), deadline=deadline)
        except JudgeError as error:
            return replace(sample, status=SampleStatus.FAILED, episode=None, reward=0.0, reason=str(error))
        return replace(sample, reward=reward)

    async with asyncio.TaskGroup() as tasks:
        pending = [[tasks.create_task(graded(sample)) for sample in group.samples] for group in groups]
    await judge.fleet.sleep()
    left: list[Group] = []
    failed: list[Sample] = []
    for group, ended in zip(groups, pending, strict=True):
        samples = [task.result() for task in ended]
        failed += [sample for sample in samples if sample.status is SampleStatus.FAILED]
        if finished := tuple(sample for sample in samples if sample.status is SampleStatus.FINISHED):
            left.append(replace(group, samples=finished))
    return left, failed


def read_grade(said: str, verdict: str, best: float) -> float | None:
    """From 0 to 1; None where the judge gave none from 0 to `best`. What it says last counts: it reasons first. The
    group of `verdict` must be one number and nothing else, with or without `/BEST` behind it."""
    found = re.findall(verdict, said)
    grade, slash, out_of = found[-1].rstrip(AFTER_GRADE).partition("/") if found else ("", "", "")
    number = parse_number(grade.rstrip(AFTER_GRADE))
    if number is None or not 0 <= number <= best or (slash and parse_number(out_of) != best):
        return None
    return float(number) / best
