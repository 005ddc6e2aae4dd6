"""What has changed between the settings that a run was started with and those that it is resumed with."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

LONGEST = 200  # characters of a value
MISSING = object()
PASSWORD = re.compile(r"(?<=://)[^/@\s\"]+(?=@)")  # in a URL


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting whose value differs, with its old and new value, in the order of `now`.

    Values of environment variables, and passwords in URLs, are not shown.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        f"{'.'.join(name)}: {_shown(name, old.get(name, MISSING))} -> {_shown(name, new.get(name, MISSING))}"
        for name in {**new, **old}
        if old.get(name) != new.get(name)
    ]


def _flat(settings: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, (*above, str(name)))
        else:
            yield (*above, str(name)), value


def _shown(name: tuple[str, ...], value: object) -> str:
    if value is MISSING:
        return "not set"
    if "env" in name[:-1]:
        return "***"
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    text = PASSWORD.sub("***", text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
