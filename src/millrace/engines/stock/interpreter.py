"""The Python interpreter of a stock engine."""

from pathlib import Path

from millrace.config.engines import SGLangEngineConfig, VLLMEngineConfig
from millrace.engines import environments
from millrace.launch.interpreter import require_module

StockConfig = SGLangEngineConfig | VLLMEngineConfig


def interpreter(config: StockConfig) -> Path:
    """Return the config's interpreter, or that of the installed environment. Raises what `environments.find` raises."""
    return config.python or environments.find(config.kind, config.version, config.device).python


async def checked_interpreter(config: StockConfig) -> Path:
    """Return the interpreter. Raises LaunchError if the engine is not installed for the config's interpreter."""
    python = interpreter(config)
    if config.python is not None:
        await require_module(python, config.kind, setting="engine.python", env=config.env)
    return python
