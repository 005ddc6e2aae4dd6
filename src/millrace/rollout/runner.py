"""One sample, from its problem to its reward: every end it can have, exactly one of them."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from millrace.config.models import RolloutConfig
from millrace.continuation import call_id
from millrace.errors import (
    DataError,
    EngineFailed,
    EngineRefused,
    EngineTimeout,
    EngineUnreachable,
    JudgeError,
    LocalError,
    NonFiniteLogprobs,
)
from millrace.fleet.client import FleetClient
from millrace.rollout.agent import AbortedGeneration, EpisodeLimits, last_answer, run_episode
from millrace.rollout.attempts import Attempts, Send, generate_whole
from millrace.rollout.chat import ChatFormat
from millrace.rollout.reward import Reward, by_rule
from millrace.rollout.sample import Problem, Sample, SampleStatus
from millrace.rollout.tools import Tool, ToolAnswer
from millrace.types import GenerateRequest, Generation, RoutingContext, SamplingParams

PROVEN_SECONDS = 1.0  # after which a request is unlikely to kill its engine: a poisonous prompt does when it is read


@dataclass(slots=True)
class ToolCounts:
    """How often tools were called, and how often a call went wrong."""

    calls: int = 0
    errors: int = 0

    def count(self, answer: ToolAnswer) -> None:
        self.calls += 1
        self.errors += answer.failed


@dataclass(frozen=True, slots=True)
class SampleRunner:
    """Plays samples on a fleet, with what they all share."""

    fleet: FleetClient
    chat: ChatFormat
    tools: Mapping[str, Tool]
    limits: EpisodeLimits
    sampling: SamplingParams
    timeout: float
    retries: int
    partial: bool = True  # what an engine had made when it died or gave up stays, and another makes the rest
    reward: Reward = by_rule
    tool_counts: ToolCounts = field(default_factory=ToolCounts)
    last_chance: asyncio.Lock = field(default_factory=asyncio.Lock)

    def prompt(self, problem: Problem) -> tuple[int, ...]:
        return self.chat.prompt(problem.question)

    async def run(self, sample_id: str, group_id: str, problem: Problem) -> Sample:
        """The sample, ended. A failure of its own (an engine that died under it more often than `retries`, its
        deadline, an engine that refuses it, weights that give NaN) is its status; NoEngineError, which would fail every
        sample, is raised."""
        try:
            async with asyncio.timeout(self.timeout) as timer:
                return await self._try(sample_id, group_id, problem, timer)
        except (TimeoutError, EngineTimeout):
            return _failed(sample_id, group_id, problem, f"not done within {self.timeout:g} s")
        except (EngineRefused, NonFiniteLogprobs, DataError, JudgeError) as error:
            return _failed(sample_id, group_id, problem, str(error))

    async def _try(self, sample_id: str, group_id: str, problem: Problem, timer: asyncio.Timeout) -> Sample:
        attempts = Attempts(self.retries, self.fleet.event_log)
        while True:
            try:
                return await self._play(sample_id, group_id, problem, attempts, timer)
            except (EngineUnreachable, EngineFailed, LocalError, AbortedGeneration) as error:
                try:
                    attempts.spend(error, continued=False)
                except (EngineUnreachable, EngineFailed, LocalError, AbortedGeneration):
                    reason = f"gave up after {attempts.used + 1} attempts: {error}"
                    return _failed(sample_id, group_id, problem, reason)

    async def _play(
        self, sample_id: str, group_id: str, problem: Problem, attempts: Attempts, timer: asyncio.Timeout
    ) -> Sample:
        attempt_id = call_id(sample_id, attempts.used) if attempts.used else sample_id
        routing = RoutingContext(session=sample_id, group=group_id)

        async def send(request: GenerateRequest) -> Generation:
            left = await self._time_left(timer)
            return await self.fleet.generate(request, deadline=left, routing=routing)

        async def send_with_care(request: GenerateRequest) -> Generation:
            last = attempts.used > 0 and not attempts.left
            return await self._in_turn(send, request, timer) if last else await send(request)

        async def generate(request: GenerateRequest) -> Generation:
            if not self.partial:
                return await send_with_care(request)
            return await generate_whole(request, send_with_care, attempts, interrupted=lambda: self.fleet.asleep)

        episode = await run_episode(
            attempt_id,
            self.prompt(problem),
            generate=generate,
            chat=self.chat,
            tools=self.tools,
            limits=self.limits,
            sampling=self.sampling,
            on_tool_answer=self.tool_counts.count,
        )
        ends = timer.when()
        assert ends is not None
        left = max(ends - asyncio.get_running_loop().time(), 0.0)
        timer.reschedule(None)  # the reward is late by its own clock, and says what it waited for
        reward = await self.reward(problem, last_answer(episode, self.chat), deadline=left)
        return Sample(sample_id, group_id, problem, SampleStatus.FINISHED, episode, reward)

    async def _in_turn(self, send: Send, request: GenerateRequest, timer: asyncio.Timeout) -> Generation:
        """Sends what may lose no engine more, one at a time, each until it has lived for PROVEN_SECONDS: a request that
        kills engines has taken others with it so far, and now it takes none."""
        task: asyncio.Task[Generation] | None = None
        try:
            async with self.last_chance:
                await self.fleet.serving(deadline=await self._time_left(timer))
                task = asyncio.ensure_future(send(request))
                await asyncio.wait({task}, timeout=PROVEN_SECONDS)
            return await task
        finally:
            if task is not None and not task.done():  # this was cancelled, and so is what runs on the engine
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _time_left(self, timer: asyncio.Timeout) -> float:
        """Seconds. The sample's time stands still while the fleet sleeps, since what a step left unfinished goes on
        after the training, and while the last engine is being started again."""
        now, ends = asyncio.get_running_loop().time, timer.when()
        assert ends is not None
        if self.fleet.interrupted:
            left = ends - now()
            timer.reschedule(None)
            await self.fleet.resumed()  # or until the scheduler gives the sample up
            timer.reschedule(ends := now() + left)
        return max(ends - now(), 0.0)


def sampling_params(config: RolloutConfig) -> SamplingParams:
    """How training samples are drawn."""
    return SamplingParams(
        max_new_tokens=config.max_turn_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
    )


def greedy(sampling: SamplingParams) -> SamplingParams:
    """The same without chance, for evaluation."""
    return replace(sampling, temperature=0.0, top_p=1.0, top_k=-1, min_p=0.0)


def _failed(sample_id: str, group_id: str, problem: Problem, reason: str) -> Sample:
    return Sample(sample_id, group_id, problem, SampleStatus.FAILED, None, 0.0, reason)
