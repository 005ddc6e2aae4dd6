"""Helpers for imports that take seconds, or that need one of the package's extras."""

import gc
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from millrace.errors import ConfigError

POLICY = "OMP_WAIT_POLICY"

# The top-level modules of pyproject's extras.
EXTRAS: Mapping[str, frozenset[str]] = {
    "train": frozenset({
        "PIL", "fsspec", "huggingface_hub", "jinja2", "matplotlib", "pyarrow", "safetensors", "tokenizers", "torch",
        "transformers", "zstandard",
    }),
    "ucx": frozenset({"nixl_cu12"}),
    "hub": frozenset({"datasets"}),
    "view": frozenset({"duckdb"}),
    "mcp": frozenset({"mcp"}),
    "renderers": frozenset({"httpx", "renderers"}),
    "kv-events": frozenset({"zmq", "msgpack"}),
    "verifiers": frozenset({"verifiers"}),
    "ray": frozenset({"ray"}),
    "trl": frozenset({"accelerate", "trl"}),
    "tensorboard": frozenset({"tensorboard"}),
    "wandb": frozenset({"wandb"}),
    "mlflow": frozenset({"mlflow"}),
    "trackio": frozenset({"trackio"}),
    "otel": frozenset({"opentelemetry"}),
}  # fmt: skip


def missing_extra(error: ModuleNotFoundError) -> ConfigError | None:
    """Return an error that says what to install if the missing module belongs to an extra; None for other modules."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return ConfigError(f"{module} is not installed: pip install 'millrace[{extra}]'")
    return None


@contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """Raise ConfigError, which says what to install, if an import in the block needs an extra that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if missing := missing_extra(error):
            raise ConfigError(f"{what}: {missing}") from error
        raise


def require_modules(what: str, *modules: str) -> None:
    """Raise ConfigError, as `needs_extra` does, if one of the modules is not installed. Imports none of them."""
    with needs_extra(what):
        for module in modules:
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(name=module)


@contextmanager
def without_collecting() -> Iterator[None]:
    """Switch the garbage collector off for imports in the block.

    Imported modules are never freed, and looking for garbage takes a quarter of the three seconds that torch and
    transformers need. The objects that exist at the end of the block are excluded from later collections.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def passive_threads() -> Iterator[None]:
    """Let the threads of a torch that is imported in the block sleep while they wait for each other.

    By default OpenMP's threads keep their core busy. If another program needs a core, a step with two threads then
    takes several times as long as with one. The user's OMP_WAIT_POLICY goes first.
    """
    if POLICY in os.environ:
        yield
        return
    os.environ[POLICY] = "PASSIVE"  # OpenMP reads it when it is loaded
    try:
        yield
    finally:
        del os.environ[POLICY]  # the engines choose their own
