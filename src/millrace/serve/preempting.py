"""Preemption notices of another process, such as a hook that runs when a spot instance is taken away."""

import asyncio

from yarl import URL

from millrace.errors import ArgumentError, NoEngineError
from millrace.fleet.client import FleetClient
from millrace.fleet.fleet import Fleet
from millrace.fleet.replica_state import ReplicaState


async def preempt(fleet: FleetClient, engine: str | None, host: str | None, deadline: float) -> dict[str, object]:
    """Preempt an engine, or all engines at a host's address, and return their names when they have left.

    deadline: seconds until the host is gone. Raises ArgumentError unless either `engine` or `host` is given, and
    NoEngineError if there is no such engine, or if this process only follows the fleet.
    """
    if (engine is None) == (host is None):
        raise ArgumentError("give either the name of an engine or the host of engines")
    if not isinstance(fleet, Fleet):
        raise NoEngineError("this process follows the fleet of another, and only its owner can take engines out")
    states = fleet.snapshot.replicas
    names = [state.name for state in states if engine == state.name or (host and host in hosts_of(fleet, state))]
    if not names:
        raise NoEngineError(f"there is no engine {engine or f'at {host}'}: {fleet.snapshot.describe()}")
    await asyncio.gather(*(fleet.preempt(name, deadline=deadline, host=host) for name in names))
    return {"preempted": names}


def hosts_of(fleet: Fleet, state: ReplicaState) -> set[str | None]:
    """Return the addresses of the hosts of an engine: that in its URL, and those of its other nodes."""
    process = fleet.replicas.by_name[state.name].process
    return {URL(state.url).host, *(() if process is None else process.hosts)}
