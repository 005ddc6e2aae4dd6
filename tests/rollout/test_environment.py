"""Environments: what a class of the user is called with, what its episode is, and which failures have which words."""

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from millrace.config.tasks import EnvironmentConfig
from millrace.errors import ConfigError, DataError, UserCodeError
from millrace.rollout import Action, EpisodeEnd, Problem
from millrace.rollout.agent import EpisodeLimits, converse
from millrace.rollout.calls import Calls
from millrace.rollout.chat import ChatFormat, check_dialogue_format
from millrace.rollout.environment import EnvironmentEpisode, EnvironmentKind, load_environment
from millrace.rollout.sample import Episode
from millrace.rollout.tools import Calculator
from millrace.train.tiny import make_tiny_tokenizer
from millrace.types import SamplingParams
from tests.rollout.test_agent import FakeModel, check

CHAT = check_dialogue_format(make_tiny_tokenizer(), "tiny", [Calculator().schema])
PLAIN = check_dialogue_format(make_tiny_tokenizer(), "tiny")
LIMITS = EpisodeLimits(max_turns=4, max_turn_tokens=64, max_sample_tokens=400, context_length=512)
SYSTEM = {"role": "system", "content": "Play."}
PROBLEM = Problem("games-3", (SYSTEM,), {"word": "eggs"})

GAME = '''
import threading
from millrace.rollout import Step

log = []

class Game:
    """Ends at the right word."""

    def __init__(self, tries=9):
        self.tries = tries
        log.append(("made", threading.get_ident()))

    def reset(self, row):
        self.word = row["word"]
        log.append(("reset", threading.get_ident()))
        return "Which word?"

    def step(self, action):
        self.tries -= 1
        log.append(("step", threading.get_ident(), action))
        done = action.text == self.word or not self.tries
        return Step(f"No, not {action.text}.", 1.0 if action.text == self.word else -0.25, done)

    def close(self):
        log.append(("close", threading.get_ident()))

class AsyncGame(Game):
    async def reset(self, row):
        return super().reset(row)

    async def step(self, action):
        return super().step(action)

    async def close(self):
        super().close()
'''


def kind(folder: Path, code: str, name: str = "Game", **settings: Any) -> EnvironmentKind:
    file = folder / "env.py"
    file.write_text(code)
    return load_environment(EnvironmentConfig(path=str(file), name=name, **settings), Calls())


def log_of(kind: EnvironmentKind) -> list[tuple[Any, ...]]:
    made: Any = kind.make
    log: list[tuple[Any, ...]] = made.func.reset.__globals__["log"]
    return log


async def turns_of(
    played: EnvironmentEpisode, prompt: tuple[int, ...], model: FakeModel, chat: ChatFormat, limits: EpisodeLimits
) -> Episode:
    """Lets the model take its turns in an episode that has been reset."""
    return await converse(
        "s7",
        prompt,
        played.respond,
        generate=model,
        chat=chat,
        calls_tools=bool(played.kind.tools),
        takes_cut_turns=True,
        limits=limits,
        sampling=SamplingParams(64),
    )


async def play(
    kind: EnvironmentKind, model: FakeModel, limits: EpisodeLimits = LIMITS, problem: Problem = PROBLEM
) -> tuple[Episode, float]:
    chat = CHAT if kind.tools else PLAIN
    async with kind.episode(problem) as played:
        prompt = chat.prompt_of(await played.reset())
        episode = await turns_of(played, prompt, model, chat, limits)
    check(episode, model, limits, prompt)
    return episode, played.reward


