"""Tools of the user: functions and classes, what the model is told of them, and what can't be a tool."""

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from millrace.config.tasks import ToolConfig
from millrace.errors import ConfigError, UserCodeError
from millrace.rollout import Tool, ToolCall
from millrace.rollout.calls import Calls
from millrace.rollout.toolbox import ToolKind, load_tools, opened
from millrace.rollout.tools import answer_tool_call

CODE = '''
import asyncio
import threading
from millrace.rollout import Tool, ToolError

threads = []
closed = []
finish = threading.Event()

def search(text: str, most: int = 3) -> list[str]:
    """Finds words.

    Args:
        text: what is looked for
        most: how many words are returned
    """
    threads.append(threading.get_ident())
    return [text] * most

async def later(text: str, deadline: int = 0) -> str:
    """Repeats.

    Args:
        text: what is repeated
        deadline: by when
    """
    await asyncio.sleep(0)
    return text

def hangs() -> str:
    """Hangs."""
    finish.wait()
    return "late"

def fails() -> str:
    """Fails."""
    raise OSError("no network")

class Counter(Tool):
    name = "count"
    schema = {"type": "function", "function": {"name": "count", "description": "Counts its calls."}}
    calls = 0

    async def call(self, arguments):
        self.calls += 1
        return str(self.calls)

    async def close(self):
        closed.append(self.calls)

class BadClose(Counter):
    name = "bad_close"

    @property
    def schema(self):
        return {"type": "function", "function": {"name": self.name}}

    async def close(self):
        raise OSError("gone")

class BadStart(Counter):
    def __init__(self):
        raise OSError("no room")

def untyped(text):
    """Untyped.

    Args:
        text: any
    """

def undocumented(text: str) -> str:
    return text

class Plain:
    pass

class NoCall(Tool):
    name = "no"
    schema = {"type": "function", "function": {"name": "no"}}

class SyncCall(NoCall):
    def call(self, arguments):
        return ""

class OtherName(Counter):
    name = "other"

class Needs(Counter):
    def __init__(self, key):
        self.key = key

class NoSchema(Counter):
    schema = {"name": "count"}

number = 3
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "tools.py").write_text(CODE)
    return tmp_path / "tools.py"


def kinds(file: Path, *names: str, timeout: float | None = None) -> dict[str, ToolKind]:
    return load_tools([ToolConfig(path=str(file), name=name, timeout=timeout) for name in names], Calls())


def module(kind: ToolKind) -> Mapping[str, Any]:
    function: Any = kind.make()
    code = function._function if hasattr(function, "_function") else type(function).call
    space: Mapping[str, Any] = code.__globals__
    return space


async def call(tools: Mapping[str, Tool], name: str, **arguments: object) -> str:
    return (await answer_tool_call(ToolCall(name, arguments), tools)).text


async def test_functions_are_tools(file: Path) -> None:
    loaded = kinds(file, "search", "later", "fails")
    function: Any = loaded["search"].schema["function"]
    assert (function["name"], function["description"]) == ("search", "Finds words.")
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "text": {"type": "string", "description": "what is looked for"},
            "most": {"type": "integer", "description": "how many words are returned"},
        },
        "required": ["text"],
    }
    async with opened({name: kind.make for name, kind in loaded.items()}) as tools:
        assert await call(tools, "search", text="eggs", most=2) == '["eggs","eggs"]'
        assert await call(tools, "later", text="eggs", deadline=7) == "eggs"
        assert await call(tools, "fails") == "Error: no network"
        assert "unexpected keyword argument 'word'" in await call(tools, "search", word="eggs")
    assert threading.get_ident() not in module(loaded["search"])["threads"]


async def test_a_function_that_hangs_is_an_answer_within_its_timeout(file: Path) -> None:
    loaded = kinds(file, "hangs", timeout=0.05)
    async with opened({name: kind.make for name, kind in loaded.items()}) as tools:
        assert await call(tools, "hangs") == "Error: no answer after 0.05 s"
    module(loaded["hangs"])["finish"].set()


async def test_each_episode_has_an_instance_that_is_closed(file: Path) -> None:
    loaded = kinds(file, "Counter", timeout=7)
    makers = {name: kind.make for name, kind in loaded.items()}

    async def episode(calls: int) -> list[str]:
        async with opened(makers) as tools:
            assert tools["count"].timeout == 7
            return [await call(tools, "count") for _ in range(calls)]

    assert list(await asyncio.gather(episode(1), episode(3))) == [["1"], ["1", "2", "3"]]
    with pytest.raises(RuntimeError, match="mine"):
        async with opened(makers):
            raise RuntimeError("mine")
    assert sorted(module(loaded["count"])["closed"]) == [0, 1, 3]


async def test_a_tool_that_is_not_closed_is_logged_and_one_that_is_not_made_fails(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened({name: kind.make for name, kind in kinds(file, "BadClose").items()}):
        pass
    assert "the tool 'bad_close' was not closed: OSError: gone (tools.py:" in caplog.text
    good, bad = kinds(file, "Counter")["count"], kinds(file, "BadStart")["count"]
    with pytest.raises(UserCodeError, match=r"the tool 'bad' can't be made: OSError: no room \(tools.py:"):
        async with opened({"good": good.make, "bad": bad.make}):
            raise AssertionError("it was made")
    assert module(good)["closed"] == [0]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["untyped"], "tools.py:untyped needs a docstring with an `Args:` section and a type for each parameter: Argu"),
        (["undocumented"], "tools.py:undocumented needs a docstring with an `Args:` section and a type for each param"),
        (["number"], "rollout.tools: tools.py:number is neither a function nor a subclass of millrace.rollout.Tool"),
        (["Plain"], "rollout.tools: tools.py:Plain is a class, but no subclass of millrace.rollout.Tool"),
        (["NoCall"], "rollout.tools: tools.py:NoCall lacks call"),
        (["SyncCall"], "rollout.tools: tools.py:SyncCall: write `async def call(self, arguments)`"),
        (["OtherName"], "rollout.tools: tools.py:OtherName: its name is 'other', and 'count' in its schema"),
        (["Needs"], "tools.py:Needs must be made without arguments: missing a required argument: 'key'"),
        (["NoSchema"], "tools.py:NoSchema: a tool's schema must be"),
        (["Counter", "Counter"], "rollout.tools: two tools are called 'count'; give each a name of its own"),
        (["serch"], "tools.py has no 'serch'; did you mean 'search'?"),
    ],
)
def test_what_can_be_no_tool(file: Path, names: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        kinds(file, *names)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_built_in_tools_by_name() -> None:
    assert list(load_tools([ToolConfig.model_validate("calculator")], Calls())) == ["calculator"]
    with pytest.raises(ConfigError, match="no tool is called 'abacus'; there are: calculator. For one of your own"):
        load_tools([ToolConfig.model_validate("abacus")], Calls())
