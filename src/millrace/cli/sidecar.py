"""`millrace sidecar`: copies weights to an engine's host."""

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from millrace.cli.paths import expanded, path
from millrace.cli.status import INTERRUPTED
from millrace.errors import ConfigError
from millrace.http.local import raise_file_limit
from millrace.http.serving import serving
from millrace.launch.ports import url_of
from millrace.weights.sidecar.server import SIDECAR_KEY, Job, SidecarServer, bind


def sidecar(
    store: Annotated[
        str | None,
        typer.Option(
            parser=expanded,
            metavar="TEXT",
            help="For delta: the trainer's publish.folder, as a path or URL on this host.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FOLDER",
            show_default=False,
            help="For delta: folder from which the engines on this host load versions. It must have room for two.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="For ucx: device of the engines on this host: cpu (the default), cuda or cuda:N.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(help="Port to listen on. The default is a free port.", min=0, max=65535, show_default=False),
    ] = 0,
) -> None:
    """Copy weights to this host for its engines, at the trainer's request.

    The weights come from the trainer's memory over UCX (publish.transport: ucx). With --store and --folder, they are
    versions from a store (publish.transport: delta).

    If other hosts can reach the sidecar, it needs a key in MILLRACE_SIDECAR_KEY. The trainer needs the same key.
    """
    key = os.environ.pop(SIDECAR_KEY, "") or None
    if (store is None) != (folder is None):
        raise ConfigError("--store needs --folder, and --folder needs --store; give both for delta, or neither for ucx")
    if store is not None and device is not None:
        raise ConfigError("--device is for ucx; a sidecar with --store keeps its versions on disk")
    raise_file_limit()
    with bind(host, port, key=key) as sock:
        job = _bringing(store, folder) if store is not None and folder is not None else _pulling(device or "cpu")
        logging.getLogger("millrace").setLevel(logging.INFO)
        asyncio.run(_serve(job, sock, key))


def _bringing(store: str, folder: Path) -> Job:
    from millrace.weights.mirror import CheckpointMirror
    from millrace.weights.sidecar.bringing import Bringing  # imports torch

    try:
        replica = CheckpointMirror(store, folder)
    except (ImportError, ValueError) as error:  # fsspec's errors for a URL
        raise ConfigError(f"--store {store}: {error}") from error
    return Bringing(replica, store)


def _pulling(device: str) -> Job:
    import torch

    from millrace.weights.sidecar.pulling import Pulling

    try:
        place = torch.device(device)
        if place.type not in ("cpu", "cuda"):
            raise ConfigError(f"--device {device}: write cpu, cuda or cuda:N")
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:  # torch's errors for an unknown device or a missing GPU
        raise ConfigError(f"--device {device}: {str(error).partition(chr(10))[0]}") from error
    return Pulling(place)


async def _serve(job: Job, sock: socket.socket, key: str | None) -> None:
    exit_status: asyncio.Queue[int] = asyncio.Queue()
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, INTERRUPTED)):
        asyncio.get_running_loop().add_signal_handler(number, exit_status.put_nowait, status)
    async with serving(SidecarServer(job, key=key).app(), sock):
        print(f"{url_of(*sock.getsockname()[:2])} {job.does}", flush=True)
        status = await exit_status.get()
    sys.stderr.flush()
    # Returning would wait for running copies. The next start removes an incomplete version.
    os._exit(status)
