"""Measures how long a bucket takes to reach the sidecars of many hosts over UCX, when networks are the limit.

    OMP_NUM_THREADS=1 python -m benchmarks.fan_out [--hosts 1 3 7] [--megabits 500] [--mebibytes 16]

The hosts are network namespaces of this machine, and each can send so many megabits in a second (tc's tbf). So it needs
root and iproute2. `flat` has every sidecar read from the trainer. `tree` has them read from each other too, as
Millrace does. The two take turns.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tests.hosts.network import Host, network

from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.launch.ports import listens
from millrace.types import Capability, EngineInfo
from millrace.weights.sidecar.server import SIDECAR_KEY
from millrace.weights.transports.base import PublishTarget
from millrace.weights.transports.ucx import UcxTransport

PORT = 8400
KEY = "fan-out"
DEADLINE = 300.0
REPEATS = 3
CPU = torch.device("cpu")


def limit(host: Host | None, device: str, megabits: int) -> None:
    """Limit what a host sends. None: this host."""
    words = ["tc", "qdisc", "add", "dev", device, "root", "tbf"]
    words += ["rate", f"{megabits}mbit", "burst", "256kb", "latency", "50ms"]
    subprocess.run(words if host is None else host.inside(words), check=True)


async def reach(host: Host) -> PublishTarget:
    """Wait for the host's sidecar. Return an engine beside it, which gets no requests here."""
    async with asyncio.timeout(DEADLINE):
        while not await listens(host.address, PORT):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    capabilities = frozenset({Capability.UPDATE_FROM_SHARED_MEMORY})
    info = EngineInfo("embedded", "", "", None, 0, 0, capabilities)
    return PublishTarget(EmbeddedEngine(host.address, f"http://{host.address}:1"), info)


async def measure(count: int, megabits: int, mebibytes: int, logs: Path) -> None:
    tensors = [("weight", torch.randn(mebibytes * 2**18))]
    with network(count) as hosts:
        for host in hosts:
            place = ["--host", host.address, "--port", str(PORT)]
            host.python("millrace", "sidecar", *place, log=logs / host.address, environment={SIDECAR_KEY: KEY})
            limit(host, host.cable.replace("h", "g"), megabits)
        limit(None, hosts[0].cable[:-1].replace("h", "g"), megabits)
        targets = [await reach(host) for host in hosts]
        transport = UcxTransport({h.address: f"http://{h.address}:{PORT}" for h in hosts}, CPU, key=KEY)
        seconds: dict[str, list[float]] = {"flat": [], "tree": []}
        for turn in range(2 * (REPEATS + 1)):
            kind = ("flat", "tree")[turn % 2]
            transport._direct = set(transport._sidecars.values()) if kind == "flat" else set()
            transport._patience = DEADLINE
            transport.stage(tensors, turn % 2)
            begun = time.monotonic()
            assert not await transport.deliver(targets, deadline=DEADLINE)
            seconds[kind].append(time.monotonic() - begun)
        await transport.close()
        for target in targets:
            await target.engine.close()
    flat, tree = (statistics.median(one[1:]) for one in seconds.values())  # the first one connects
    floor = mebibytes * 8.388608 / megabits
    print(f"{count} hosts: flat {flat:.2f} s, tree {tree:.2f} s, {tree / flat:.2f} of it; one copy {floor:.2f} s")


def run(options: argparse.Namespace) -> None:
    os.environ["UCX_TLS"] = "tcp,self"
    for count in options.hosts:
        with tempfile.TemporaryDirectory() as logs, ProcessPoolExecutor(1) as process:  # UCX looks for networks once
            process.submit(run_one, count, options.megabits, options.mebibytes, Path(logs)).result()


def run_one(count: int, megabits: int, mebibytes: int, logs: Path) -> None:
    asyncio.run(measure(count, megabits, mebibytes, logs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 3, 7])
    parser.add_argument("--megabits", type=int, default=500, help="that a host can send in a second")
    parser.add_argument("--mebibytes", type=int, default=16, help="of the bucket")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
