"""`millrace serve`: a fleet of engines with the gateway for agents."""

import asyncio
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from millrace.cli.paths import path
from millrace.cli.settings import check_engine
from millrace.cli.status import INTERRUPTED
from millrace.config.loading import load_config
from millrace.config.serve import ServeConfig
from millrace.errors import ConfigError
from millrace.fleet.event_log import EventLog
from millrace.http.hosts import is_loopback
from millrace.imports import without_collecting
from millrace.locks import try_lock
from millrace.serve.view import Observer
from millrace.viewer.server import serve_run

GATEWAY_KEY = "MILLRACE_GATEWAY_KEY"


def serve(
    config: Annotated[Path, typer.Argument(parser=path, help="The settings (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that take precedence over the file, such as gateway.port=0.", show_default=False),
    ] = None,
) -> None:
    """Serve a model to agents that speak a protocol of OpenAI or Anthropic, and keep every token.

    The control routes ask for the key in MILLRACE_GATEWAY_KEY. Without it, a key is written to a file that only this
    user can read, and is kept for the next start. A gateway that other hosts can reach needs the variable.
    """
    settings = load_config(config, overrides or (), check=check_engine, kind=ServeConfig)
    with _held(settings.folder):
        status = asyncio.run(_serve(settings))
    if status:
        raise typer.Exit(status)


async def _serve(config: ServeConfig) -> int:
    """Serve until a signal ends it, and return the exit status."""
    with without_collecting():
        # These import torch or transformers.
        from millrace.gateway.format import load_format
        from millrace.gateway.server import serve_gateway
        from millrace.train.start import configured_fleet, model_folder
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    ended: asyncio.Queue[int] = asyncio.Queue()
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, INTERRUPTED)):
        asyncio.get_running_loop().add_signal_handler(number, ended.put_nowait, status)
    key, where = _key(config)
    model = model_folder(config.model, config.folder / "model", seed=config.seed, fresh=True, setting="model.path")
    turns = load_format(model, config.gateway.format, config.chat_template_kwargs)
    print(f"starting {config.engine.first_replicas} engine(s); their logs are in {config.folder}", flush=True)
    serving = asyncio.create_task(ended.get())
    async with AsyncExitStack() as stack:
        event_log = stack.enter_context(EventLog(config.folder / "events.jsonl"))
        opening = asyncio.create_task(
            stack.enter_async_context(configured_fleet(config, model, log_dir=config.folder, event_log=event_log))
        )
        await asyncio.wait({opening, serving}, return_when=asyncio.FIRST_COMPLETED)
        if not opening.done():  # interrupted while the engines started
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            return serving.result()
        fleet = opening.result()
        if config.metrics is not None:
            observer = Observer(event_log)
            observer.fleets = (fleet,)
            url = await stack.enter_async_context(serve_run(observer, config.metrics.host, config.metrics.port))
            print(f"the page of the engines is at {url}; metrics are at {url}/metrics", flush=True)
        gateway = await stack.enter_async_context(serve_gateway(fleet, turns, key=key, config=config.gateway))
        print(f"agents are served at {gateway.url}; the key of its control routes is in {where}", flush=True)
        return await serving


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it while the block runs. Raises ConfigError if another process serves from it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise ConfigError(f"{folder} is in use by another `millrace serve`; give another name=...")
        yield
    finally:
        os.close(descriptor)


def _key(config: ServeConfig) -> tuple[str, str]:
    """Return the key of the control routes, and where the user finds it. Raises ConfigError."""
    if key := os.environ.get(GATEWAY_KEY):
        return key, GATEWAY_KEY
    if not is_loopback(config.gateway.host):
        raise ConfigError(
            f"gateway.host: other hosts can reach {config.gateway.host}, so set a key in the variable {GATEWAY_KEY}"
        )
    file = config.folder / "gateway.key"
    with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "r+") as kept:
        key = kept.read()
        if not key:
            key = secrets.token_urlsafe(24)
            kept.write(key)
    return key, str(file)
