"""Loads a RunConfig from a YAML file and overrides.

Every mistake gives one message with the line, the reason and the nearest valid name.
"""

import difflib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from millrace.config.models import RunConfig
from millrace.config.reading import Location, parse_yaml, read_yaml
from millrace.errors import ConfigError


def load_config(
    path: Path, overrides: Sequence[str] = (), *, check: Callable[[RunConfig], None] = lambda _: None
) -> RunConfig:
    """Load a run's settings from the YAML file at `path`.

        config = load_config(Path("run.yaml"), ["train.lr=1e-5", "engine.replicas=2"])

    `overrides` have the form `section.key=value`, with the value in YAML. They take precedence over the file. `check`
    validates the settings further. It raises ConfigError with a message that begins with the name of a setting, and
    the line of that setting is added to the message.

    Raises ConfigError if the file can't be read, a key is unknown, a value has the wrong type, or settings contradict
    each other.
    """
    data, lines = read_yaml(path)
    if not isinstance(data, dict):
        what = "it is empty, and" if data is None else "it"
        raise ConfigError(f"{path}:1: {what} must be a mapping of settings, with `name:` at its top")
    sources: dict[Location, str] = {location: f"{path}:{line}" for location, line in lines.items()}
    texts = dict(_apply(data, override, sources) for override in overrides)
    try:
        config = _validate(data, texts, path.parent)
    except ValidationError as error:
        # Unknown keys come first: a missing key is often an unknown one, spelled correctly.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise ConfigError("\n".join(_explain(e, sources, str(path)) for e in errors)) from None
    try:
        check(config)
    except ConfigError as error:
        name = str(error).split(maxsplit=1)[0].rstrip(":")
        raise ConfigError(f"{_source(tuple(name.split('.')), sources, str(path))}: {error}") from error
    return config


def dump_config(config: RunConfig) -> str:
    """Return the config as YAML. `load_config` reads it back to an equal config."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _apply(data: dict[str, Any], override: str, sources: dict[Location, str]) -> tuple[Location, str]:
    """Write an override into the data. Return its location and the original text of its value."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"the override {override!r} is not of the form section.key=value")
    value, _ = parse_yaml(text, f"override {override!r}")
    keys = path.split(".")
    section = data
    for depth, key in enumerate(keys[:-1]):
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise ConfigError(
                f"the override {override!r} needs a section at {'.'.join(keys[: depth + 1])}, which is a single value"
            )
    section[keys[-1]] = value
    for depth in range(1, len(keys) + 1):
        sources.setdefault(tuple(keys[:depth]), f"override {override!r}")
    sources[tuple(keys)] = f"override {override!r}"
    return tuple(keys), text


def _validate(data: dict[str, Any], texts: Mapping[Location, str], folder: Path) -> RunConfig:
    """Validate the data of a file in `folder`. If a setting is a string, its override is used as it was written
    (`texts`).

    YAML reads the version 9.9 as a number, and users do not expect YAML's quotes on a command line.
    """
    context = {"folder": folder}
    try:
        return RunConfig.model_validate(data, context=context)
    except ValidationError as error:
        unquoted = [e for e in error.errors() if _is_unquoted(e)]
        locations = [location for e in unquoted if (location := _resolve(e["loc"])[0]) in texts]
        if not locations:
            raise
    for location in locations:
        section: Any = data
        for key in location[:-1]:
            section = section[key]
        section[location[-1]] = texts[location]
    return RunConfig.model_validate(data, context=context)


def _is_unquoted(error: Any) -> bool:
    """Whether the setting is a string, and YAML read a number, a date or a boolean."""
    return error["type"] in ("string_type", "path_type") and not isinstance(error["input"], list | dict | None)


def _source(location: Location, sources: Mapping[Location, str], path: str) -> str:
    """Return the file and line, or the override, that set this location or its nearest parent."""
    return next((sources[location[:n]] for n in range(len(location), 0, -1) if location[:n] in sources), path)


def _explain(error: Any, sources: Mapping[Location, str], path: str) -> str:
    """Format one of pydantic's errors in one line: the source, the setting, the reason and a hint."""
    location, model = _resolve(error["loc"])
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _explain_kind(error, location, model, sources, path)
    source = _source(location, sources, path)
    name = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        valid = list(model.model_fields) if model else []
        hint = _nearest(str(location[-1]), valid) or f"valid here: {', '.join(valid)}"
        return f"{source}: unknown setting {name}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{source}: the setting {name} is missing"
    if name:
        quote = "; put it in quotes" if _is_unquoted(error) else ""
        return f"{source}: {name}: {message} (it is {error['input']!r}){quote}"
    return f"{source}: {message}"


def _explain_kind(
    error: Any, location: Location, model: type[BaseModel] | None, sources: Mapping[Location, str], path: str
) -> str:
    """Format the error of a section whose `kind` is wrong or missing. The kind decides which settings are valid."""
    field = model.model_fields.get(str(location[-1])) if model else None
    kinds = [str(kind) for m in _models(field.annotation) for kind in _kinds(m)] if field else []
    location = (*location, "kind")
    source, name = _source(location, sources, path), ".".join(str(part) for part in location)
    valid = f"valid kinds: {', '.join(kinds)}"
    if error["type"] == "union_tag_not_found":
        return f"{source}: the setting {name} is missing; {valid}"
    given = str(error["ctx"]["tag"])
    hint = _nearest(given, kinds)
    return f"{source}: {name}: there is no kind {given!r}; {valid}{f'; {hint}' if hint else ''}"


def _nearest(name: str, valid: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]!r}?" if nearest else ""


def _resolve(loc: Location) -> tuple[Location, type[BaseModel] | None]:
    """Return pydantic's location without the tags of discriminated unions, and the model that has its last part."""
    model: type[BaseModel] | None = RunConfig
    cleaned: list[str | int] = []
    pending: list[type[BaseModel]] = []
    for part in loc:
        if pending:
            model = next((m for m in pending if part in _kinds(m)), None)
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


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings models in an annotation."""
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return [m for choice in get_args(annotation) for m in _models(choice)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
