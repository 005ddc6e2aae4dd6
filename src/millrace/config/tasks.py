"""The settings of a task: the columns of its data, and the code that rewards and answers the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from millrace.config.base import Model
from millrace.config.paths import LocalPath, PathOrName


def _beside_config(path: str | Path, info: ValidationInfo) -> str | Path:
    """Return the absolute path of a file beside the config, if there is one; otherwise the path as it was given."""
    folder = (info.context or {}).get("folder")
    if folder is None or not (found := Path(folder, path)).exists():
        return path
    return type(path)(str(found.absolute())) if isinstance(path, str) else found.absolute()


# A file: beside the config, or else in the current folder. The second may also be the name of a module.
FilePath = Annotated[LocalPath, AfterValidator(_beside_config)]
CodePath = Annotated[PathOrName, AfterValidator(_beside_config)]


class ColumnsConfig(Model):
    """Which columns of the data make a problem."""

    prompt: str | None = None
    """Column of the prompt: a text, or a list of chat messages. None takes the first of `question`, `prompt` and
    `messages` that the data have."""
    answer: str | None = None
    """Column of the reference answer: a text or a number. None takes `answer` if the data have it."""
    system_prompt: str | None = None
    """System prompt that is put before each prompt."""


def _from_text(value: Any) -> Any:
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
        return _from_text(value)


class RewardConfig(CodeConfig):
    """A reward function (docs/tasks.md)."""

    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Weight of the function's value in the sum that is the sample's reward."""


def _as_list(value: Any) -> Any:
    """Return a single section as a list of one."""
    return [value] if isinstance(value, str | Mapping | Model) else value


RewardConfigs = Annotated[tuple[RewardConfig, ...], Field(min_length=1), BeforeValidator(_as_list)]
