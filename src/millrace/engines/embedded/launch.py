"""Starts an embedded engine's server."""

import secrets
import sys
from pathlib import Path

from millrace.config.models import EmbeddedEngineConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.imports import require_modules
from millrace.launch.ports import free_port, require_free, unbracketed, url_of
from millrace.launch.process import ServerProcess
from millrace.types import EngineInfo, Health


async def launch(
    config: EmbeddedEngineConfig,
    model_path: Path,
    *,
    replica: int,
    log_dir: Path,
    version: int,
    seed: int,
    prefix: str = "embedded",
) -> tuple[EmbeddedEngine, EngineInfo, ServerProcess]:
    """Starts replica number `replica`, called `PREFIX-REPLICA`, and waits until it is healthy. The keys are made here
    and known to nobody else.

    Raises ConfigError where torch or transformers is not installed, and LaunchError, with the end of the server's log,
    when it does not come up; nothing is left running then.
    """
    require_modules("the embedded engine", "torch", "transformers", "safetensors")
    name = f"{prefix}-{replica}"
    if config.ports is None:
        port = free_port(config.host, "engine.host")
    else:
        port = config.ports[replica]
        require_free(config.host, port)
    api_key, admin_key = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    options = {
        "--model": model_path,
        "--host": unbracketed(config.host),
        "--port": port,
        "--device": config.device,
        "--dtype": config.dtype,
        "--max-running-requests": config.max_running_requests,
        "--cached-prefixes": config.cached_prefixes,
        "--weight-version": version,
        "--seed": seed + replica,
    }
    if config.context_length is not None:
        options["--context-length"] = config.context_length
    if config.threads is not None:
        options["--threads"] = config.threads
    command = [sys.executable, "-m", "millrace.engines.embedded"]
    command += [str(part) for option in options.items() for part in option]
    if config.faults:
        command.append("--faults")
    process = await ServerProcess.start(
        name, command, log_dir / f"{name}.log", env={"MILLRACE_API_KEY": api_key, "MILLRACE_ADMIN_API_KEY": admin_key}
    )
    engine = EmbeddedEngine(name, url_of(config.host, port), api_key=api_key, admin_key=admin_key)

    async def healthy() -> bool:
        return await engine.health() is Health.READY

    try:
        await process.until_healthy(healthy, deadline=config.start_timeout)
        return engine, await engine.info(), process
    except BaseException:
        await engine.close()
        await process.end()
        raise
