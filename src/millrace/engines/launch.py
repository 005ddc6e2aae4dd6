"""Launches a stock engine, of whichever kind."""

from pathlib import Path

from millrace.config.models import SGLangEngineConfig, VLLMEngineConfig
from millrace.engines import environments
from millrace.engines.sglang.launch import launch as launch_sglang
from millrace.engines.stock.launching import Launched
from millrace.engines.vllm.launch import launch as launch_vllm
from millrace.launch.interpreter import require_module

StockConfig = SGLangEngineConfig | VLLMEngineConfig


def interpreter(config: StockConfig) -> Path:
    """The one that the config names, or that of the installed environment. Raises what `environments.find` raises."""
    return config.python or environments.find(config.kind, config.version, config.device).python


async def launch(
    config: StockConfig,
    model_path: Path,
    *,
    replica: int,
    log_dir: Path,
    version: int,
    seed: int,
    prefix: str | None = None,
    api_key: str | None = None,
) -> Launched:
    """Starts replica number `replica`, by the config's interpreter or that of the installed environment, and waits
    until it is healthy. It is called `PREFIX-REPLICA`, by default after its kind.

    Raises ConfigError when engine_args or env contradict the settings, and LaunchError when there is no such engine or,
    with the end of the server's log, when it does not come up; nothing is left running then.
    """
    python, prefix = interpreter(config), prefix or config.kind
    if config.python is not None:
        await require_module(python, config.kind, setting="engine.python", env=config.env)
    match config:
        case SGLangEngineConfig():
            return await launch_sglang(
                config,
                model_path,
                python=python,
                replica=replica,
                log_dir=log_dir,
                version=version,
                seed=seed,
                prefix=prefix,
                api_key=api_key,
            )
        case VLLMEngineConfig():
            return await launch_vllm(
                config,
                model_path,
                python=python,
                replica=replica,
                log_dir=log_dir,
                seed=seed,
                prefix=prefix,
                api_key=api_key,
            )
