"""The base class of all settings models."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

# The value of an engine's or a router's own argument. A dictionary becomes JSON.
ForeignArgument = str | int | float | bool | list[str | int] | dict[str, Any] | None


class Model(BaseModel):
    """Base class of all settings models. Instances are frozen, and an unknown key is an error.

    The docstring below a field is its description. `millrace config` prints it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True, init=False)
class Flag:
    """The command-line options of an engine that a setting stands for, which stand beside the setting's type:

        tp_size: Annotated[PositiveInt, Flag("sglang", "--tp-size"), Flag("vllm", "--tensor-parallel-size", "--tp")] = 1

    `engine_args` must not repeat any of them. With `passed`, the setting's value is passed on as the first option.
    """

    engine: str
    options: tuple[str, ...]
    passed: bool

    def __init__(self, engine: str, *options: str, passed: bool = True) -> None:
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "passed", passed)


def option_owners(config: type[Model], engine: str) -> Mapping[str, str]:
    """Return the name of the setting that each option of the engine belongs to."""
    return {option: name for name, flag in _flags(config, engine) for option in flag.options}


def passed_options(config: Model, engine: str) -> dict[str, Any]:
    """Return the options of the engine that settings are passed on as, with their values."""
    return {flag.options[0]: getattr(config, name) for name, flag in _flags(type(config), engine) if flag.passed}


def _flags(config: type[Model], engine: str) -> Iterator[tuple[str, Flag]]:
    for name, field in config.model_fields.items():
        for one in field.metadata:
            if isinstance(one, Flag) and one.engine == engine:
                yield name, one
