"""Starts the router that the settings name, or attaches to it."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from millrace.config.base import ForeignArgument
from millrace.config.routers import SGLangRouterConfig, VLLMRouterConfig
from millrace.engines import environments
from millrace.engines.stock.arguments import options
from millrace.errors import LaunchError
from millrace.launch.interpreter import require_module
from millrace.launch.ports import free_port
from millrace.launch.process import ServerProcess
from millrace.routers.base import RouterClient
from millrace.routers.sglang import SGLangRouter
from millrace.routers.vllm import VLLMRouter

HOST = "127.0.0.1"  # only this host, since vllm-router asks for no key
ROUTER_KEY = "MILLRACE_ROUTER_API_KEY"  # the key of a router that Millrace did not start
SERVE = Path(__file__).parent / "serve.py"
ROUTERS: Mapping[str, type[RouterClient]] = {"sglang": SGLangRouter, "vllm": VLLMRouter}
# Routers must not retry requests. Millrace does so within the limits of the sample. A router's retries would let a
# request that kills engines kill five of them, and run one request id twice.
DEFAULTS: Mapping[str, Mapping[str, ForeignArgument]] = {
    "sglang": {"disable_retries": True, "assignment_mode": "min_load", "log_level": "warn"},
    "vllm": {"disable_retries": True, "log_level": "warning"},
}


@dataclass(frozen=True, slots=True)
class StartedRouter:
    """A running router. `process` is None if Millrace did not start it."""

    router: RouterClient
    process: ServerProcess | None

    async def end(self) -> None:
        """Close the client, and end the router if Millrace started it."""
        await self.router.close()
        if self.process is not None:
            await self.process.end()


async def start_router(
    config: SGLangRouterConfig | VLLMRouterConfig, *, log_dir: Path, engine_key: str | None = None
) -> StartedRouter:
    """Start the router with an empty list of engines, or attach to the router at `config.url`.

    `engine_key` is the API key of all engines. It is for a router that does not store a key for each engine.

    Raises LaunchError, with the end of the router's log, if the router does not start or answer. No process is left
    running then.
    """
    name = f"{config.kind}-router"
    if config.url is not None:
        router = ROUTERS[config.kind](name, config.url, key=engine_key or os.environ.get(ROUTER_KEY))
        if not await router.up():
            await router.close()
            raise LaunchError(f"no {name} answers at {config.url}")
        return StartedRouter(router, None)
    python = config.python or environments.find(name, config.version, "cpu").python
    if config.python is not None:
        await require_module(python, f"{config.kind}_router", setting="router.python")
    port, key = free_port(HOST), secrets.token_urlsafe(24)
    process = await ServerProcess.start(
        name,
        [str(python.absolute()), str(SERVE), config.kind, *arguments(config, port, free_port(HOST))],
        log_dir / f"{name}.log",
        env={ROUTER_KEY: key},
    )
    router = ROUTERS[config.kind](name, f"http://{HOST}:{port}", key=engine_key or key)
    try:

        async def up() -> bool:  # if the router is dead, another server may answer on its port
            return await router.up() and process.running

        await process.until_healthy(up, deadline=config.start_timeout)
        return StartedRouter(router, process)
    except BaseException:
        await router.close()
        await process.end()
        raise


def arguments(config: SGLangRouterConfig | VLLMRouterConfig, port: int, metrics_port: int) -> list[str]:
    """Return the router's command-line arguments. Values from the config take precedence over our defaults."""
    given = {name.replace("-", "_"): value for name, value in config.args.items()}
    defaults = {"prometheus_host": HOST, "prometheus_port": metrics_port, **DEFAULTS[config.kind]}
    own: Mapping[str, ForeignArgument] = {"host": HOST, "port": port, "policy": config.policy}
    return options({**defaults, **given, **own})
