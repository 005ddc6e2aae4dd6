"""Reach an engine that another process of the same run started."""

from dataclasses import dataclass, field
from pathlib import Path

from millrace.engines.http_engine import HttpEngine
from millrace.engines.kinds import ENGINE_KINDS
from millrace.engines.start import Replica


@dataclass(frozen=True, slots=True)
class Address:
    """The address and keys of an engine. The keys are secret and left out of the repr."""

    kind: str
    name: str
    url: str
    model_path: str
    api_key: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)


def address_of(started: Replica) -> Address | None:
    """Return the engine's address, or None if no other process can reach it."""
    engine, info = started.engine, started.info
    if not isinstance(engine, HttpEngine):
        return None
    return Address(info.kind, engine.name, engine.url, info.model_path, engine.api_key, engine.admin_key)


async def reach(address: Address) -> Replica:
    """Connect to the engine, for requests only: the process that started it controls it.

    Raises EngineError if it does not answer.
    """
    engine = ENGINE_KINDS[address.kind].client(
        address.name,
        address.url,
        api_key=address.api_key,
        admin_key=address.admin_key,
        model_path=Path(address.model_path),
    )
    try:
        return Replica(engine, await engine.info(), None)
    except BaseException:
        await engine.close()
        raise
