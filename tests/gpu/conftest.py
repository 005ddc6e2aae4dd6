"""Tests on GPUs, with a stock engine that a variable names:

    MILLRACE_GPU_ENGINE='{"kind": "sglang", "python": "...", "version": "0.5.15"}' pytest -n0 -s tests/gpu

With `"device": "cpu"` in it, the tests themselves can be tried without a GPU.
"""

import os

import pytest
from pydantic import TypeAdapter

from millrace.config.engines import EngineConfig
from millrace.engines.stock.interpreter import StockConfig


@pytest.fixture(scope="session")
def config() -> StockConfig:
    engine = os.environ.get("MILLRACE_GPU_ENGINE")
    if engine is None:
        pytest.skip("MILLRACE_GPU_ENGINE names no engine that has GPUs")
    config: EngineConfig = TypeAdapter(EngineConfig).validate_json(engine)
    assert isinstance(config, StockConfig)
    return config