@pytest.mark.parametrize("name", ["Game", "AsyncGame"])
async def test_an_episode_is_what_the_environment_says(tmp_path: Path, name: str) -> None:
    game = kind(tmp_path, GAME, name)
    model = FakeModel(*map(PLAIN.turn, ("cards", "<think>eggs</think>pens", "eggs", "toys")))
    episode, reward = await play(game, model)
    assert (episode.turns, episode.end, reward) == (3, EpisodeEnd.ENVIRONMENT_DONE, 0.5)
    assert PLAIN.decode(episode.token_ids) == (
        "<|im_start|>system\nPlay.<|im_end|>\n<|im_start|>user\nWhich word?<|im_end|>\n<|im_start|>assistant\n"
        "cards<|im_end|>\n<|im_start|>user\nNo, not cards.<|im_end|>\n<|im_start|>assistant\n"
        "<think>eggs</think>pens<|im_end|>\n<|im_start|>user\nNo, not pens.<|im_end|>\n<|im_start|>assistant\n"
        "eggs<|im_end|>"
    )
    assert [message["role"] for message in episode.messages] == ["assistant", "user", "assistant", "user", "assistant"]
    assert episode.messages[2] == {"role": "assistant", "content": "pens", "reasoning": "eggs"}
    log = log_of(game)
    assert [entry[0] for entry in log] == ["made", "reset", "step", "step", "step", "close"]
    assert [entry[2] for entry in log if entry[0] == "step"] == [Action("cards"), Action("pens"), Action("eggs")]
    threads = {entry[1] for entry in log}
    assert len(threads) == 1
    assert (threads == {threading.get_ident()}) == (name == "AsyncGame")


@pytest.mark.parametrize(
    ("limits", "turns", "steps", "end"),
    [
        (replace(LIMITS, max_turns=2), 2, 2, EpisodeEnd.TURN_LIMIT),
        (replace(LIMITS, max_turn_tokens=1), 4, 4, EpisodeEnd.TURN_LIMIT),  # the environment answers cut turns, too
        (replace(LIMITS, context_length=len(PLAIN.prompt("Which word?", "Play.")) + 10), 1, 1, EpisodeEnd.CONTEXT_FULL),
    ],
)
async def test_the_limits_hold(tmp_path: Path, limits: EpisodeLimits, turns: int, steps: int, end: EpisodeEnd) -> None:
    game = kind(tmp_path, GAME)
    episode, reward = await play(game, FakeModel(*[PLAIN.turn("cards")] * 9), limits)
    assert (episode.turns, episode.end, reward) == (turns, end, -0.25 * steps)
    assert [entry[0] for entry in log_of(game)].count("step") == steps
    assert log_of(game)[-1][0] == "close"
    cut = [entry[2].cut for entry in log_of(game) if entry[0] == "step"]
    assert cut == [limits.max_turn_tokens == 1] * steps
    assert PLAIN.decode(episode.token_ids).count("<|im_end|>\n<|im_start|>user\nNo, not c") == turns - 1


async def test_arguments_are_those_of_the_settings(tmp_path: Path) -> None:
    episode, _ = await play(kind(tmp_path, GAME, arguments={"tries": 1}), FakeModel(PLAIN.turn("cards")))
    assert episode.end is EpisodeEnd.ENVIRONMENT_DONE


TOOLS = """
from millrace.rollout import Step

class Game:
    tools = [{"type": "function", "function": {"name": "count", "parameters": {
        "type": "object", "properties": {"n": {"type": "integer"}}}}}]

    async def reset(self, row):
        self.seen = []
        return [{"role": "user", "content": "Count."}]

    async def step(self, action):
        self.seen.append(action)
        if not action.tool_calls:
            return Step(done=True, reward=len(action.errors))
        answers = [{"role": "tool", "content": str(call.arguments["n"] + 1)} for call in action.tool_calls]
        return Step([*answers, {"role": "user", "content": "Go on."}], 1)
"""


