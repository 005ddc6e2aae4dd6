"""Runs one sample, from its problem to its reward. Every sample ends exactly once, with one status."""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import nullcontext
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
    LaunchError,
    LocalError,
    NonFiniteLogprobs,
    UserCodeError,
)
from millrace.fleet.attempts import Attempts, Send, generate_whole
from millrace.fleet.client import FleetClient
from millrace.rollout.agent import AbortedGeneration, EpisodeLimits, Generate, Turn, converse, last_answer, run_episode
from millrace.rollout.chat import ChatFormat
from millrace.rollout.environment import EnvironmentKind
from millrace.rollout.judge import Judge
from millrace.rollout.player import Player
from millrace.rollout.sample import Episode, EpisodeEnd, Message, Problem, Sample, SampleStatus, images_in, text_of
from millrace.rollout.scoring import Played, Rewards
from millrace.rollout.timings import Stopwatch
from millrace.rollout.toolbox import MakeTool, opened
from millrace.rollout.tools import ToolAnswer
from millrace.tracing import span, trace
from millrace.types import GenerateRequest, Generation, RoutingContext, SamplingParams

PROVEN_SECONDS = 1.0  # a request that runs this long is unlikely to kill its engine: bad prompts do so in the prefill


@dataclass(slots=True)
class ToolCounts:
    """How many tool calls there were, and how many of them failed."""

    calls: int = 0
    errors: int = 0

    def count(self, answer: ToolAnswer) -> None:
        """Count a tool call by its answer."""
        self.calls += 1
        self.errors += answer.failed


