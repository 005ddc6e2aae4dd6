"""Start an embedded engine's server."""

import secrets
from dataclasses import replace
from functools import partial

from millrace.config.engines import EmbeddedEngineConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.engines.spec import Launched, LaunchSpec
from millrace.imports import require_modules
from millrace.launch.base import Need, Place
from millrace.launch.local import LOCAL, LocalPlace
from millrace.launch.nodes import Nodes
from millrace.launch.ports import free_port, require_free, unbracketed, url_of
from millrace.launch.process import Server, until_healthy
from millrace.types import Health


async def launch(config: EmbeddedEngineConfig, spec: LaunchSpec) -> Launched:
    """Start an embedded engine, and wait until it is healthy. See `millrace.engines.kinds.launch`.

    Raises ConfigError if torch or transformers is not installed.
    """
    require_modules("the embedded engine", "torch", "transformers", "safetensors")
    if spec.launcher is LOCAL:
        if config.ports is None:
            port = free_port(config.host, "engine.host")
        else:
            port = config.ports[spec.replica]
            require_free(config.host, port)
        return await _launch(config, spec, LocalPlace(config.host), port)
    spec = replace(spec, model_path=spec.model_path.absolute())
    need = Need(gpus=int(config.device.startswith("cuda")), cpus=config.threads or 1)
    places = await spec.launcher.reserve(spec.name(config.kind), need, 1, deadline=config.start_timeout)
    try:
        launched = await _launch(config, spec, places[0], await places[0].free_ports(1))
    except BaseException:
        await spec.launcher.release(places)
        raise
    released = Nodes(launched.name, [launched.process], partial(spec.launcher.release, places))
    return replace(launched, process=released)


async def _launch(config: EmbeddedEngineConfig, spec: LaunchSpec, place: Place, port: int) -> Launched:
    name = spec.name(config.kind)
    api_key, admin_key = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    env = {"MILLRACE_API_KEY": api_key, "MILLRACE_ADMIN_API_KEY": admin_key}
    if place.gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = place.gpus
    process: Server = await place.start(
        name,
        [place.python, "-m", "millrace.engines.embedded", *_arguments(config, spec, place.host, port)],
        spec.log_dir / f"{name}.log",
        env=env,
        leftovers=(),
    )
    url = url_of(place.host, port)
    engine = EmbeddedEngine(name, url, api_key=api_key, admin_key=admin_key)

    async def healthy() -> bool:
        return await engine.health() is Health.READY

    try:
        await until_healthy(process, healthy, deadline=config.start_timeout)
    except BaseException:
        await process.end()
        raise
    finally:
        await engine.close()
    return Launched(name, url, api_key, admin_key, process)


def _arguments(config: EmbeddedEngineConfig, spec: LaunchSpec, host: str, port: int) -> list[str]:
    options = {
        "--model": spec.model_path,
        "--host": unbracketed(host),
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
    arguments = [str(part) for option in options.items() for part in option]
    return [*arguments, "--faults"] if config.faults else arguments
