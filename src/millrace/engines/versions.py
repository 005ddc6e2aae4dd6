"""Decode the weight versions that servers report. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

from millrace.types import VersionSpan


def decode_version(text: str) -> int | None:
    """Return the version as a number, or None for a server's own label (`default`, `unknown`)."""
    return int(text) if text.isascii() and text.isdigit() else None


def decode_spans(spans: Iterable[Mapping[str, Any]], length: int) -> tuple[VersionSpan, ...]:
    """Return the version spans of `length` output tokens, from [{version, start, end}].

    Raises ValueError if they do not cover the output without a gap.
    """
    version_spans = tuple(VersionSpan(decode_version(span["version"]), span["start"], span["end"]) for span in spans)
    end = 0
    for span in version_spans:
        if span.start != end or span.end <= span.start:
            raise ValueError(f"the version spans {spans} have a gap or an empty span")
        end = span.end
    if end != length:
        raise ValueError(f"the version spans end at {end}, but the output ends at {length}")
    return version_spans
