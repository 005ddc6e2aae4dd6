"""Reach an engine that another process started."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from millrace.engines.http_engine import HttpEngine
from millrace.engines.kinds import ENGINE_KINDS
from millrace.engines.start import Replica, initialized
from millrace.errors import EngineRefused
from millrace.launch.process import Server


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
    if not isinstance(engine, HttpEngine) or not engine.alone:
        return None
    return Address(info.kind, engine.name, engine.url, info.model_path, engine.api_key, engine.admin_key)


async def reach(address: Address) -> Replica:
    """Connect to the engine, for requests only: the process that started it controls it.

    Raises EngineError if it does not answer.
    """
    engine = _client(address)
    try:
        return Replica(engine, await engine.info(), None)
    except BaseException:
        await engine.close()
        raise


async def take_over(
    address: Address, process: Server, kv_events: str | None, gpus: tuple[str, ...], held: int | None
) -> Replica:
    """Take over the control of an engine whose owner has ended.

    gpus: those of its ranks, and held: the version that it holds, by its record.

    Raises EngineError if it does not answer, or serves another model.
    """
    engine = _client(address)
    replica = await initialized(engine, None, process)
    if replica.info.model_path != address.model_path:
        await engine.close()
        raise EngineRefused(engine.name, f"it serves {replica.info.model_path} and not {address.model_path}")
    info = replace(replica.info, gpus=gpus)
    return replace(replica, info=info, kv_events=kv_events, found=True, held=held)


def _client(address: Address) -> HttpEngine:
    return ENGINE_KINDS[address.kind].client(
        address.name,
        address.url,
        api_key=address.api_key,
        admin_key=address.admin_key,
        model_path=Path(address.model_path),
    )
