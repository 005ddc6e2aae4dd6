"""Measures what a large fleet costs the process that owns it.

    python -m benchmarks.owner [--engines 64 512] [--followers 0 256]

The engines are embedded engines with a tiny model, many in each process. They answer by the real protocol, and the
owner probes them, publishes to them and reports their state as always. The followers are `follow_fleet`, many in each
process. For each fleet it prints:

- `idle`: the owner's CPU seconds in a second in which nothing happens,
- `publish`: seconds and the owner's CPU seconds of a publish by `disk`,
- `last follower`: seconds from the owner's snapshot in which all engines have the version to the last follower's.
"""

import argparse
import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from safetensors.torch import load_file

from millrace import TinyModelConfig, follow_fleet, open_fleet
from millrace.fleet.client import FleetClient
from millrace.http.local import raise_file_limit
from millrace.train import make_tiny_model

MODEL = TinyModelConfig(kind="tiny", layers=1, hidden_size=16, heads=1, context_length=64)
EACH = 64  # engines or followers in a process
IDLE_SECONDS = 20.0
DEADLINE = 1200.0
PUBLISHES = 3


def has_version(fleet: FleetClient, version: int) -> bool:
    return all(state.version == version for state in fleet.snapshot.replicas)


async def told_to_end() -> None:
    """Wait until the parent closes this process's standard input, or dies."""
    await asyncio.to_thread(sys.stdin.read)


async def serve(model: Path, count: int) -> None:
    """Serve `count` engines until told to end. Prints their URLs."""
    from millrace.engines.embedded.auth import Keys
    from millrace.engines.embedded.build import Settings, build
    from millrace.engines.embedded.server import Server
    from millrace.launch.ports import bound

    settings = Settings(model, "cpu", "auto", 1, 0, None, 1, "default")
    async with AsyncExitStack() as stack:
        urls = []
        for _ in range(count):
            server = Server(lambda: build(settings), keys=Keys(None, None), faults=False, max_running=1, seed=0)
            sock = stack.enter_context(bound("127.0.0.1", 0))
            await stack.enter_async_context(server.serving(sock))
            await server.ready
            urls.append(f"http://127.0.0.1:{sock.getsockname()[1]}")
        print(json.dumps(urls), flush=True)
        await told_to_end()
        os._exit(0)  # without waiting for the engines' threads


async def follow(url: str, key: str, count: int) -> None:
    """Follow the fleet `count` times until told to end. Prints when each version was seen by all of them."""

    async def version(fleet: FleetClient, number: int) -> float:
        await fleet.replicas.until(lambda: has_version(fleet, number), DEADLINE)
        return time.monotonic()

    async def report(followers: list[FleetClient]) -> None:
        for number in range(1, PUBLISHES + 1):
            seen = await asyncio.gather(*(version(fleet, number) for fleet in followers))
            print(max(seen), flush=True)

    async with AsyncExitStack() as stack:
        followers: list[FleetClient] = [await stack.enter_async_context(follow_fleet(url, key)) for _ in range(count)]
        print("following", flush=True)
        task = asyncio.create_task(report(followers))
        await told_to_end()
        task.cancel()


@asynccontextmanager
async def processes(count: int, *command: str, key: str = "") -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """Run this script with the command and how many each process has, for `count` in all."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLEET_KEY": key}
    started = []
    try:
        for first in range(0, count, EACH):
            arguments = ["-m", "benchmarks.owner", *command, str(min(EACH, count - first))]
            process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdin=PIPE, stdout=PIPE, env=environment
            )
            started.append(process)
        yield started
    finally:
        for process in started:
            assert process.stdin is not None
            process.stdin.close()
        for process in started:
            await process.wait()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE):
        return (await process.stdout.readline()).decode()


async def measure(engines: int, followers: int, folder: Path) -> None:
    model = folder / "model"
    async with processes(engines, "serve", str(model)) as servers:
        urls = [url for server in servers for url in json.loads(await line(server))]
        config = {"kind": "embedded", "urls": urls, "replicas": engines}
        before = time.monotonic()
        async with (
            open_fleet(config, model, transport="disk", folder=folder / "versions", log_dir=folder) as fleet,
            fleet.share() as shared,
            processes(followers, "follow", shared.url, key=shared.key) as following,
        ):
            for process in following:
                assert await line(process) == "following\n"
            opened = time.monotonic() - before
            cpu, started = time.process_time(), time.monotonic()
            await asyncio.sleep(IDLE_SECONDS)
            idle = (time.process_time() - cpu) / (time.monotonic() - started)
            print(f"{engines} engines, {followers} followers: opened in {opened:.1f} s; idle {idle:.3f} CPU s/s")
            tensors = list(load_file(model / "model.safetensors").items())
            for number in range(1, PUBLISHES + 1):
                cpu, started = time.process_time(), time.monotonic()
                published = asyncio.create_task(fleet.publish(tensors))
                await fleet.replicas.until(lambda number=number: has_version(fleet, number), DEADLINE)  # type: ignore[misc]
                shown = time.monotonic()
                await published
                seconds = time.monotonic() - started
                seen = max([float(await line(process)) for process in following], default=shown)
                used = time.process_time() - cpu
                print(f"  publish {seconds:.2f} s, {used:.2f} CPU s; last follower {seen - shown:.2f} s")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  most memory of the owner so far: {memory:.0f} MiB")


async def run(options: argparse.Namespace) -> None:
    raise_file_limit()
    for engines in options.engines:
        for followers in options.followers:
            with tempfile.TemporaryDirectory() as folder:
                make_tiny_model(MODEL, 0, Path(folder) / "model")
                await measure(engines, followers, Path(folder))


def main() -> None:
    match sys.argv[1:]:
        case ["serve", model, count]:
            asyncio.run(serve(Path(model), int(count)))
            return
        case ["follow", url, count]:
            asyncio.run(follow(url, os.environ["FLEET_KEY"], int(count)))
            return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--followers", type=int, nargs="+", default=[0, 256])
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
