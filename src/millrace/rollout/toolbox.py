"""The tools of a run: built-in ones, functions and classes of the user. Each episode gets instances of its own."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import orjson

from millrace.config.tasks import ToolConfig
from millrace.errors import ConfigError, UserCodeError
from millrace.rollout.calls import Calls
from millrace.rollout.tools import BUILT_IN, Tool
from millrace.rollout.user_code import load_code, place, said

log = logging.getLogger(__name__)

CLOSE_TIMEOUT = 10.0  # seconds for the `close` of a tool or an environment

MakeTool = Callable[[], Tool]


class FunctionTool(Tool):
    """A function of the user as a tool. Sync functions run in threads.

    schema: as `transformers.utils.get_json_schema` makes it from type hints and docstring.
    """

    schema: Mapping[str, object] = {}

    def __init__(
        self, function: Callable[..., object], schema: Mapping[str, object], calls: Calls, timeout: float
    ) -> None:
        self.name = name_in(schema)
        self.schema = schema
        self.timeout = timeout
        self._function = function
        self._calls = calls

    async def call(self, arguments: Mapping[str, object]) -> str:
        # The caller's deadline comes first.
        answer = await self._calls.run(self._function, arguments, deadline=2 * self.timeout)
        if isinstance(answer, str):
            return answer
        return orjson.dumps(answer, default=str, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS).decode()


@dataclass(frozen=True, slots=True)
class ToolKind:
    """A tool of a run. schema: what the prompts describe. make: makes the instance of an episode."""

    schema: Mapping[str, object]
    make: MakeTool


def load_tools(configs: Sequence[ToolConfig], calls: Calls) -> dict[str, ToolKind]:
    """Return the tools of the settings, except those of MCP servers, by the names that the model calls them by.

    Raises ConfigError if one can't be used, or two have one name.
    """
    kinds = []
    for config in configs:
        if config.name is not None and config.path is not None:
            kinds.append(_own(config.path, config.name, config.timeout, calls))
        elif config.name is not None:
            kinds.append(_built_in(config.name, config.timeout))
    return by_name(kinds)


def by_name(kinds: Iterable[ToolKind]) -> dict[str, ToolKind]:
    """Return tools by the names in their schemas. Raises ConfigError if two have one name."""
    named: dict[str, ToolKind] = {}
    for kind in kinds:
        if (name := name_in(kind.schema)) in named:
            raise ConfigError(f"rollout.tools: two tools are called {name!r}; give each a name of its own")
        named[name] = kind
    return named


@asynccontextmanager
async def opened(makers: Mapping[str, MakeTool]) -> AsyncIterator[dict[str, Tool]]:
    """Make the tools of an episode, and close all of them at its end.

    Raises UserCodeError if a tool can't be made. A tool that can't be closed is logged.
    """
    tools: dict[str, Tool] = {}
    try:
        for name, make in makers.items():
            try:
                tools[name] = make()
            except Exception as error:  # the user's constructor may raise anything
                raise UserCodeError(f"the tool {name!r} can't be made: {said(error)}") from error
        yield tools
    finally:
        await asyncio.gather(*(closed(f"the tool {name!r}", tool.close) for name, tool in tools.items()))


async def closed(what: str, close: Callable[[], object]) -> None:
    """Call an async `close` within CLOSE_TIMEOUT. Failures are logged, since what was closed is not needed any more."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            result = close()
            if inspect.isawaitable(result):
                await result
    except TimeoutError:
        log.warning("%s was not closed within %g s", what, CLOSE_TIMEOUT)
    except Exception as error:  # the user's code may raise anything
        log.warning("%s was not closed: %s", what, said(error))


def name_in(schema: Mapping[str, object]) -> str:
    """Return the function's name in a JSON schema. Raises ConfigError if it has none."""
    match schema:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
        case _:
            raise ConfigError(
                'a tool\'s schema must be {"type": "function", "function": {"name": ..., "description": ..., '
                f'"parameters": ...}}}}, and is {" ".join(repr(schema).split())[:80]}'
            )


def _built_in(name: str, timeout: float | None) -> ToolKind:
    if name not in BUILT_IN:
        raise ConfigError(
            f"rollout.tools: no tool is called {name!r}; there are: {', '.join(BUILT_IN)}. For one of your own "
            f"write file.py:{name}"
        )
    return _of_class(BUILT_IN[name], name, timeout)


def tool_kind(code: object, where: str, timeout: float | None, calls: Calls) -> ToolKind:
    """Return the tool of a function or a subclass of Tool.

    where: its name in error messages. timeout: seconds for each call; None for the tool's own.

    Raises ConfigError if it can't be used.
    """
    if isinstance(code, type):
        if not issubclass(code, Tool):
            raise ConfigError(f"{where} is a class, but no subclass of millrace.rollout.Tool")
        return _of_class(code, where, timeout)
    if not callable(code):
        raise ConfigError(f"{where} is neither a function nor a subclass of millrace.rollout.Tool")
    schema = _schema_of(code, where)
    tool = FunctionTool(code, schema, calls, Tool.timeout if timeout is None else timeout)
    return ToolKind(schema, lambda: tool)  # it has no state, so it serves all episodes


def _own(path: str, name: str, timeout: float | None, calls: Calls) -> ToolKind:
    code, where = load_code(path, name, "rollout.tools"), f"rollout.tools: {place(path, name)}"
    return tool_kind(code, where, timeout, calls)


def _of_class(code: type[Tool], where: str, timeout: float | None) -> ToolKind:
    if missing := sorted(code.__abstractmethods__):
        raise ConfigError(f"{where} lacks {' and '.join(missing)}")
    if not inspect.iscoroutinefunction(code.call):
        raise ConfigError(f"{where}: write `async def call(self, arguments)`")
    try:
        inspect.signature(code).bind()
    except TypeError as error:
        raise ConfigError(f"{where} must be made without arguments: {error}") from error
    try:
        schema = code.__new__(code).schema  # an attribute of the class, or a property that needs no constructor
        name = name_in(schema)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{where}: its schema can't be read from the class: {said(error)}") from error
    if getattr(code, "name", name) != name:
        raise ConfigError(f"{where}: its name is {code.name!r}, and {name!r} in its schema")

    def make() -> Tool:
        tool = code()
        if timeout is not None:
            tool.timeout = timeout
        return tool

    return ToolKind(schema, make)


def _schema_of(function: Callable[..., object], where: str) -> Mapping[str, object]:
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        schema: Mapping[str, object] = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{where} needs a docstring with an `Args:` section and a type for each parameter: {reason}"
        ) from error
    return schema
