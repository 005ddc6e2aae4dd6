"""Loads a run's settings for the commands."""

from collections.abc import Sequence
from pathlib import Path

from millrace.config import RunConfig, load_config
from millrace.config.engines import SGLangEngineConfig, VLLMEngineConfig
from millrace.config.serve import ServeConfig
from millrace.engines.sglang import arguments as sglang
from millrace.engines.vllm import arguments as vllm
from millrace.errors import ConfigError
from millrace.http.client import server_url


def load_settings(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Load a run's settings with `load_config`, and check its URLs and the engine's own arguments.

    Raises ConfigError, with the line of the setting.
    """
    return load_config(path, overrides, check=check_engine)


def check_engine(config: RunConfig | ServeConfig) -> None:
    """Check the URLs of a config and the engine's own arguments. Raises ConfigError."""
    named = [("publish.sidecars", url) for url in config.publish.sidecars]
    named += [("engine.urls", url) for url in config.engine.urls or ()]
    if config.router is not None and config.router.url is not None:
        named.append(("router.url", config.router.url))
    for setting, url in named:
        try:
            server_url(url)
        except ConfigError as error:
            raise ConfigError(f"{setting}: {error}") from error
    if isinstance(config.engine, SGLangEngineConfig):
        sglang.require_no_contradiction(config.engine)
    if isinstance(config.engine, VLLMEngineConfig):
        vllm.require_no_contradiction(config.engine)
