"""Importing what takes seconds, or what an extra of the package brings."""

import gc
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from millrace.errors import ConfigError

# The top-level modules of pyproject's extras.
EXTRAS: Mapping[str, frozenset[str]] = {
    "train": frozenset({
        "fsspec", "huggingface_hub", "jinja2", "matplotlib", "safetensors", "tokenizers", "torch", "transformers",
        "zstandard",
    }),
    "ucx": frozenset({"nixl_cu12"}),
    "hub": frozenset({"datasets"}),
    "kv-events": frozenset({"zmq", "msgpack"}),
}  # fmt: skip


def missing_extra(error: ModuleNotFoundError) -> ConfigError | None:
    """What to install, where the module that was not found belongs to an extra; None for any other module."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return ConfigError(f"{module} is not installed: pip install 'millrace[{extra}]'")
    return None


@contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """Raises ConfigError, which says what to install, where an import in the block lacks a module of an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if missing := missing_extra(error):
            raise ConfigError(f"{what}: {missing}") from error
        raise


def require_modules(what: str, *modules: str) -> None:
    """Raises the same where one of these modules is not installed. Imports none of them."""
    with needs_extra(what):
        for module in modules:
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(name=module)


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
