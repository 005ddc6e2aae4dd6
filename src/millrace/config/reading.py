"""Reads YAML together with the line of every key. Invalid or ambiguous YAML is an error with the file and the line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from millrace.errors import ConfigError

Location = tuple[str | int, ...]

# A few short lines of aliases to aliases can expand to more values than fit in memory.
MOST_VALUES = 10_000


def read_yaml(path: Path) -> tuple[Any, dict[Location, int]]:
    """Return the content of a YAML file, and the line of every key and item, counted from 1.

    Raises ConfigError if the file can't be read, is not UTF-8, or is not valid YAML.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> tuple[Any, dict[Location, int]]:
    """Return the value of a YAML text, and the line of every key and item, counted from 1.

    Error messages call the text `source`. An alias becomes a copy, so no two values in the result are the same
    object. Raises ConfigError if the text is not valid YAML.
    """
    loader = _Loader(source, text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines = dict(_lines(node))
        return _deep_copy(loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        hint = "; indent by spaces" if error.problem and "'\\t'" in error.problem else ""
        reasons = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}:{line}: it is not YAML: {reasons}{hint}") from error
    except RecursionError:
        raise ConfigError(f"{source} is not YAML: it is nested too deeply") from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """SafeLoader that adds the line to every error."""

    def __init__(self, source: str, text: str) -> None:
        try:
            super().__init__(text)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            character = f"character #x{ord(text[error.position]):04x}"
            raise ConfigError(f"{source}:{line}: it is not YAML: {character} is not allowed") from error

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r} can't be read ({error}); put text in quotes", node.start_mark
            ) from error


def _lines(root: yaml.Node) -> Iterator[tuple[Location, int]]:
    """Yield the line of every key and item.

    Raises MarkedYAMLError if a mapping has a key twice, a value contains itself, or aliases expand to too many values.
    """
    count = 0

    def walk(node: yaml.Node, at: Location, inside: tuple[yaml.Node, ...]) -> Iterator[tuple[Location, int]]:
        nonlocal count
        count += 1
        if any(node is outer for outer in inside):
            raise _problem("the value contains itself, by an alias", node)
        if count > MOST_VALUES:
            raise _problem(f"the file's aliases expand to more than {MOST_VALUES} values", node)
        match node:
            case yaml.MappingNode():
                _require_unique([key for key, _ in node.value])
                merged = [value for key, value in node.value if key.tag.endswith(":merge")]
                for value in merged:  # first, since the mapping's own keys win
                    for one in reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]:
                        yield from walk(one, at, (*inside, node))
                for key, value in node.value:
                    if not key.tag.endswith(":merge") and isinstance(key, yaml.ScalarNode):
                        yield (*at, key.value), key.start_mark.line + 1
                        yield from walk(value, (*at, key.value), (*inside, node))
            case yaml.SequenceNode():
                for index, item in enumerate(node.value):
                    yield (*at, index), item.start_mark.line + 1
                    yield from walk(item, (*at, index), (*inside, node))

    return walk(root, (), ())


def _require_unique(keys: list[yaml.Node]) -> None:
    seen: dict[str, yaml.Node] = {}
    for key in keys:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem("a key is a list or a mapping; it must be a name", key)
        if first := seen.get(key.value):
            raise _problem(f"the key {key.value} is set twice, first in line {first.start_mark.line + 1}", key)
        seen[key.value] = key


def _problem(message: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=node.start_mark)


def _deep_copy(value: Any) -> Any:
    """Copy a value so that each alias becomes an object of its own. An override of one place changes no other place."""
    match value:
        case dict():
            return {key: _deep_copy(one) for key, one in value.items()}
        case list():
            return [_deep_copy(one) for one in value]
    return value
