"""One sample, from its problem to its reward: every end it can have, exactly one of them."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from millrace.config.models import RolloutConfig
from millrace.errors import DataError, EngineFailed, EngineRefused, EngineTimeout, EngineUnreachable
from millrace.fleet.fleet import Fleet
from millrace.rollout.agent import AbortedGeneration, EpisodeLimits, last_turn, run_episode
from millrace.rollout.chat import ChatFormat
from millrace.rollout.continuation import Attempts, generate_whole
from millrace.rollout.reward import rule_reward
from millrace.rollout.sample import Problem, Sample, SampleStatus
from millrace.rollout.tools import Tool, ToolAnswer
from millrace.types import GenerateRequest, Generation, SamplingParams


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

    fleet: Fleet
    chat: ChatFormat
    tools: Mapping[str, Tool]
    limits: EpisodeLimits
    sampling: SamplingParams
    timeout: float
    retries: int
    partial: bool = True  # what an engine had made when it died or gave up stays, and another makes the rest
    tool_counts: ToolCounts = field(default_factory=ToolCounts)

    def prompt(self, problem: Problem) -> tuple[int, ...]:
        return self.chat.prompt(problem.question, [tool.schema for tool in self.tools.values()])

    async def run(self, sample_id: str, group_id: str, problem: Problem) -> Sample:
        """The sample, ended. A failure of its own (an engine that died under it more often than `retries`, its
        deadline, an engine that refuses it) is its status; NoEngineError, which would fail every sample, is raised."""
        ends = time.monotonic() + self.timeout
        attempts = Attempts(self.retries, self.fleet.journal)
        while True:
            try:
                async with asyncio.timeout(ends - time.monotonic()):
                    return await self._play(sample_id, group_id, problem, attempts, ends)
            except (EngineUnreachable, EngineFailed, AbortedGeneration) as error:
                try:
                    attempts.spend(error, continued=False)
                except (EngineUnreachable, EngineFailed, AbortedGeneration):
                    reason = f"gave up after {attempts.used + 1} attempts: {error}"
                    return _failed(sample_id, group_id, problem, reason)
            except (TimeoutError, EngineTimeout):
                return _failed(sample_id, group_id, problem, f"not done within {self.timeout:g} s")
            except (EngineRefused, DataError) as error:
                return _failed(sample_id, group_id, problem, str(error))

    async def _play(self, sample_id: str, group_id: str, problem: Problem, attempts: Attempts, ends: float) -> Sample:
        # An id of its own for each attempt: the engine may still hold the one before.
        attempt_id = f"{sample_id}.{attempts.used}" if attempts.used else sample_id

        async def send(request: GenerateRequest) -> Generation:
            return await self.fleet.generate(request, deadline=max(ends - time.monotonic(), 0.0))

        async def generate(request: GenerateRequest) -> Generation:
            return await generate_whole(request, send, attempts, ends=ends) if self.partial else await send(request)

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
        reward = rule_reward(self.chat.decode(last_turn(episode)), problem.answer)
        return Sample(sample_id, group_id, problem, SampleStatus.FINISHED, episode, reward)


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
