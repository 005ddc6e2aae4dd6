"""Fixtures that many tests need, such as a small model on disk."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from millrace.config.sources import TinyModelConfig
from millrace.engines import environments
from millrace.imports import without_collecting

with without_collecting():
    import torch

    from millrace.train.tiny import make_tiny_model

# Assertions in helpers show as much as those in tests.
for package in Path(__file__).parent.glob("*/__init__.py"):
    pytest.register_assert_rewrite(f"tests.{package.parent.name}")

# An example that is slow because the machine is busy is not a failure.
settings.register_profile("millrace", deadline=None)
settings.load_profile("millrace")


STOCK_ENGINES = {"sglang_python", "vllm_python"}


def pytest_configure() -> None:
    """Limits torch to one thread, here and in child processes. The tests share the cores. Threads that wait for each
    other would spin on them and take several times as long."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that start stock engines first. Each takes minutes, and at the end the other workers would wait
    for one."""
    files = {
        item.path for item in items if isinstance(item, pytest.Function) and STOCK_ENGINES & set(item.fixturenames)
    }
    items.sort(key=lambda item: item.path not in files)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Qwen3 with random weights, its tokenizer and chat template. Its heads have 32 elements,
    since vLLM's attention on the CPU has no kernel for 16."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(TinyModelConfig(kind="tiny", hidden_size=64, heads=2), 0, folder)
    return folder


@pytest.fixture(scope="session")
def sglang_python() -> Callable[[str], Path]:
    """Returns the interpreter of real SGLang on the CPU for a version. A missing environment is made, which takes two
    minutes, and kept in the cache for the next run."""

    def python(version: str) -> Path:
        return environments.install("sglang", version, "cpu", python=sys.executable, progress=lambda *_: None).python

    return python


@pytest.fixture(scope="session")
def router_python() -> Callable[[str], Path]:
    """Returns the interpreter of a real router, by its kind. A missing environment is made."""

    def python(kind: str) -> Path:
        name = f"{kind}-router"
        version = environments.DEFAULT_VERSIONS[name]
        return environments.install(name, version, "cpu", python=sys.executable, progress=lambda *_: None).python

    return python


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of real vLLM on the CPU. A missing environment is made, as for SGLang."""
    return environments.install("vllm", "0.32.0", "cpu", python=sys.executable, progress=lambda *_: None).python
