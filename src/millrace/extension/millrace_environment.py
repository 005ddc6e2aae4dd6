"""Environment variables for libraries that can be configured in no other way. Engines run this file too."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def settings(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set these environment variables while the block runs."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
