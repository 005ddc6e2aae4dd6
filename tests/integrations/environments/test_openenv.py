"""Environments of a real OpenEnv server, of OpenEnv's own package."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from millrace.config.tasks import EnvironmentConfig
from millrace.errors import ConfigError, UserCodeError
from millrace.rollout import EpisodeEnd, Problem
from millrace.rollout.adapters.openenv import opened
from millrace.rollout.calls import Calls
from millrace.rollout.environment import EnvironmentKind
from tests.integrations.environments.openenv_server import openenv_server
from tests.rollout.test_agent import FakeModel
from tests.rollout.test_environment import PLAIN, play

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROBLEM = Problem("games-3", (), {"number": 5, "a column that reset does not take": None})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with openenv_server(tmp_path_factory.mktemp("openenv") / "log") as url:
        yield url


@asynccontextmanager
async def environment(url: str, **settings: Any) -> AsyncIterator[EnvironmentKind]:
    async with opened(EnvironmentConfig(openenv=url, **settings), Calls()) as kind:
        yield kind


def saying(*turns: str) -> FakeModel:
    return FakeModel(*map(PLAIN.turn, turns))


async def test_an_episode_is_a_session_of_the_server(url: str) -> None:
    async with environment(url, arguments={"tries": 9}) as kind:
        model = saying("4", '{"number": 3}', '```json\n{"number": 5}\n```')
        episode, reward = await play(kind, model, problem=PROBLEM)
    assert (episode.turns, episode.end, reward) == (3, EpisodeEnd.ENVIRONMENT_DONE, 0.5)
    assert [message["content"] for message in episode.messages] == [
        "4", "No.", '{"number": 3}', "No.", '```json\n{"number": 5}\n```',
    ]  # fmt: skip
    assert "user\nGuess my number.<|im_end|>" in PLAIN.decode(episode.token_ids)


async def test_arguments_and_rows_reach_reset(url: str) -> None:
    async with environment(url, arguments={"tries": 1, "number": 6}) as kind:
        _, reward = await play(kind, saying("6"), problem=Problem("games-4", (), {}))
        assert reward == 1.0
        episode, reward = await play(kind, saying("6"), problem=PROBLEM)  # the row's number is 5
    assert (episode.end, reward) == (EpisodeEnd.ENVIRONMENT_DONE, -0.25)


async def test_what_is_no_action_is_told_to_the_model(url: str) -> None:
    async with environment(url) as kind:
        model = saying("many", '{"numbers": 4}', "5")
        episode, reward = await play(kind, model, problem=PROBLEM)
    assert (episode.turns, reward) == (3, 1.0)
    assert str(episode.messages[1]["content"]).startswith("This is no action: number: Input should be a valid integer")
    assert "number: Field required; numbers: Extra inputs are not permitted" in str(episode.messages[3]["content"])


async def test_sessions_do_not_mix(url: str) -> None:
    problems = [Problem(f"games-{number}", (), {"number": number}) for number in (1, 2)]
    async with environment(url) as kind:
        played = await asyncio.gather(*(play(kind, saying("1", "2"), problem=problem) for problem in problems))
    assert [(episode.turns, reward) for episode, reward in played] == [(1, 1.0), (2, 0.75)]


@pytest.mark.parametrize(
    ("turn", "number", "says"),
    [
        ("13", 5, "failed: EXECUTION_ERROR: unlucky number (in step, for row games-3)"),
        ("60", 5, "hangs: it did not return within 3 s (in step, for row games-3)"),
        ("1", -1, "failed: EXECUTION_ERROR: a number is 0 or more (in reset, for row games-3)"),
    ],
)
async def test_an_environment_that_fails_ends_the_sample_by_one_line(
    url: str, turn: str, number: int, says: str
) -> None:
    async with environment(url, timeout=3.0) as kind:
        with pytest.raises(UserCodeError) as raised:
            await play(kind, saying(turn), problem=replace(PROBLEM, row={"number": number}))
        assert str(raised.value) == f"the environment {url} (OpenEnv) {says}"
        _, reward = await play(kind, saying("5"), problem=PROBLEM)  # the server goes on
        assert reward == 1.0


async def test_a_server_without_a_free_session_is_one_line(url: str) -> None:
    async with environment(url) as kind, AsyncExitStack() as sessions:
        with pytest.raises(UserCodeError, match="CAPACITY_REACHED: .* \\(in reset, for row games-3\\)"):
            for _ in range(5):  # it has four
                await (await sessions.enter_async_context(kind.episode(PROBLEM))).reset()


async def test_a_server_that_dies_ends_its_samples_by_one_line(tmp_path: Any) -> None:
    async with openenv_server(tmp_path / "log") as url, environment(url) as kind:
        for says in ("the server closed the connection", "no session can be opened"):
            with pytest.raises(UserCodeError, match=says) as raised:
                await play(kind, saying("666"), problem=PROBLEM)
            assert "\n" not in str(raised.value)


async def test_a_url_where_no_server_answers_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"environment: no OpenEnv server answers at {url}: ") as raised:
        async with environment(url):
            raise AssertionError("it was opened")
    assert "\n" not in str(raised.value)
