"""Environments of the real library verifiers, played by the samples of a run."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from millrace.config import load_config
from millrace.config.tasks import EnvironmentConfig
from millrace.errors import ConfigError, UserCodeError
from millrace.rollout import EpisodeEnd, Problem
from millrace.rollout.adapters.verifiers import opened
from millrace.rollout.agent import EpisodeLimits
from millrace.rollout.calls import Calls
from millrace.rollout.chat import check_dialogue_format
from millrace.rollout.environment import EnvironmentKind
from millrace.rollout.sample import Episode
from millrace.train.display import Display
from millrace.train.dry_run import look
from millrace.train.experiment import train
from millrace.train.tiny import make_tiny_tokenizer
from tests.rollout.test_agent import FakeModel
from tests.rollout.test_environment import turns_of

ROOT = Path(__file__).parents[3]
LIMITS = EpisodeLimits(max_turns=4, max_turn_tokens=64, max_sample_tokens=600, context_length=600)
ALL: Sequence[dict[str, Any]] = ({}, {"limit": 1})


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


@asynccontextmanager
async def environment(
    name: str = "word-games", selections: Sequence[dict[str, Any]] = ALL, **settings: Any
) -> AsyncIterator[tuple[EnvironmentKind, list[tuple[Problem, ...]]]]:
    async with opened(EnvironmentConfig(verifiers=name, **settings), Calls(), selections) as environment:
        yield environment


async def play(
    kind: EnvironmentKind, problem: Problem, *turns: str, limits: EpisodeLimits = LIMITS
) -> tuple[Episode, float, dict[str, float]]:
    chat = check_dialogue_format(make_tiny_tokenizer(), "tiny", kind.tools)
    async with kind.episode(problem) as played:
        prompt = chat.prompt_of(await played.reset())
        episode = await turns_of(played, prompt, FakeModel(*map(chat.turn, turns)), chat, limits)
        await played.finish(episode.end)
    return episode, played.reward, played.parts


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


async def ended(before: set[int]) -> None:
    """Wait until no other children are left: a killed process is reaped by the event loop a moment later."""
    async with asyncio.timeout(10):
        while not children() <= before:
            await asyncio.sleep(0.02)


async def test_an_episode_is_verifiers_own() -> None:
    before = children()
    async with environment() as (kind, (problems, held_out)):
        assert [problem.problem_id for problem in problems] == ["word-eggs", "word-cards", "word-pens"]
        assert held_out == problems[:1]
        assert kind.tools == ()
        episode, reward, parts = await play(kind, problems[1], "eggs", "cards")
    assert (episode.turns, episode.end) == (2, EpisodeEnd.ENVIRONMENT_DONE)
    assert [message["content"] for message in episode.messages] == ["eggs", "No, not eggs.", "cards"]
    assert reward == pytest.approx(0.8)
    assert parts == {"right": 1.0, "turns": 2.0}
    await ended(before)


async def test_tasks_and_settings_are_chosen_as_in_verifiers() -> None:
    arguments = {"taskset": {"words": ["toys", "books"]}, "agent": {"harness": {"id": "word-games", "tries": 1}}}
    async with environment(arguments=arguments, selections=[{"skip": 1}, {"limit": 1}]) as (kind, (rest, first)):
        assert [problem.row["word"] for problem in (*rest, *first)] == ["books", "toys"]
        episode, reward, parts = await play(kind, rest[0], "toys")
    assert (episode.turns, episode.end) == (1, EpisodeEnd.ENVIRONMENT_DONE)
    assert reward == pytest.approx(-0.1)
    assert parts == {"right": 0.0, "turns": 1.0}


@pytest.mark.parametrize(
    ("limits", "end"),
    [
        (EpisodeLimits(2, 64, 600, 600), EpisodeEnd.TURN_LIMIT),
        (EpisodeLimits(4, 64, 45, 600), EpisodeEnd.TOKEN_LIMIT),
    ],
)
async def test_an_episode_that_a_limit_ends_is_scored(limits: EpisodeLimits, end: EpisodeEnd) -> None:
    async with environment() as (kind, (problems, _)):
        episode, reward, parts = await play(kind, problems[0], "pens", "pens", "pens", limits=limits)
    assert episode.end is end
    assert reward == pytest.approx(-0.1 * episode.turns)
    assert parts == {"right": 0.0, "turns": float(episode.turns)}


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ("raise", "failed: TaskError: task WordTask scoring: ValueError: the reward raised (in step, for row word-"),
        ("die", "failed: HarnessError: harness 'word-games' exited 1: the harness died (in step, for row word-eggs)"),
        ("forget", "failed: a request does not continue the conversation before it; "),
        ("hang", "hangs: it did not return within 5 s (in step, for row word-eggs)"),
    ],
)
async def test_what_goes_wrong_ends_the_sample_by_one_line(turn: str, says: str) -> None:
    before = children()
    arguments = {"agent": {"harness": {"id": "word-games", "tries": 1 if turn in ("raise", "hang") else 3}}}
    async with environment(arguments=arguments, timeout=5.0) as (kind, (problems, _)):
        with pytest.raises(UserCodeError) as raised:
            await play(kind, problems[0], turn, turn)
        assert says in str(raised.value)
        assert "\n" not in str(raised.value)
        await ended(before)
        _, reward, _ = await play(kind, problems[0], "eggs")
    assert reward == pytest.approx(0.9)


async def test_a_task_that_fails_in_its_setup_is_one_line() -> None:
    async with environment(arguments={"taskset": {"words": ["eggs", "broken"]}}) as (kind, (problems, _)):
        with pytest.raises(UserCodeError, match="RuntimeError: no such word .*in reset, for row word-broken"):
            await play(kind, problems[1], "eggs")


async def test_a_cancelled_episode_leaves_no_process() -> None:
    before = children()
    async with environment() as (kind, (problems, _)):
        async with kind.episode(problems[0]) as played:
            await played.reset()
            assert children() > before
        await ended(before)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("no-such-game", {}, "the verifiers environment no-such-game can't be used: ModuleNotFoundError: taskset"),
        ("word-games", {"arguments": {"tasksets": {}}}, "can't be used: ValidationError: "),
        ("word-games", {"arguments": {"taskset": {"words": ["broken"]}}}, "can't be used: "),
        ("word-games", {"selections": [{"skip": 9}, {}]}, "it has no tasks for data, or none for evaluation.data"),
        ("word-games", {"timeout": 0.01}, "its first task did not ask the model within 0.01 s (environment.timeout)"),
    ],
)
async def test_an_environment_that_can_not_be_used_is_one_line(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        async with environment(name, **settings):
            raise AssertionError("it was opened")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


async def test_episodes_do_not_mix() -> None:
    async with environment() as (kind, (problems, _)):
        played = await asyncio.gather(
            *(play(kind, problem, "eggs", "cards", "pens") for problem in problems for _ in range(2))
        )
    assert [episode.turns for episode, _, _ in played] == [1, 1, 2, 2, 3, 3]


async def test_a_training_run(tmp_path: Path) -> None:
    config = load_config(
        ROOT / "examples" / "text_game" / "run.yaml",
        [
            f"output_dir={tmp_path}",
            "environment={verifiers: word-games, timeout: 120}",
            "data={kind: tasks}",
            "evaluation={data: {kind: tasks, select: {limit: 1}}, problems: 1}",
            "rollout={groups_per_step: 2, samples_per_group: 2, max_turns: 2, max_turn_tokens: 4}",
            "rollout.max_sample_tokens=100",
            "train.steps=1",
            "engine.start_timeout=300",
        ],
    )
    found = await look(config)
    assert found[-1] == "environment: word-games (verifiers); its tools: none"
    summary = await train(config, resume=False, display=Display(Console(quiet=True)))
    assert summary is not None
    assert summary.metrics[-1].rewards["turns"] == pytest.approx(2.0)
    assert set(summary.metrics[-1].rewards) == {"right", "turns"}
