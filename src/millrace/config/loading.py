"""Loads a RunConfig from a YAML file and overrides.

Every mistake gives one message with the line, the reason and the nearest valid name.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import ValidationError

from millrace.config.base import Model
from millrace.config.explain import explain, is_unquoted, resolve
from millrace.config.models import RunConfig
from millrace.config.reading import Location, parse_yaml, read_yaml
from millrace.errors import ConfigError

C = TypeVar("C", bound=Model)


@overload
def load_config(
    path: Path, overrides: Sequence[str] = (), *, check: Callable[[RunConfig], None] = lambda _: None
) -> RunConfig: ...


@overload
def load_config(
    path: Path, overrides: Sequence[str] = (), *, check: Callable[[C], None] = lambda _: None, kind: type[C]
) -> C: ...


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    check: Callable[[Any], None] = lambda _: None,
    kind: type[Any] = RunConfig,
) -> Any:
    """Load a run's settings from the YAML file at `path`. kind: the model of the settings.

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
        raise ConfigError(
            f"{path}:1: {what} must be a mapping of settings, with `{next(iter(kind.model_fields))}:` at its top"
        )
    sources: dict[Location, str] = {location: f"{path}:{line}" for location, line in lines.items()}
    texts = dict(_apply(data, override, sources) for override in overrides)
    try:
        config = _validate(data, texts, path.parent, kind)
    except ValidationError as error:
        # Unknown keys come first: a missing key is often an unknown one, spelled correctly.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        explained = (explain(e, kind) for e in errors)
        messages = (f"{_source(location, sources, str(path))}: {text}" for location, text in explained)
        raise ConfigError("\n".join(messages)) from None
    try:
        check(config)
    except ConfigError as error:
        name = str(error).split(maxsplit=1)[0].rstrip(":")
        raise ConfigError(f"{_source(tuple(name.split('.')), sources, str(path))}: {error}") from error
    return config


def dump_config(config: Model) -> str:
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


def _validate(data: dict[str, Any], texts: Mapping[Location, str], folder: Path, kind: type[Model]) -> Model:
    """Validate the data of a file in `folder`. If a setting is a string, its override is used as it was written
    (`texts`).

    YAML reads the version 9.9 as a number, and users do not expect YAML's quotes on a command line.
    """
    context = {"folder": folder}
    try:
        return kind.model_validate(data, context=context)
    except ValidationError as error:
        unquoted = [e for e in error.errors() if is_unquoted(e)]
        locations = [location for e in unquoted if (location := resolve(e["loc"], kind)[0]) in texts]
        if not locations:
            raise
    for location in locations:
        section: Any = data
        for key in location[:-1]:
            section = section[key]
        section[location[-1]] = texts[location]
    return kind.model_validate(data, context=context)


def _source(location: Location, sources: Mapping[Location, str], path: str) -> str:
    """Return the file and line, or the override, that set this location or its nearest parent."""
    return next((sources[location[:n]] for n in range(len(location), 0, -1) if location[:n] in sources), path)
