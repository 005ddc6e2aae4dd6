"""From a YAML file and overrides to a RunConfig; every mistake ends in one message with the line, the reason and the
nearest valid name."""

import difflib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from millrace.config.models import RunConfig
from millrace.errors import ConfigError

Location = tuple[str | int, ...]


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's settings. `overrides` are `section.key=value`, the value in YAML; they win over the file.

    Raises ConfigError for a file that can't be read, an unknown key, a wrong type or settings that contradict each
    other.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    try:
        data = yaml.safe_load(text)
        lines = _lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of settings, with `name:` at its top")
    sources: dict[Location, str] = {location: f"{path}:{line}" for location, line in lines.items()}
    for override in overrides:
        _apply(data, override, sources)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        # An unknown key first: what is missing is often the same key, spelt rightly.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise ConfigError("\n".join(_explain(e, sources, str(path)) for e in errors)) from None


def dump_config(config: RunConfig) -> str:
    """The config as YAML that `load_config` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _lines(node: yaml.Node | None, at: Location = ()) -> dict[Location, int]:
    """The line of every key, counted from 1."""
    found: dict[Location, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            location = (*at, key.value)
            found[location] = key.start_mark.line + 1
            found |= _lines(value, location)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            location = (*at, index)
            found[location] = value.start_mark.line + 1
            found |= _lines(value, location)
    return found


def _apply(data: dict[str, Any], override: str, sources: dict[Location, str]) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"the override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of the override {override!r} is not YAML: {error}") from error
    keys = path.split(".")
    section = data
    for depth, key in enumerate(keys[:-1]):
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise ConfigError(
                f"the override {override!r} goes into {'.'.join(keys[: depth + 1])}, which is a single value"
            )
    section[keys[-1]] = value
    for depth in range(1, len(keys) + 1):
        sources.setdefault(tuple(keys[:depth]), f"override {override!r}")
    sources[tuple(keys)] = f"override {override!r}"


def _explain(error: Any, sources: Mapping[Location, str], path: str) -> str:
    """One of pydantic's errors in one line: where, which setting, what is wrong, what to write."""
    location, model = _resolve(error["loc"])
    source = next((sources[location[:n]] for n in range(len(location), 0, -1) if location[:n] in sources), path)
    name = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        valid = list(model.model_fields) if model else []
        nearest = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid here: {', '.join(valid)}"
        return f"{source}: unknown setting {name}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{source}: the setting {name} is missing"
    if name:
        return f"{source}: {name}: {message} (it is {error['input']!r})"
    return f"{source}: {message}"


def _resolve(loc: Location) -> tuple[Location, type[BaseModel] | None]:
    """Pydantic's location without the tags of discriminated unions, and the model that holds its last part."""
    model: type[BaseModel] | None = RunConfig
    cleaned: list[str | int] = []
    pending: list[type[BaseModel]] = []
    for part in loc:
        if pending:
            model = next((m for m in pending if part in get_args(m.model_fields["kind"].annotation)), None)
            pending = []
            if model is not None:
                continue
        cleaned.append(part)
        if part == loc[-1] and len(cleaned) == len(loc):
            break
        field = model.model_fields.get(str(part)) if model else None
        choices = _models(field.annotation) if field else []
        if len(choices) > 1:
            pending = choices
        elif choices:
            model = choices[0]
    return tuple(cleaned), model


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The settings models in an annotation."""
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for choice in get_args(annotation) for m in _models(choice)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