@dataclass(frozen=True, slots=True)
class SampleRunner:
    """Runs samples on a fleet, with the settings that all samples share.

    >>> runner = SampleRunner(fleet, chat, {"calculator": Calculator}, limits, sampling, timeout=300.0, retries=3)
    >>> sample = await runner.run("problem-7-0", "problem-7", problem)

    tools: what makes the tools of an episode, by the names that the model calls them by. timeout: seconds for one
    sample, without the time in which the fleet sleeps. retries: how many engine failures one sample survives. partial:
    whether a sample keeps its tokens when an engine fails, and another engine continues it. rewards: the functions that
    give the reward. judge: grades each sample as soon as it has ended; None if there is no judge, or it grades later.
    environment: plays the episodes in place of tools and rewards. player: plays whole samples, in place of tools.
    last_chance: the lock under which requests without a retry left are sent.
    """

    fleet: FleetClient
    chat: ChatFormat
    tools: Mapping[str, MakeTool]
    limits: EpisodeLimits
    sampling: SamplingParams
    timeout: float
    retries: int
    partial: bool = True
    rewards: Rewards = field(default_factory=Rewards)
    judge: Judge | None = None
    environment: EnvironmentKind | None = None
    player: Player | None = None
    tool_counts: ToolCounts = field(default_factory=ToolCounts)
    last_chance: asyncio.Lock = field(default_factory=asyncio.Lock)

    def prompt(self, problem: Problem) -> tuple[int, ...]:
        """Return the prompt of a problem as token ids, with one placeholder for each image."""
        return self.chat.prompt_of(problem.messages)

    async def run(self, sample_id: str, group_id: str, problem: Problem) -> Sample:
        """Run a sample to its end and return it.

        Failures that concern this sample become its status: more than `retries` engines failed, the timeout passed, an
        engine refused the request, or the weights gave NaN. Raises NoEngineError, which would fail every sample.
        """
        of = {"millrace.sample": sample_id, "millrace.group": group_id, "millrace.problem": problem.problem_id}
        watch = Stopwatch()
        with trace("sample", of, ratio_by=sample_id) as traced:
            sample = await self._run(sample_id, group_id, problem, watch)
            traced.set({"millrace.status": sample.status.value, "millrace.reward": sample.reward})
        return replace(sample, timings=watch.timings())

    async def _run(self, sample_id: str, group_id: str, problem: Problem, watch: Stopwatch) -> Sample:
        try:
            if self.player is not None:
                return await self._play_by(self.player, sample_id, group_id, problem, watch)
            async with asyncio.timeout(self.timeout) as timer:
                return await self._try(sample_id, group_id, problem, timer, watch)
        except (TimeoutError, EngineTimeout):
            return _failed(sample_id, group_id, problem, f"not done within {self.timeout:g} s")
        except (EngineRefused, NonFiniteLogprobs, DataError, JudgeError, UserCodeError) as error:
            return _failed(sample_id, group_id, problem, str(error))

    async def _play_by(
        self, player: Player, sample_id: str, group_id: str, problem: Problem, watch: Stopwatch
    ) -> Sample:
        """Play a sample once. The gateway retries requests whose engines fail, so what is raised is final."""
        try:
            played = await player.play(
                sample_id, problem, sampling=self.sampling, limits=self.limits, timeout=self.timeout
            )
        except (EngineUnreachable, EngineFailed, LocalError, LaunchError, AbortedGeneration) as error:
            return _failed(sample_id, group_id, problem, str(error))
        for name, seconds in played.seconds.items():
            watch.count(name, seconds)
        parts, reward = dict(played.parts), played.reward
        if reward is None:
            parts |= await self._parts(problem, played.episode, self.timeout, watch)
            reward = self._total(parts)
        finished = SampleStatus.FINISHED
        return Sample(
            sample_id,
            group_id,
            problem,
            finished,
            played.episode,
            reward,
            rewards=parts,
            branches=played.branches,
            counts=played.counts,
            prompt=(),
        )

    async def _try(
        self, sample_id: str, group_id: str, problem: Problem, timer: asyncio.Timeout, watch: Stopwatch
    ) -> Sample:
        attempts = Attempts(self.retries, self.fleet.event_log)
        while True:
            try:
                return await self._play(sample_id, group_id, problem, attempts, timer, watch)
            except (EngineUnreachable, EngineFailed, LocalError, AbortedGeneration) as error:
                if not attempts.spend(error, continued=False):
                    reason = f"gave up after {attempts.used + 1} attempts: {error}"
                    return _failed(sample_id, group_id, problem, reason)

    async def _play(
        self,
        sample_id: str,
        group_id: str,
        problem: Problem,
        attempts: Attempts,
        timer: asyncio.Timeout,
        watch: Stopwatch,
    ) -> Sample:
        attempt_id = call_id(sample_id, attempts.used) if attempts.used else sample_id
        routing = RoutingContext(session=sample_id, group=group_id)

        async def send(request: GenerateRequest) -> Generation:
            with watch("paused") if self.fleet.interrupted else nullcontext():
                left = await self._time_left(timer)
            with watch("generate"):
                made = await self.fleet.generate(request, deadline=left, routing=routing)
            watch.count("queue", made.queue_seconds)
            watch.count("generate", -made.queue_seconds)
            return made

        async def send_with_care(request: GenerateRequest) -> Generation:
            last = attempts.used > 0 and not attempts.left
            return await self._in_turn(send, request, timer) if last else await send(request)

        async def generate(request: GenerateRequest) -> Generation:
            if not self.partial:
                return await send_with_care(request)
            return await generate_whole(request, send_with_care, attempts, interrupted=lambda: self.fleet.asleep)

        def answered(answer: ToolAnswer) -> None:
            self.tool_counts.count(answer)
            watch.count("tools", answer.seconds)

        if self.environment is not None:
            return await self._play_in(self.environment, sample_id, group_id, problem, attempt_id, generate, watch)
        async with opened(self.tools) as tools:
            episode = await run_episode(
                attempt_id,
                self.prompt(problem),
                generate=generate,
                chat=self.chat,
                tools=tools,
                limits=self.limits,
                sampling=self.sampling,
                on_tool_answer=answered,
                images=images_in(problem.messages),
            )
        ends = timer.when()
        assert ends is not None
        left = max(ends - asyncio.get_running_loop().time(), 0.0)
        timer.reschedule(None)  # the reward has its own deadline, and its error says what it waited for
        parts = await self._parts(problem, episode, left, watch)
        reward = self._total(parts)
        return Sample(sample_id, group_id, problem, SampleStatus.FINISHED, episode, reward, rewards=parts)

    async def _play_in(
        self,
        environment: EnvironmentKind,
        sample_id: str,
        group_id: str,
        problem: Problem,
        attempt_id: str,
        generate: Generate,
        watch: Stopwatch,
    ) -> Sample:
        async with environment.episode(problem) as played:

            async def respond(turn: Turn) -> Sequence[Message] | EpisodeEnd:
                with watch("environment"):
                    return await played.respond(turn)

            with watch("environment"):
                prompt = tuple(await played.reset())
            episode = await converse(
                attempt_id,
                self.chat.prompt_of(prompt),
                respond,
                generate=generate,
                chat=self.chat,
                calls_tools=bool(environment.tools),
                takes_cut_turns=True,
                limits=self.limits,
                sampling=self.sampling,
                images=images_in(prompt),
            )
            with watch("environment"):
                await played.finish(episode.end)
        finished, parts = SampleStatus.FINISHED, played.parts
        return Sample(sample_id, group_id, problem, finished, episode, played.reward, rewards=parts, prompt=prompt)

    async def _parts(self, problem: Problem, episode: Episode, deadline: float, watch: Stopwatch) -> dict[str, float]:
        """Return the parts of a sample's reward, without those of functions that see whole groups."""
        now = asyncio.get_running_loop().time
        ends, played = now() + deadline, self._played(problem, episode)
        with watch("reward"), span("reward"):
            parts = await self.rewards.for_sample(played, deadline=deadline)
        if self.judge is not None:
            with watch("reward"), span("judge"):
                parts["judge"] = await self.judge.grade(problem, played.answer, deadline=max(ends - now(), 0.0))
        return parts

    def _played(self, problem: Problem, episode: Episode) -> Played:
        if self.player is not None:  # the messages are the whole conversation, and the last one is a turn of the model
            answer = text_of(episode.messages[-1].get("content"))
            return Played(episode.messages, answer, problem.row, problem, episode)
        return Played.of(problem, episode, last_answer(episode, self.chat))

    def _total(self, parts: Mapping[str, float]) -> float:
        total = self.rewards.total(parts)
        return total if self.judge is None else self.judge.combine(parts["judge"], total)

    def finish_group(self, samples: Sequence[Sample]) -> Coroutine[None, None, list[Sample]] | None:
        """Return what completes the samples of a group, all of which have ended; None if they are complete.

        It calls the reward functions that see a whole group. Samples that they give no reward become FAILED.
        """
        return self._reward_group(samples) if self.rewards.of_groups and self.environment is None else None

    async def _reward_group(self, samples: Sequence[Sample]) -> list[Sample]:
        played = {s.sample_id: self._played(s.problem, s.episode) for s in samples if s.episode is not None}
        if not played:
            return list(samples)
        watch = Stopwatch()
        try:
            values = await self.rewards.for_group(list(played.values()), deadline=self.timeout)
        except UserCodeError as error:
            reason = str(error)
            return [
                _failed(s.sample_id, s.group_id, s.problem, reason) if s.sample_id in played else s for s in samples
            ]
        seconds, parts = watch.timings().seconds, {s.sample_id: {**s.rewards} for s in samples}
        for sample_id, value in zip(played, values, strict=True):
            parts[sample_id] |= value
        return [
            replace(
                s,
                rewards=parts[s.sample_id],
                reward=self._total(parts[s.sample_id]),
                timings=s.timings.with_part("reward", seconds),
            )
            if s.sample_id in played
            else s
            for s in samples
        ]

    async def _in_turn(self, send: Send, request: GenerateRequest, timer: asyncio.Timeout) -> Generation:
        """Send a request without a retry left, when the one before it has run for PROVEN_SECONDS or has ended.

        A request that kills its engine fails the other requests on it, too. Sent one by one, requests without a retry
        left can't fail each other.
        """
        task: asyncio.Task[Generation] | None = None
        try:
            async with self.last_chance:
                await self.fleet.serving(deadline=await self._time_left(timer))
                task = asyncio.ensure_future(send(request))
                await asyncio.wait({task}, timeout=PROVEN_SECONDS)
            return await task
        finally:
            if task is not None and not task.done():  # cancelled: cancel the request on the engine, too
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _time_left(self, timer: asyncio.Timeout) -> float:
        """Return the seconds until the sample's timeout, which does not run while the fleet is interrupted.

        The fleet is interrupted while it sleeps, because unfinished samples continue after the training step, and while
        its last engine restarts.
        """
        now, ends = asyncio.get_running_loop().time, timer.when()
        assert ends is not None
        if self.fleet.interrupted:
            left = ends - now()
            timer.reschedule(None)
            await self.fleet.resumed()  # or until the scheduler cancels the sample
            timer.reschedule(ends := now() + left)
        return max(ends - now(), 0.0)


def sampling_params(config: RolloutConfig) -> SamplingParams:
    """Return the sampling parameters of training samples."""
    return SamplingParams(
        max_new_tokens=config.max_turn_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
    )


def greedy(sampling: SamplingParams) -> SamplingParams:
    """Return the same parameters for greedy sampling, for evaluation."""
    return replace(sampling, temperature=0.0, top_p=1.0, top_k=-1, min_p=0.0)


def _failed(sample_id: str, group_id: str, problem: Problem, reason: str) -> Sample:
    return Sample(sample_id, group_id, problem, SampleStatus.FAILED, None, 0.0, reason)
