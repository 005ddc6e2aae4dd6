"""From a router's settings to a router: started here, or attached to."""

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

HOST = "127.0.0.1"  # vllm-router asks nobody for a key
ROUTER_KEY = "MILLRACE_ROUTER_API_KEY"  # of a router that somebody else started
SERVE = Path(__file__).parent / "serve.py"
ROUTERS: Mapping[str, type[RouterClient]] = {"sglang": SGLangRouter, "vllm": VLLMRouter}
# A request is sent again by Millrace, within the budget of its sample, and not by the router as well: one that kills
# engines would kill five at once, and one name would run twice.
DEFAULTS: Mapping[str, Mapping[str, ForeignArgument]] = {
    "sglang": {"disable_retries": True, "assignment_mode": "min_load", "log_level": "warn"},
    "vllm": {"disable_retries": True, "log_level": "warning"},
}


@dataclass(frozen=True, slots=True)
class StartedRouter:
    """A router that answers; `process` is None where somebody else started it."""

    router: RouterClient
    process: ServerProcess | None

    async def end(self) -> None:
        await self.router.close()
        if self.process is not None:
            await self.process.end()


async def start_router(
    config: SGLangRouterConfig | VLLMRouterConfig, *, log_dir: Path, engine_key: str | None = None
) -> StartedRouter:
    """Starts the router, without an engine in its list, or attaches to the one that the config names. `engine_key` is
    what opens all engines, for a router that knows no key of each.

    Raises LaunchError when it does not come up, with the end of its log; nothing is left running then.
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

        async def up() -> bool:  # the port may have been taken by another server, which answers for a dead one
            return await router.up() and process.running

        await process.until_healthy(up, deadline=config.start_timeout)
        return StartedRouter(router, process)
    except BaseException:
        await router.close()
        await process.end()
        raise


def arguments(config: SGLangRouterConfig | VLLMRouterConfig, port: int, metrics_port: int) -> list[str]:
    """The router's command line. What the config says goes before our defaults."""
    said = {name.replace("-", "_"): value for name, value in config.args.items()}
    defaults = {"prometheus_host": HOST, "prometheus_port": metrics_port, **DEFAULTS[config.kind]}
    own: Mapping[str, ForeignArgument] = {"host": HOST, "port": port, "policy": config.policy}
    return options({**defaults, **said, **own})
