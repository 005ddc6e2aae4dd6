"""Start an embedded engine's server."""

import secrets
import sys

from millrace.config.engines import EmbeddedEngineConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.engines.spec import Launched, LaunchSpec
from millrace.imports import require_modules
from millrace.launch.ports import free_port, require_free, unbracketed, url_of
from millrace.launch.process import ServerProcess
from millrace.types import Health


async def launch(config: EmbeddedEngineConfig, spec: LaunchSpec) -> Launched:
    """Start an embedded engine, and wait until it is healthy. See `millrace.engines.kinds.launch`.

    Raises ConfigError if torch or transformers is not installed.
    """
    require_modules("the embedded engine", "torch", "transformers", "safetensors")
    name = spec.name(config.kind)
    if config.ports is None:
        port = free_port(config.host, "engine.host")
    else:
        port = config.ports[spec.replica]
        require_free(config.host, port)
    api_key, admin_key = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    options = {
        "--model": spec.model_path,
        "--host": unbracketed(config.host),
        "--port": port,
        "--device": config.device,
        "--dtype": config.dtype,
        "--max-running-requests": config.max_running_requests,
        "--cached-prefixes": config.cached_prefixes,
        "--weight-version": spec.version,
        "--seed": spec.seed + spec.replica,
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
        name,
        command,
        spec.log_dir / f"{name}.log",
        env={"MILLRACE_API_KEY": api_key, "MILLRACE_ADMIN_API_KEY": admin_key},
    )
    url = url_of(config.host, port)
    engine = EmbeddedEngine(name, url, api_key=api_key, admin_key=admin_key)

    async def healthy() -> bool:
        return await engine.health() is Health.READY

    try:
        await process.until_healthy(healthy, deadline=config.start_timeout)
    except BaseException:
        await process.end()
        raise
    finally:
        await engine.close()
    return Launched(name, url, api_key, admin_key, process)
