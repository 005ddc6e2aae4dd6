"""The tools of real MCP servers: over stdio and HTTP, and when the server fails."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from millrace.config.tasks import McpConfig, ToolConfig
from millrace.errors import ConfigError
from millrace.launch.ports import free_port
from millrace.rollout import Tool, ToolCall
from millrace.rollout.adapters.mcp import served
from millrace.rollout.toolbox import by_name
from millrace.rollout.tools import answer_tool_call
from tests.ports import listens

pytest.importorskip("mcp", reason="the extra millrace[mcp] is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "mcp_tools" / "server.py"
SERVER = f'''
import os, sys, time
sys.path.insert(0, {str(EXAMPLE.parent)!r})
from server import server

@server.tool()
def die() -> str:
    """Dies."""
    os._exit(3)

@server.tool()
def hang() -> str:
    """Hangs."""
    time.sleep(60)

@server.tool()
def pid() -> int:
    """Returns the server's process id."""
    return os.getpid()

server.run("stdio")
'''


@asynccontextmanager
async def tools(config: McpConfig, timeout: float = 30.0) -> AsyncIterator[dict[str, Tool]]:
    async with served([ToolConfig(mcp=config, timeout=timeout)]) as kinds:
        yield {name: kind.make() for name, kind in by_name(kinds).items()}


def stdio(path: Path, *arguments: str) -> McpConfig:
    return McpConfig(command=(sys.executable, str(path), *arguments))


async def call(tools: Mapping[str, Tool], name: str, **arguments: object) -> str:
    return (await answer_tool_call(ToolCall(name, arguments), tools)).text


@pytest.fixture
def server(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(SERVER)
    return tmp_path / "own.py"


async def check_example(tools: Mapping[str, Tool]) -> None:
    function: Any = tools["calculator"].schema["function"]
    assert function["description"].startswith("Evaluates two numbers and an operator")
    assert function["parameters"]["properties"]["expression"]["type"] == "string"
    answers = await asyncio.gather(*(call(tools, "calculator", expression=f"{n} * 7") for n in range(20)))
    assert list(answers) == [str(7 * n) for n in range(20)]
    assert "? is no operator" in await call(tools, "calculator", expression="1 ? 2")
    assert (await call(tools, "calculator", text="1 + 2")).startswith("Error: ")


async def test_a_server_over_stdio() -> None:
    async with tools(stdio(EXAMPLE)) as own:
        await check_example(own)


async def test_a_server_over_http() -> None:
    port = free_port("127.0.0.1")
    process = subprocess.Popen([sys.executable, str(EXAMPLE), str(port)])  # noqa: ASYNC220
    try:
        async with asyncio.timeout(60):
            while not await listens(port):
                await asyncio.sleep(0.05)
        async with tools(McpConfig(url=f"http://127.0.0.1:{port}/mcp")) as own:
            await check_example(own)
    finally:
        process.kill()
        process.wait()


async def test_a_server_that_dies_is_an_answer_and_is_started_again(server: Path) -> None:
    async with tools(stdio(server)) as own:
        first = int(await call(own, "pid"))
        assert (await call(own, "die")).startswith("Error: ")
        second = int(await call(own, "pid"))
        os.kill(second, signal.SIGKILL)
        assert first != second
        answers = [await call(own, "pid") for _ in range(2)]
        third = int(answers[-1])
    for pid in (first, second, third):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_call_that_hangs_is_an_answer_within_its_timeout(server: Path) -> None:
    async with tools(stdio(server), timeout=0.5) as own:
        assert await call(own, "hang") == "Error: no answer after 0.5 s"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("no-such-program",), "rollout.tools: the MCP server no-such-program can't be used: FileNotFoundError"),
        ((sys.executable, "-c", "raise SystemExit(3)"), "can't be used: "),
        ((sys.executable, "-c", "from mcp.server.mcpserver import MCPServer; MCPServer('x').run()"), "has no tools"),
    ],
)
async def test_a_server_that_does_not_start_is_one_line(command: Sequence[str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        async with tools(McpConfig(command=tuple(command))):
            raise AssertionError("it was opened")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


async def test_a_url_where_nothing_serves_is_one_line() -> None:
    port = free_port("127.0.0.1")
    with pytest.raises(ConfigError, match=rf"the MCP server http://127.0.0.1:{port}/mcp can't be used: "):
        async with tools(McpConfig(url=f"http://127.0.0.1:{port}/mcp")):
            raise AssertionError("it was opened")
