"""`millrace sidecar`: brings weights to an engine's host."""

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
from millrace.launch.ports import url_of
from millrace.weights.sidecar.server import SIDECAR_KEY, Job, SidecarServer, bind


def sidecar(
    store: Annotated[
        str | None,
        typer.Option(
            parser=expanded,
            metavar="TEXT",
            help="For delta: the trainer's publish.folder, as this host reaches it.",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FOLDER",
            show_default=False,
            help="For delta: where the engines here read versions; room for two of them.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="For ucx: where the engines here have their weights, cpu (the default), cuda or cuda:N.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="The default is one that the kernel gives.", min=0, max=65535, show_default=False)
    ] = 0,
) -> None:
    """Bring weights to this host, for the engines here, as the trainer asks: out of its memory, over UCX
    (publish.transport: ucx), or with --store and --folder the versions of a store (publish.transport: delta).

    Reached by others, it needs a key in MILLRACE_SIDECAR_KEY, the trainer's too.
    """
    key = os.environ.pop(SIDECAR_KEY, "") or None
    if (store is None) != (folder is None):
        raise ConfigError(
            "--store and --folder are for versions of a store and belong together; without both, over UCX"
        )
    if store is not None and device is not None:
        raise ConfigError("--device is for ucx; a sidecar of a store (--store) has its versions on disk")
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
    except (ImportError, ValueError) as error:  # fsspec's, of a URL
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
    except (RuntimeError, AssertionError) as error:  # torch's, of a name, or of a GPU that is not there
        raise ConfigError(f"--device {device}: {str(error).partition(chr(10))[0]}") from error
    return Pulling(place)


async def _serve(job: Job, sock: socket.socket, key: str | None) -> None:
    told_to_end: asyncio.Queue[int] = asyncio.Queue()
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, INTERRUPTED)):
        asyncio.get_running_loop().add_signal_handler(number, told_to_end.put_nowait, status)
    runner = await SidecarServer(job, key=key).start(sock)
    address, port = sock.getsockname()[:2]
    print(f"{url_of(address, port)} {job.does}", flush=True)
    status = await told_to_end.get()
    await runner.cleanup()
    sys.stderr.flush()
    # Not by returning: that waits for what is on its way. What there is of a version is taken away at the next start.
    os._exit(status)
