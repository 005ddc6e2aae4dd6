"""`millrace courier`: brings the versions of a store to an engine's host."""

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from millrace.cli.status import INTERRUPTED
from millrace.errors import ConfigError
from millrace.weights.courier import COURIER_KEY, CourierServer, bind

if TYPE_CHECKING:
    from millrace.weights.replica import Replica


def courier(
    store: Annotated[
        str, typer.Option(help="The trainer's publish.folder, as this host reaches it.", show_default=False)
    ],
    folder: Annotated[
        Path,
        typer.Option(
            file_okay=False, show_default=False, help="Where the engines here read versions; room for two of them."
        ),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="The default is one that the kernel gives.", min=0, max=65535, show_default=False)
    ] = 0,
) -> None:
    """Bring versions from a store to this host, for the engines here, as the trainer asks (publish.transport: delta).

    Reached by others, it needs a key in MILLRACE_COURIER_KEY, the trainer's too.
    """
    key = os.environ.pop(COURIER_KEY, "") or None
    sock = bind(host, port, key=key)
    from millrace.weights.replica import Replica  # imports torch

    try:
        replica = Replica(store, folder)
    except (ImportError, ValueError) as error:  # fsspec's, of a URL
        raise ConfigError(f"--store {store}: {error}") from error
    logging.getLogger("millrace").setLevel(logging.INFO)
    asyncio.run(_serve(replica, sock, key, store))


async def _serve(replica: "Replica", sock: socket.socket, key: str | None, store: str) -> None:
    told_to_end: asyncio.Queue[int] = asyncio.Queue()
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, INTERRUPTED)):
        asyncio.get_running_loop().add_signal_handler(number, told_to_end.put_nowait, status)
    runner = await CourierServer(replica, key=key).start(sock)
    address, port = sock.getsockname()[:2]
    print(f"http://{f'[{address}]' if ':' in address else address}:{port} brings versions from {store}", flush=True)
    status = await told_to_end.get()
    await runner.cleanup()
    sys.stderr.flush()
    # Not by returning: that waits for a version on its way. What there is of one is taken away at the next start.
    os._exit(status)
