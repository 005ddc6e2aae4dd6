"""Run the embedded engine: python -m millrace.engines.embedded --model FOLDER --port N"""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from millrace.http.local import raise_file_limit
from millrace.imports import without_collecting
from millrace.launch.ports import bound, url_of, why_not_bound
from millrace.model_config import COMPUTE_DTYPES

log = logging.getLogger("millrace.embedded")

BACKLOG = 4096  # connections that may wait to be accepted; a trainer opens thousands at once


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="millrace.engines.embedded",
        description="Serves a causal model of transformers by SGLang's native protocol. The keys are read from the "
        "environment: MILLRACE_API_KEY for generating and reading, MILLRACE_ADMIN_API_KEY for control.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a folder in Hugging Face's format; no tokenizer is needed")
    add("--host", default="127.0.0.1")
    add("--port", type=_port, required=True)
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *COMPUTE_DTYPES), default="auto", help="auto: as in the folder's config")
    add("--max-running-requests", type=_positive, default=64, help="requests that generate at the same time")
    add("--cached-prefixes", type=_not_negative, default=64, help="finished requests whose KV cache is kept for reuse")
    add("--context-length", type=_positive, help="tokens of prompt and output; by default the model's own limit")
    add("--threads", type=_positive, help="torch's threads on the CPU; by default torch chooses")
    add("--weight-version", default="default", help="the version of the weights in the folder")
    add("--seed", type=int, default=0, help="for requests without a seed")
    add("--faults", action="store_true", help="opens /inject_fault, for tests")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    raise_file_limit()
    try:
        sock = _bind(args.host, args.port)
    except OSError as error:
        reason = why_not_bound(args.host, error)
        print(f"can't listen on {args.host}:{args.port}: {reason}; choose another --port", file=sys.stderr)
        return 1
    return asyncio.run(_serve(args, sock))


async def _serve(args: argparse.Namespace, sock: socket.socket) -> int:
    with without_collecting():  # here: torch takes seconds to import, and a port in use should fail at once
        from millrace.engines.embedded.auth import Keys
        from millrace.engines.embedded.build import Settings, build
        from millrace.engines.embedded.server import Server

    settings = Settings(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        max_running=args.max_running_requests,
        cached_prefixes=args.cached_prefixes,
        context_length=args.context_length,
        threads=args.threads,
        version=args.weight_version,
    )
    keys = Keys(os.environ.pop("MILLRACE_API_KEY", None), os.environ.pop("MILLRACE_ADMIN_API_KEY", None))
    told_to_end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told_to_end.set)
    server = Server(
        lambda: build(settings), keys=keys, faults=args.faults, max_running=settings.max_running, seed=args.seed
    )
    async with server.serving(sock):
        ending = asyncio.ensure_future(told_to_end.wait())
        waited_for: set[asyncio.Future[Any]] = {ending, server.ready}
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        if server.ready.done():
            error = server.ready.exception()
            if error is not None:
                print(f"can't serve {settings.model}: {type(error).__name__}: {error}", file=sys.stderr)
                return 1
            log.info("serving %s on %s", settings.model, url_of(args.host, args.port))
            await ending
        log.info("shutting down")
    server.stop()
    return 0


def _bind(host: str, port: int) -> socket.socket:
    sock = bound(host, port)
    sock.listen(BACKLOG)
    return sock


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 65536:
        raise argparse.ArgumentTypeError("must be a port of 1 to 65535")
    return port


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: it waits for the loader thread, which may be waiting for a broadcast that never comes.
    os._exit(status)
