"""The settings of a task: the columns of its data, and the code that rewards and answers the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, ValidationInfo, model_validator

from millrace.config.base import Model
from millrace.config.paths import LocalPath, PathOrName


def _beside_config(path: str | Path, info: ValidationInfo) -> str | Path:
    """Return the absolute path of a file beside the config, if there is one; otherwise the path as it was given."""
    folder = (info.context or {}).get("folder")
    if folder is None or not (found := Path(folder, path)).exists():
        return path
    return type(path)(str(found.absolute())) if isinstance(path, str) else found.absolute()


def _file_beside_config(part: str, info: ValidationInfo) -> str:
    """As `_beside_config`, for files only: a module may have the name of a folder."""
    try:
        found = Path(_beside_config(part, info))
        return str(found) if found.is_file() else part
    except OSError:  # it is too long for a path: a program's text, as in `bash -c TEXT`
        return part


# Data, a Python file or a module, and a part of a command. Files are looked for beside the config, or else in the
# current folder.
FilePath = Annotated[LocalPath, AfterValidator(_beside_config)]
CodePath = Annotated[PathOrName, AfterValidator(_file_beside_config)]
CommandPart = Annotated[str, AfterValidator(_file_beside_config)]


class ColumnsConfig(Model):
    """Which columns of the data make a problem."""

    prompt: str | None = None
    """Column of the prompt: a text, or a list of chat messages. None takes the first of `question`, `prompt` and
    `messages` that the data have."""
    answer: str | None = None
    """Column of the reference answer: a text or a number. None takes `answer` if the data have it."""
    images: str | None = None
    """Column of the prompt's images: one, or a list of them (docs/tasks.md). None takes the first of `images` and
    `image` that the data have."""
    system_prompt: str | None = None
    """System prompt that is put before each prompt."""


def from_text(value: Any) -> Any:
    """Return the shorthand `file.py:name` as a mapping."""
    if isinstance(value, str):
        path, _, name = value.rpartition(":")
        if not path:
            raise ValueError("write it as file.py:name or package.module:name")
        return {"path": path, "name": name}
    return value


class CodeConfig(Model):
    """A function or a class in a Python file or module. `file.py:name` is short for path and name."""

    path: CodePath
    """A Python file, beside the config or in the current folder, or an importable module such as `package.module`."""
    name: str
    """Name of the function or class."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return from_text(value)


class McpConfig(Model):
    """An MCP server, all tools of which the model may call. It needs the extra `millrace[mcp]`."""

    command: Annotated[tuple[CommandPart, ...], Field(min_length=1)] | None = None
    """The command that starts the server, which speaks over its stdin and stdout: `[python, server.py]`. Files are
    looked for beside the config first."""
    url: str | None = None
    """URL of a running server that speaks streamable HTTP, such as `http://127.0.0.1:8000/mcp`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.command is None) == (self.url is None):
            raise ValueError("an MCP server has either a command or a url")
        return self


class ToolConfig(Model):
    """A tool that the model may call, or the tools of an MCP server (docs/tasks.md). `calculator` is short for the
    built-in tool of this name, and `file.py:name` for path and name."""

    path: CodePath | None = None
    """A Python file or module, as in `reward`. None is a built-in tool."""
    name: str | None = None
    """Name of a function, of a subclass of `millrace.rollout.Tool`, or of a built-in tool: `calculator`."""
    mcp: McpConfig | None = None
    """An MCP server, in place of path and name."""
    timeout: PositiveFloat | None = None
    """Seconds for each call. None keeps the tool's own, which is 30 unless its class sets another."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) and ":" not in value else from_text(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.mcp is None) == (self.name is None) or (self.mcp is not None and self.path is not None):
            raise ValueError("a tool has either a name, with or without a path, or an mcp section")
        return self


class EnvironmentConfig(Model):
    """What answers the model's turns with observations and rewards (docs/tasks.md): a class, an OpenEnv server, or a
    verifiers environment. `file.py:name` is short for path and name."""

    path: CodePath | None = None
    """A Python file or module with the class, as in `reward`."""
    name: str | None = None
    """Name of the class."""
    openenv: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """URL of a running OpenEnv server, such as `http://127.0.0.1:8000`, in place of path and name."""
    verifiers: str | None = None
    """Id of an installed verifiers taskset, in place of path and name. It needs the extra `millrace[verifiers]`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """For a class, the keyword arguments with which each episode makes it. For an OpenEnv server, keyword arguments of
    `reset`, to which those of the row are added. For verifiers, its `env` section."""
    timeout: PositiveFloat = 60.0
    """Seconds for each call of `reset` and `step`."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return from_text(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = [self.path, self.openenv, self.verifiers]
        if sum(kind is not None for kind in kinds) != 1 or (self.path is None) != (self.name is None):
            raise ValueError("an environment is one of: path and name of a class, openenv, verifiers")
        return self


class RewardConfig(CodeConfig):
    """A reward function (docs/tasks.md)."""

    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Weight of the function's value in the sum that is the sample's reward."""


def _as_list(value: Any) -> Any:
    """Return a single section as a list of one."""
    return [value] if isinstance(value, str | Mapping | Model) else value


RewardConfigs = Annotated[tuple[RewardConfig, ...], Field(min_length=1), BeforeValidator(_as_list)]


IN_PLACE_OF = {
    "reward": "the environment gives the reward in its steps",
    "rollout.tools": "the environment answers the model, and names its own tools",
    "judges": "the environment gives the reward in its steps",
    "warmup": "the warm-up teaches conversations with the calculator",
    "data.prompt": "the environment makes the prompt in `reset`",
    "evaluation.data.prompt": "the environment makes the prompt in `reset`",
    "data.images": "the environment makes the prompt in `reset`",
    "evaluation.data.images": "the environment makes the prompt in `reset`",
}


def check_environment(settings: Mapping[str, object]) -> None:
    """Raise ValueError if one of the settings, by name, is set together with an environment."""
    for name, value in settings.items():
        if value:
            raise ValueError(
                f"{name} can't be set together with environment: {IN_PLACE_OF[name]}; leave one of them out"
            )
