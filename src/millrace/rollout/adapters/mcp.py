"""The tools of MCP servers, over stdio or streamable HTTP. One connection to each server serves all samples."""

import asyncio
import os
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Self

from millrace.config.tasks import McpConfig, ToolConfig
from millrace.errors import ConfigError
from millrace.imports import needs_extra
from millrace.rollout.toolbox import CLOSE_TIMEOUT, ToolKind
from millrace.rollout.tools import Tool, ToolError

START_TIMEOUT = 60.0  # seconds until a server has listed its tools


@asynccontextmanager
async def served(configs: Sequence[ToolConfig]) -> AsyncIterator[list[ToolKind]]:
    """Connect to the MCP servers of these settings, yield their tools, and close the connections.

    Raises ConfigError, which names the server, if one can't be started, does not answer, or has no tools.
    """
    async with AsyncExitStack() as servers:
        kinds = []
        for config in configs:
            assert config.mcp is not None
            server = await servers.enter_async_context(McpServer(config.mcp))
            kinds += [_kind(server, tool, config.timeout) for tool in server.tools]
        yield kinds


class McpServer:
    """The connection to one MCP server. It is an async context manager.

    A task of its own holds the connection, because it must be closed where it was opened. If the connection breaks, the
    call fails, and the next call opens it again.
    """

    def __init__(self, config: McpConfig) -> None:
        self.tools: list[Any] = []  # as the server lists them
        self.where = f"the MCP server {config.url or shlex.join(config.command or ())}"
        self._config = config
        self._client: Any = None
        self._holder: asyncio.Task[None] | None = None
        self._left = asyncio.Event()
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        with needs_extra(f"rollout.tools: {self.where}"):
            import mcp  # noqa: F401
        try:
            await self._open()
        except ToolError as error:
            raise ConfigError(f"rollout.tools: {error}") from error
        if not self.tools:
            await self._close()
            raise ConfigError(f"rollout.tools: {self.where} has no tools")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def call(self, name: str, arguments: Mapping[str, object]) -> str:
        """Call a tool and return its answer as text. Raises ToolError."""
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        async with self._opening:
            if self._client is None:
                await self._open()
        client = self._client
        try:
            result = await client.call_tool(name, dict(arguments))
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                self._lose(client)
            raise ToolError(str(error)) from error
        except Exception as error:  # of the transport, which has many
            self._lose(client)
            raise ToolError(f"the connection broke: {_reason(error)}") from error
        text = "\n".join(getattr(part, "text", f"[{part.type}]") for part in result.content)
        if result.is_error:
            raise ToolError(text)
        return text

    def _lose(self, client: object) -> None:
        if self._client is client:
            self._client = None

    async def _open(self) -> None:
        """Open the connection, after closing what is left of an earlier one. Raises ToolError."""
        await self._close()
        self._left = asyncio.Event()
        opened = asyncio.Event()
        self._holder = asyncio.create_task(self._hold(opened, self._left))
        waiting = asyncio.create_task(opened.wait())
        try:
            await asyncio.wait({self._holder, waiting}, timeout=START_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if opened.is_set():
            return
        late = not self._holder.done()
        error = None if late else self._holder.exception()
        await self._close()
        reason = f"it did not answer within {START_TIMEOUT:g} s" if error is None else _reason(error)
        raise ToolError(f"{self.where} can't be used: {reason}") from error

    async def _hold(self, opened: asyncio.Event, left: asyncio.Event) -> None:
        from mcp import Client, StdioServerParameters

        command = self._config.command
        server: Any = self._config.url
        if command is not None:
            server = StdioServerParameters(command=command[0], args=list(command[1:]), env=dict(os.environ))
        async with Client(server) as client:
            tools, cursor = [], None
            while True:
                page = await client.list_tools(cursor=cursor)
                tools += page.tools
                if (cursor := page.next_cursor) is None:
                    break
            self._client, self.tools = client, tools
            opened.set()
            await left.wait()

    async def _close(self) -> None:
        if self._holder is None:
            return
        self._client = None
        self._left.set()
        await asyncio.wait({self._holder}, timeout=CLOSE_TIMEOUT)
        self._holder.cancel()
        await asyncio.wait({self._holder}, timeout=CLOSE_TIMEOUT)
        if self._holder.done() and not self._holder.cancelled():
            self._holder.exception()  # a broken connection can't be closed without one
        self._holder = None


class McpTool(Tool):
    """A tool of an MCP server. It has no state of its own, so it serves all samples."""

    schema: Mapping[str, object] = {}

    def __init__(self, server: McpServer, name: str, schema: Mapping[str, object], timeout: float) -> None:
        self.name = name
        self.schema = schema
        self.timeout = timeout
        self._server = server

    async def call(self, arguments: Mapping[str, object]) -> str:
        return await self._server.call(self.name, arguments)


def _kind(server: McpServer, listed: Any, timeout: float | None) -> ToolKind:
    function = {"name": listed.name, "description": listed.description or "", "parameters": listed.input_schema}
    schema = {"type": "function", "function": function}
    tool = McpTool(server, listed.name, schema, Tool.timeout if timeout is None else timeout)
    return ToolKind(schema, lambda: tool)


def _reason(error: BaseException) -> str:
    """Return the first error in nested groups, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
