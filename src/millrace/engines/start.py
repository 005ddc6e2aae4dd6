"""From an engine's settings to an engine: launched here, or attached to."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from millrace.config.models import EmbeddedEngineConfig, EngineConfig, SGLangEngineConfig, VLLMEngineConfig
from millrace.engines.base import Engine
from millrace.engines.embedded.launch import launch as launch_embedded
from millrace.engines.launch import StockConfig, launch
from millrace.engines.sglang.adapter import SGLangEngine
from millrace.engines.stock.engine import StockEngine
from millrace.engines.stock.kv_events import require_packages
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.errors import ConfigError, EngineError, EngineRefused, LaunchError
from millrace.launch.process import Server
from millrace.types import EngineInfo

# The keys of servers that somebody else started. Not in the config, which every run writes into its folder.
API_KEY, ADMIN_KEY = "MILLRACE_ENGINE_API_KEY", "MILLRACE_ENGINE_ADMIN_API_KEY"
ENGINES: Mapping[str, type[StockEngine]] = {"sglang": SGLangEngine, "vllm": VLLMEngine}


@dataclass(frozen=True, slots=True)
class Replica:
    """An engine that answers; `process` is None where somebody else started the server. `kv_events`: where it publishes
    what its KV cache has, if it was told to."""

    engine: Engine
    info: EngineInfo
    process: Server | None
    kv_events: str | None = None

    async def end(self) -> None:
        """Gives the connections back, and ends the process that was started here."""
        await self.engine.close()
        if self.process is not None:
            await self.process.end()


async def start(
    config: EngineConfig,
    model_path: Path,
    *,
    replica: int,
    log_dir: Path,
    version: int,
    seed: int,
    prefix: str | None = None,
    api_key: str | None = None,
) -> Replica:
    """Brings up replica number `replica`, which serves the model in `model_path` as weight version `version`. It is
    called `PREFIX-REPLICA`, by default after its kind. `api_key` opens the data calls of a stock engine that is
    launched (None: a new key).

    Raises LaunchError, with the end of the server's log, when it does not come up; nothing is left running then.
    """
    prefix = prefix or config.kind
    match config:
        case EmbeddedEngineConfig():
            return Replica(
                *await launch_embedded(
                    config, model_path, replica=replica, log_dir=log_dir, version=version, seed=seed, prefix=prefix
                )
            )
        case SGLangEngineConfig() | VLLMEngineConfig():
            if config.urls is not None:
                return await _attach(config, config.urls[replica], model_path, f"{prefix}-{replica}")
            return await _launch(config, model_path, replica, log_dir, version, seed, prefix, api_key)


async def _launch(
    config: StockConfig,
    model_path: Path,
    replica: int,
    log_dir: Path,
    version: int,
    seed: int,
    prefix: str,
    api_key: str | None,
) -> Replica:
    if config.kv_events:
        require_packages()
    launched = await launch(
        config,
        model_path,
        replica=replica,
        log_dir=log_dir,
        version=version,
        seed=seed,
        prefix=prefix,
        api_key=api_key,
    )
    try:
        if launched.url is None:
            raise LaunchError(
                f"node {config.node_rank} answers no HTTP; start it by `millrace engines join`, and the trainer on the "
                "host whose engine.node_rank is 0"
            )
        engine = ENGINES[config.kind](
            launched.name, launched.url, api_key=launched.api_key, admin_key=launched.admin_key, model_path=model_path
        )
        return replace(await _settled(engine, version, launched.process), kv_events=launched.kv_events)
    except BaseException:
        await launched.process.end()
        raise


async def _attach(config: StockConfig, url: str, model_path: Path, name: str) -> Replica:
    engine = ENGINES[config.kind](
        name,
        url,
        api_key=os.environ.get(API_KEY),
        admin_key=os.environ.get(ADMIN_KEY),
        model_path=model_path,
    )
    try:
        started = await _settled(engine, None, None)
    except EngineError as error:
        raise LaunchError(f"can't attach to {url}: {error}{about_keys(error)}") from error
    if config.dtype not in ("auto", started.info.dtype):
        await started.end()
        has = started.info.dtype or "a dtype that it does not name (it was started with `--dtype auto`)"
        raise ConfigError(
            f"engine.dtype is {config.dtype}, and the server at {url} computes in {has}; leave engine.dtype out, or "
            f"start the server with --dtype {config.dtype}"
        )
    return started


def about_keys(error: EngineError) -> str:
    """Where a server's keys are read from, if it was for its keys that it refused."""
    wanted = isinstance(error, EngineRefused) and any(f"HTTP {status}" in str(error) for status in (401, 403))
    return f"; its keys are read from {API_KEY} and {ADMIN_KEY}" if wanted else ""


async def _settled(engine: StockEngine, version: int | None, process: Server | None) -> Replica:
    try:
        await engine.settle(version)
        return Replica(engine, await engine.info(), process)
    except BaseException:
        await engine.close()
        raise
