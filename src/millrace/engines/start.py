"""From an engine's settings to an engine: launched here, or attached to."""

import os
from dataclasses import dataclass
from pathlib import Path

from millrace.config.models import EmbeddedEngineConfig, EngineConfig, SGLangEngineConfig
from millrace.engines import environments
from millrace.engines.base import Engine
from millrace.engines.embedded.launch import launch as launch_embedded
from millrace.engines.sglang.adapter import SGLangEngine
from millrace.engines.sglang.launch import launch as launch_sglang
from millrace.errors import EngineError, LaunchError
from millrace.launch.process import Server
from millrace.types import EngineInfo

# The keys of servers that somebody else started. Not in the config, which every run writes into its folder.
API_KEY, ADMIN_KEY = "MILLRACE_ENGINE_API_KEY", "MILLRACE_ENGINE_ADMIN_API_KEY"


@dataclass(frozen=True, slots=True)
class Started:
    """An engine that answers; `process` is None where somebody else started the server."""

    engine: Engine
    info: EngineInfo
    process: Server | None


async def start(
    config: EngineConfig, model_path: Path, *, replica: int, log_dir: Path, version: int, seed: int
) -> Started:
    """Brings up replica number `replica`, which serves the model in `model_path` as weight version `version`.

    Raises LaunchError, with the end of the server's log, when it does not come up; nothing is left running then.
    """
    match config:
        case EmbeddedEngineConfig():
            return Started(
                *await launch_embedded(config, model_path, replica=replica, log_dir=log_dir, version=version, seed=seed)
            )
        case SGLangEngineConfig():
            if config.urls is not None:
                return await _attach_sglang(f"sglang-{replica}", config.urls[replica], model_path)
            return await _launch_sglang(config, model_path, replica, log_dir, version, seed)


async def _launch_sglang(
    config: SGLangEngineConfig, model_path: Path, replica: int, log_dir: Path, version: int, seed: int
) -> Started:
    python = config.python or environments.find("sglang", config.version, config.device).python
    launched = await launch_sglang(
        config, model_path, python=python, replica=replica, log_dir=log_dir, version=version, seed=seed
    )
    try:
        if launched.url is None:
            raise LaunchError(
                f"node {config.node_rank} answers no HTTP; start it by `millrace engines join`, and the trainer on the "
                "host whose engine.node_rank is 0"
            )
        engine = SGLangEngine(
            launched.name, launched.url, api_key=launched.api_key, admin_key=launched.admin_key, model_path=model_path
        )
        try:
            await engine.settle()
            return Started(engine, await engine.info(), launched.process)
        except BaseException:
            await engine.close()
            raise
    except BaseException:
        await launched.process.end()
        raise


async def _attach_sglang(name: str, url: str, model_path: Path) -> Started:
    engine = SGLangEngine(
        name, url, api_key=os.environ.get(API_KEY), admin_key=os.environ.get(ADMIN_KEY), model_path=model_path
    )
    try:
        await engine.settle()
        return Started(engine, await engine.info(), None)
    except EngineError as error:
        await engine.close()
        raise LaunchError(
            f"can't attach to {url}: {error}; its keys are read from {API_KEY} and {ADMIN_KEY}"
        ) from error
    except BaseException:
        await engine.close()
        raise