async def test_an_environment_with_tools_gets_calls_and_answers_them(tmp_path: Path) -> None:
    game = kind(tmp_path, TOOLS)
    json = '<tool_call>\n{"name": "count", "arguments": {"n": 3}}\n</tool_call>'
    tags = "<tool_call>\n<function=count>\n<parameter=n>\n4\n</parameter>\n</function>\n</tool_call>"
    limits = replace(LIMITS, max_turn_tokens=200, max_sample_tokens=900, context_length=900)
    model = FakeModel(*map(CHAT.turn, (f"{json}{tags}", "<tool_call>\nn\n</tool_call>")))
    episode, reward = await play(game, model, limits)
    assert (episode.turns, episode.end, reward) == (2, EpisodeEnd.ENVIRONMENT_DONE, 2.0)
    assert (
        "<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    ) in CHAT.decode(episode.token_ids)
    calls = episode.messages[0]["tool_calls"]
    assert isinstance(calls, list)
    assert [call["function"]["name"] for call in calls] == ["count", "count"]


def broken(method: str, body: str) -> str:
    methods = {"reset": 'return "Which word?"', "step": 'return Step("No.")', "close": "pass"} | {method: body}
    return (
        "import threading\nfrom millrace.rollout import Step\nended = []\n\nclass Game:\n"
        f"    def reset(self, row):\n        {methods['reset']}\n"
        f"    def step(self, action):\n        {methods['step']}\n"
        f"    def close(self):\n        ended.append(True)\n        {methods['close']}\n"
    )


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            broken("reset", "raise KeyError('seed')"),
            "env.py:Game failed: KeyError: 'seed' (env.py:7) (in reset, for row",
        ),
        (
            broken("reset", "return None"),
            "env.py:Game returned the observation None; it must be a text that is not emp",
        ),
        (broken("reset", 'return ""'), "returned the observation ''; it must be a text that is not empty"),
        (broken("reset", 'return [{"role": "system", "content": "x"}]'), "returned the observation [{'role': 'system'"),
        (
            broken("reset", "threading.Event().wait()"),
            "env.py:Game hangs: it did not return within 0.2 s (in reset, for",
        ),
        (broken("step", "1 / 0"), "failed: ZeroDivisionError: division by zero (env.py:9) (in step, for row games-3)"),
        (broken("step", 'return ("No.", 0, False)'), "returned ('No.', 0, False); it must return Step(observation, re"),
        (broken("step", 'return Step("No.", None)'), "returned the reward None; it must be a number (in step"),
        (broken("step", 'return Step("No.", float("nan"))'), "returned the reward nan"),
        (broken("step", 'return Step([{"role": "user"}])'), "returned the observation [{'role': 'user'}]"),
        (
            broken("step", "threading.Event().wait()"),
            "hangs: it did not return within 0.2 s (in step, for row games-3)",
        ),
    ],
)
async def test_what_goes_wrong_is_one_line_and_close_is_called(tmp_path: Path, code: str, says: str) -> None:
    game = kind(tmp_path, code, timeout=0.2)
    with pytest.raises(UserCodeError) as raised:
        await play(game, FakeModel(*[PLAIN.turn("cards")] * 9))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    made: Any = game.make
    assert made.func.reset.__globals__["ended"] == [True]


async def test_a_close_that_raises_is_logged_and_the_episode_stands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = broken("step", "return Step(done=True, reward=1)").replace(
        "        pass\n", "        raise OSError('gone')\n"
    )
    episode, reward = await play(kind(tmp_path, code), FakeModel())
    assert (episode.end, reward) == (EpisodeEnd.ENVIRONMENT_DONE, 1.0)
    assert "env.py:Game failed: OSError: gone (env.py:12) (in close, for row games-3)" in caplog.text


