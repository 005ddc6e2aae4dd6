"""The launcher on a Ray cluster, in the fleet's process. Its driver is `driver.py`."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from millrace.errors import ConfigError, LaunchError
from millrace.imports import require_modules
from millrace.launch.driven import JOIN_DEADLINE, DrivenLauncher, open_driver
from millrace.launch.ports import listens, parted

NOT_JOINED = (
    f"Ray could not be joined or started within {JOIN_DEADLINE:.0f} s{{}}; if no cluster runs on this host, "
    "`ray stop` makes Ray forget the last one"
)


@asynccontextmanager
async def open_ray(cluster: str | None) -> AsyncIterator[DrivenLauncher]:
    """Join the Ray cluster at `cluster`, at RAY_ADDRESS or on this host, or start Ray on this host for the time being.

    An engine's nodes are packed, and engines are spread. Raises ConfigError if Ray is not installed or the address is
    not one of a cluster, and LaunchError if it can't be joined.
    """
    require_modules("engine.launch: ray", "ray")
    address = cluster or os.environ.get("RAY_ADDRESS") or None
    if address is not None and address != "auto":
        await _require_answer(address)
    async with open_driver("millrace.launch.ray_cluster.driver", [address] if address else [], NOT_JOINED) as launcher:
        yield launcher


async def _require_answer(address: str) -> None:
    host, port = "", 0
    with suppress(ValueError):
        host, port = parted(address)
    if not host or "/" in host:
        raise ConfigError(f"engine.cluster: {address!r} is not a host:port of Ray's head node, such as 10.0.0.7:6379")
    if not await listens(host, port):
        raise LaunchError(f"no Ray cluster answers at {address}; start it with: ray start --head --port={port}")
