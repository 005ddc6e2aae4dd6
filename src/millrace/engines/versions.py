"""Weight versions as servers tell them. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

from millrace.types import VersionSpan


def decode_version(text: str) -> int | None:
    """A version that Millrace published is a number; a server's own label (`default`, `unknown`) is none."""
    return int(text) if text.isascii() and text.isdigit() else None


def decode_spans(spans: Iterable[Mapping[str, Any]], length: int) -> tuple[VersionSpan, ...]:
    """Which version made which of `length` tokens, from [{version, start, end}]. Raises ValueError where they do not
    cover the output without a gap."""
    version_spans = tuple(VersionSpan(decode_version(span["version"]), span["start"], span["end"]) for span in spans)
    end = 0
    for span in version_spans:
        if span.start != end or span.end <= span.start:
            raise ValueError(f"the version spans {spans} have a gap or an empty span")
        end = span.end
    if end != length:
        raise ValueError(f"the version spans end at {end}, the output at {length}")
    return version_spans