async def test_a_cancelled_episode_is_closed_even_while_a_step_runs(tmp_path: Path) -> None:
    code = broken("step", "started.set(); ended.append(finish.wait(60))").replace(
        "ended = []", "ended = []\nstarted, finish = threading.Event(), threading.Event()"
    )
    game = kind(tmp_path, code)
    made: Any = game.make
    space = made.func.reset.__globals__
    task = asyncio.create_task(play(game, FakeModel()))
    assert await asyncio.to_thread(space["started"].wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert space["ended"] == [True]  # by close: the step still runs
    space["finish"].set()


async def test_an_instance_whose_constructor_returns_too_late_is_closed(tmp_path: Path) -> None:
    code = broken("reset", "return None").replace(
        "class Game:\n", "finish, closed = threading.Event(), threading.Event()\n\nclass Game:\n"
        "    def __init__(self):\n        finish.wait(60)\n",
    ).replace("        pass\n", "        closed.set()\n")  # fmt: skip
    game = kind(tmp_path, code, timeout=0.05)
    made: Any = game.make
    space = made.func.reset.__globals__
    with pytest.raises(UserCodeError, match="env.py:Game hangs: it did not return within 0.05 s .in __init__, for row"):
        await play(game, FakeModel())
    space["finish"].set()
    assert await asyncio.to_thread(space["closed"].wait, 60)


async def test_an_observation_that_the_template_cant_write_fails(tmp_path: Path) -> None:
    game = kind(tmp_path, broken("step", 'return Step([{"role": "tool", "content": "x"}])'))
    with pytest.raises(DataError, match="this chat format has no form for tool messages after a turn"):
        await play(game, FakeModel(PLAIN.turn("cards")))


@pytest.mark.parametrize(
    ("code", "settings", "says"),
    [
        ("Game = 3", {}, "environment: env.py:Game is no class"),
        ("class Game:\n    def step(self, action): ...", {}, "environment: env.py:Game has no method reset(row)"),
        ("class Game:\n    def reset(self, row): ...", {}, "environment: env.py:Game has no method step(action)"),
        (
            "class Game:\n    def reset(self): ...\n    def step(self, action): ...",
            {},
            "environment: env.py:Game.reset can't be called as it will be: too many positional arguments",
        ),
        (GAME, {"arguments": {"trys": 3}}, "env.py:Game can't be called as it will be: got an unexpected keyword argu"),
        (f"{GAME}\n    tools = 3", {"name": "AsyncGame"}, "env.py:AsyncGame.tools must be an attribute of the class"),
        (f"{GAME}\n    tools = [3]", {"name": "AsyncGame"}, "env.py:AsyncGame.tools: a tool's schema must be"),
    ],
)
def test_classes_that_are_no_environments(tmp_path: Path, code: str, settings: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        kind(tmp_path, code, **settings)
    assert says in str(raised.value)


SCORED = """
from millrace.rollout import Step

class Scored:
    def reset(self, row):
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which word?"}]

    def step(self, action):
        return Step("No.", 0.25, action.text == "eggs", {"words": 1.0, "style": 0.5})

    def finish(self):
        return Step("", -1.0, parts={"late": -1.0})
"""


@pytest.mark.parametrize(
    ("turns", "reward", "parts"),
    [
        (("cards", "eggs"), 0.5, {"words": 2.0, "style": 1.0}),
        (("cards", "pens"), -0.5, {"words": 2.0, "style": 1.0, "late": -1.0}),  # the limit ends it
    ],
)
async def test_an_environment_names_the_parts_of_its_reward(
    tmp_path: Path, turns: tuple[str, ...], reward: float, parts: Mapping[str, float]
) -> None:
    limits = replace(LIMITS, max_turns=2)
    async with kind(tmp_path, SCORED, "Scored").episode(replace(PROBLEM, messages=())) as played:
        episode = await converse(
            "s7",
            PLAIN.prompt_of(await played.reset()),
            played.respond,
            generate=FakeModel(*map(PLAIN.turn, turns)),
            chat=PLAIN,
            calls_tools=False,
            takes_cut_turns=True,
            limits=limits,
            sampling=SamplingParams(64),
        )
        await played.finish(episode.end)
    assert PLAIN.decode(episode.token_ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nW")
    assert (episode.turns, played.reward, played.parts) == (2, reward, parts)
