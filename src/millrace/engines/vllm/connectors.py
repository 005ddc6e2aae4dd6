"""What a vLLM server's KV connector keeps, and whether a flush drops it. Pure.

Read in the source of vLLM 0.32: `reset_cache` of a connector is called by a pause in mode `abort`, and by
`/reset_prefix_cache?reset_external=true`. Connectors that do not implement it answer None, which vLLM takes for
success. ExampleConnector, for instance, then reads the files of the old weights.
"""

from collections.abc import Mapping
from typing import Any

from millrace.errors import EngineRefused

# Connectors that keep KV cache in host memory, and drop it all.
DROPPING = frozenset({"OffloadingConnector", "SimpleCPUOffloadConnector"})
# Connectors that only pass the KV cache of one request to another server.
PASSING = frozenset({"NixlConnector", "NixlPullConnector", "NixlPushConnector"})
# The OffloadingConnector's spec without further tiers. TieringOffloadingSpec keeps its files and stores.
ONE_TIER = "CPUOffloadingSpec"


def offloads(transfer: Mapping[str, Any]) -> bool:
    """Return whether a connector keeps KV cache. transfer: vLLM's `--kv-transfer-config`; empty if there is none."""
    return any(name not in PASSING for name, _ in _connectors(transfer))


def kept_after_flush(transfer: Mapping[str, Any]) -> str | None:
    """Return the name of a connector that may keep prefixes when the cache is reset, if there is one."""
    for name, extra in _connectors(transfer):
        if name in DROPPING and (spec := extra.get("spec_name", ONE_TIER)) != ONE_TIER:
            return f"{name} with {spec}"
        if name not in DROPPING | PASSING:
            return name
    return None


def require_dropping(engine: str, transfer: Mapping[str, Any]) -> None:
    """Raise EngineRefused for a server whose connector may keep prefixes when the cache is reset."""
    if connector := kept_after_flush(transfer):
        raise EngineRefused(engine, f"{connector} keeps prefixes of old weights after a publish; start it without")


def _connectors(transfer: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the name of each connector, and its further config. MultiConnector has several."""
    name, extra = transfer.get("kv_connector"), transfer.get("kv_connector_extra_config") or {}
    if name is None:
        return []
    if name == "MultiConnector":
        return [one for part in extra.get("connectors", ()) for one in _connectors(part)]
    return [(str(name), extra)]
