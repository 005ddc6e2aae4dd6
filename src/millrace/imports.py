"""Importing what takes seconds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """What is imported in the block stays, so Python's garbage collector has no work there, and would take a quarter of
    the three seconds of torch and transformers to find that out. What is there at the end is not looked at again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
