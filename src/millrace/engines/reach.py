"""Reach an engine that another process started."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from millrace.engines.http_engine import HttpEngine
from millrace.engines.kinds import ENGINE_KINDS
from millrace.engines.start import Replica, initialized
from millrace.engines.stock.pair import Member, PrefillDecodeEngine
from millrace.engines.stock.pair_launch import pair_of
from millrace.errors import EngineRefused
from millrace.launch.process import Server


@dataclass(frozen=True, slots=True)
class Address:
    """The address and keys of an engine. The keys are secret and left out of the repr.

    others: the further servers of an engine that is several.
    """

    kind: str
    name: str
    url: str
    model_path: str
    api_key: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)
    others: tuple[Member, ...] = ()


def address_of(started: Replica) -> Address | None:
    """Return the engine's address, or None if no other process can reach it."""
    engine, info = started.engine, started.info
    if not isinstance(engine, HttpEngine):
        return None
    others = tuple(engine.members[1:]) if isinstance(engine, PrefillDecodeEngine) else ()
    return Address(info.kind, engine.name, engine.url, info.model_path, engine.api_key, engine.admin_key, others)


async def reach(address: Address) -> Replica:
    """Connect to the engine, for requests only: the process that started it controls it.

    Raises EngineError if it does not answer.
    """
    pair = ENGINE_KINDS[address.kind].pair
    others = address.others if pair is None else tuple(one for one in address.others if one.role in pair.followed)
    engine = _client(replace(address, others=others))
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
    kind, model = ENGINE_KINDS[address.kind], Path(address.model_path)
    if address.others and kind.pair is not None:
        first = Member("decode", address.url, address.api_key, address.admin_key)
        return pair_of(kind.pair, address.name, model, (first, *address.others))
    return kind.client(
        address.name, address.url, api_key=address.api_key, admin_key=address.admin_key, model_path=model
    )
