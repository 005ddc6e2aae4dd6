"""Plays samples by an agent through the gateway, each in an episode of its own."""

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from millrace.agents.command import load_command
from millrace.agents.function import load_function
from millrace.agents.job import Agent, Ended, Job
from millrace.config.agents import AgentConfig
from millrace.errors import UserCodeError
from millrace.fleet.client import FleetClient
from millrace.gateway.episode import Episode as GatewayEpisode
from millrace.gateway.gateway import Gateway, OpenEpisode
from millrace.gateway.rules import EpisodeRules
from millrace.rollout.agent import EpisodeLimits
from millrace.rollout.player import PlayedByAgent
from millrace.rollout.sample import Episode, EpisodeEnd, Problem
from millrace.rollout.timings import Stopwatch
from millrace.tracing import span
from millrace.types import SamplingParams

T = TypeVar("T")

log = logging.getLogger(__name__)

MOST_WARNINGS = 5  # of failed agents
STEP = 1.0  # seconds between two looks at whether the fleet is interrupted


@dataclass(slots=True)
class AgentPlayer:
    """Plays samples by one agent. config: its settings, with the kind of its reward."""

    gateway: Gateway
    agent: Agent
    config: AgentConfig
    _free: asyncio.Semaphore = field(init=False, repr=False)
    _warned: set[str] = field(default_factory=set, init=False)  # the first lines of failures

    def __post_init__(self) -> None:
        self._free = asyncio.Semaphore(self.config.concurrency)

    async def play(
        self, sample_id: str, problem: Problem, *, sampling: SamplingParams, limits: EpisodeLimits, timeout: float
    ) -> PlayedByAgent:
        """Play a sample, as `Player.play` says. The wait for other agents to end does not count to the timeout."""
        rules = EpisodeRules(sampling, limits.max_turns, limits.max_turn_tokens, limits.max_sample_tokens)
        watch = Stopwatch()
        with watch("agent_queue"):
            await self._free.acquire()
        try:
            opened = self.gateway.open_episode({"sample": sample_id, "problem": problem.problem_id}, rules)
            job, failed = Job(sample_id, problem, opened), True
            try:
                with watch("tools"), span("agent"):
                    ended, late = await self._run(job, timeout)
                await opened.finish()
                played = self._played(job, ended, limits, late=late)
                failed = bool(played.counts.get("agent_failed"))
                return replace(played, seconds=_shares(watch, opened.episode))
            finally:
                await self.gateway.delete(opened.id)
                await self.agent.clean(job, failed=failed)
        finally:
            self._free.release()

    async def _run(self, job: Job, timeout: float) -> tuple[Ended, bool]:
        """Run the agent. Returns how it ended, and whether its own timeout ended it. Raises TimeoutError."""
        own = self.config.timeout
        seconds = timeout if own is None else min(own, timeout)
        try:
            return await within(self.gateway.engines.fleet, self.agent.run(job), seconds), False
        except TimeoutError:
            if own is None or own > timeout:
                raise
            return Ended(f"it was not done within {seconds:g} s (agent.timeout)"), True

    def _played(self, job: Job, ended: Ended, limits: EpisodeLimits, *, late: bool) -> PlayedByAgent:
        """Return what came of an agent that has ended. Raises as `Player.play` does."""
        episode = job.episode.episode
        for error in episode.failures.values():
            raise error
        ended = self.agent.result(job, ended)
        failure = f"the agent {self.agent.where} failed: {ended.failure}" if ended.failure else None
        sequences = _sequences(job.episode, limits)
        if not sequences:
            raise UserCodeError(failure or f"the agent {self.agent.where} has no answer of the model")
        if failure is not None:
            self._warn(job, failure)
            if ended.reward is None and self.config.reward != "functions":
                if not late and not any(episode.counts[f"limit:{name}"] for name in ("turns", "tokens")):
                    raise UserCodeError(failure)
                ended = replace(ended, reward=0.0, parts={str(self.config.reward): 0.0})
        counts = Counter(episode.counts)
        counts["duplicated_tokens"] = duplicated([one.token_ids for one in sequences])
        counts["agent_failed"] = int(failure is not None)
        *branches, last = sequences
        return PlayedByAgent(last, tuple(branches), ended.reward, ended.parts, +counts)

    def _warn(self, job: Job, failure: str) -> None:
        """Log the first failures of a run that are unlike. `agents_failed` in the metrics counts all."""
        kind = failure.partition("\n")[0].replace(job.sample_id, "")
        if kind not in self._warned and len(self._warned) < MOST_WARNINGS:
            self._warned.add(kind)
            log.warning("sample %s: %s", job.sample_id, failure)


def load_agent(config: AgentConfig, folder: Path) -> Agent:
    """Return the agent of the settings, of which nothing runs yet. folder: for the folders of a command's samples.

    Raises ConfigError if it can't be used.
    """
    return load_command(config, folder) if config.command is not None else load_function(config)


async def within(fleet: FleetClient, work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Return the result of the work, which is cancelled when it has run for so many seconds.

    The seconds in which the fleet is interrupted don't count. Raises TimeoutError, when the work has ended.
    """
    task, now = asyncio.ensure_future(work), asyncio.get_running_loop().time
    try:
        while not task.done():
            if seconds <= 0:
                raise TimeoutError
            before = now()
            await asyncio.wait({task}, timeout=min(seconds, STEP))
            if not fleet.interrupted:
                seconds -= now() - before
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _shares(watch: Stopwatch, episode: GatewayEpisode) -> dict[str, float]:
    """Return where an agent's time went: its requests, and as `tools` the rest of it."""
    queue, generate = episode.queue_seconds, episode.generate_seconds
    return watch.seconds | {
        "queue": queue, "generate": generate, "tools": max(watch.seconds["tools"] - queue - generate, 0.0),
    }  # fmt: skip


def duplicated(sequences: Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens of the sequences others have before them, too: all but the nodes of their prefix tree."""
    arrays = [np.asarray(one) for one in sorted(sequences)]
    shared = 0
    for first, second in pairwise(arrays):
        length = min(first.size, second.size)
        different = np.flatnonzero(first[:length] != second[:length])
        shared += int(different[0]) if different.size else length
    return shared


def _sequences(opened: OpenEpisode, limits: EpisodeLimits) -> list[Episode]:
    """Return the token sequences to train on. The last one has the last answer."""
    sequences = [sample.episode for sample in opened.samples() if not sample.superseded]
    counts = opened.episode.counts
    if sequences and (counts["limit:turns"] or counts["limit:tokens"]):
        end = EpisodeEnd.TURN_LIMIT if counts["limit:turns"] else limits.end_when_full()
        sequences[-1] = replace(sequences[-1], end=end)
    return sequences
