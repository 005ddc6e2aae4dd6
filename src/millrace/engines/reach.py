"""An engine that another process of the same run has started: where it is, and how it is spoken to."""

from dataclasses import dataclass, field
from pathlib import Path

from millrace.engines.http_engine import HttpEngine
from millrace.engines.kinds import ENGINE_KINDS
from millrace.engines.start import Replica


@dataclass(frozen=True, slots=True)
class Address:
    """`kind` is that of its config. The keys open its data and its control routes, and have no place in a log."""

    kind: str
    name: str
    url: str
    model_path: str
    api_key: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)


def address_of(started: Replica) -> Address | None:
    """None for an engine that no other process can reach."""
    engine, info = started.engine, started.info
    if not isinstance(engine, HttpEngine):
        return None
    return Address(info.kind, engine.name, engine.url, info.model_path, engine.api_key, engine.admin_key)


async def reach(address: Address) -> Replica:
    """The engine, for requests: who started it controls it. Raises EngineError where it does not answer."""
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
