"""Start the servers of a replica that computes prompts and generates on different servers."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from millrace.config.engines import SGLangEngineConfig, VLLMEngineConfig
from millrace.engines.spec import Launched, LaunchSpec
from millrace.engines.stock.arguments import device_names
from millrace.engines.stock.engine import StockEngine
from millrace.engines.stock.pair import Member, PrefillDecodeEngine, Role
from millrace.errors import ConfigError
from millrace.launch.nodes import Nodes
from millrace.launch.ports import free_ports

Config = TypeVar("Config", SGLangEngineConfig, VLLMEngineConfig)


@dataclass(frozen=True, slots=True)
class PairKind(Generic[Config]):
    """What differs between the kinds of engines.

    launch: starts one server. check: raises ConfigError for settings that contradict `prefill_decode`. gpus: of one
    server. settings: those that a server has beside the replica's, from its role and its own free port. decode and
    prefill: the adapters. A decode server's gets the others as its `prefills`. followed: which servers a process that
    follows the fleet sends requests to.
    """

    launch: Callable[[Config, LaunchSpec], Awaitable[Launched]]
    check: Callable[[Config], None]
    gpus: Callable[[Config], int]
    settings: Callable[[Config, Role, int], Mapping[str, object]]
    decode: type[Any]
    prefill: type[StockEngine[Any]]
    followed: Collection[Role]


async def launch_pair(config: Config, spec: LaunchSpec, kind: PairKind[Config]) -> tuple[PrefillDecodeEngine, Launched]:
    """Start the servers, and wait until all are healthy. Raises what `millrace.engines.kinds.launch` raises.

    The logs are `NAME-decode-0.log`, `NAME-prefill-0.log` and so on. If one server ends, all are ended.
    """
    assert config.prefill_decode is not None
    kind.check(config)
    members = member_configs(config, spec.replica, free_ports(config.host, servers(config), "engine.host"), kind)
    starts = (
        kind.launch(
            one, replace(spec, replica=number, prefix=f"{spec.name(config.kind)}-{role}", seed=spec.seed + seed)
        )
        for role, number, seed, one in members
    )
    started = await asyncio.gather(*starts, return_exceptions=True)
    launched = [one for one in started if isinstance(one, Launched)]
    process = Nodes(spec.name(config.kind), [one.process for one in launched])
    if failed := [one for one in started if isinstance(one, BaseException)]:
        await process.end()
        raise failed[0]
    places = []
    for (role, *_), one in zip(members, launched, strict=True):
        assert one.url is not None
        places.append(Member(role, one.url, one.api_key, one.admin_key))
    on = tuple(gpu for one in launched for gpu in one.gpus)
    engine = pair_of(kind, process.name, spec.model_path, places)
    return engine, replace(launched[0], name=process.name, process=process, gpus=on)


def pair_of(kind: PairKind[Any], name: str, model: Path, members: Sequence[Member]) -> PrefillDecodeEngine:
    """Return the engine of these servers. `model`: the folder of the model."""
    decodes: list[Any] = []
    prefills: list[Any] = []
    for one in members:
        adapter, its = (kind.decode, decodes) if one.role == "decode" else (kind.prefill, prefills)
        its.append(adapter(name, one.url, api_key=one.api_key, admin_key=one.admin_key, model_path=model))
    for decode in decodes:
        decode.prefills = prefills
    return PrefillDecodeEngine(decodes, prefills)


def servers(config: Config) -> int:
    """Return the number of servers of a replica."""
    assert config.prefill_decode is not None
    return config.prefill_decode.prefill + config.prefill_decode.decode


def member_configs(
    config: Config, replica: int, ports: Sequence[int], kind: PairKind[Config]
) -> Sequence[tuple[Role, int, int, Config]]:
    """Return each server's role, its number among those of this role, what its seed has more than the replica's, and
    its settings. Decode servers come first. ports: one for each server, by which the servers meet.

    Raises ConfigError if cuda_visible_devices has too few GPUs.
    """
    assert config.prefill_decode is not None
    roles: list[tuple[Role, int]] = [("decode", number) for number in range(config.prefill_decode.decode)]
    roles += [("prefill", number) for number in range(config.prefill_decode.prefill)]
    members = []
    for place, ((role, number), port) in enumerate(zip(roles, ports, strict=True)):
        index = replica * len(roles) + place
        update = {
            "prefill_decode": None,
            "replicas": 1,
            **placed(config, index, number, kind.gpus(config)),
            **kind.settings(config, role, port),
        }
        members.append((role, number, index - number, config.model_copy(update=update)))
    return members


def placed(config: Config, index: int, number: int, gpus: int) -> Mapping[str, object]:
    """Return the settings that place a server on its GPUs. index: its place among the servers of all replicas. number:
    that of its launch, which adds as many times `gpus` to base_gpu_id.

    Each server gets its own part of `cuda_visible_devices`. So that may name a GPU twice, which CUDA would not take.
    """
    first = config.base_gpu_id + index * gpus
    if config.device == "cpu":  # there, base_gpu_id is a NUMA node of SGLang's
        return {}
    if config.cuda_visible_devices is None:
        return {"base_gpu_id": first - number * gpus}
    names = device_names(config.cuda_visible_devices)
    if len(names) < first + gpus:
        raise ConfigError(
            f"engine.prefill_decode: a server needs the GPUs {first} to {first + gpus - 1} of those in "
            f"engine.cuda_visible_devices, which has {len(names)} ({config.cuda_visible_devices!r})"
        )
    return {"cuda_visible_devices": ",".join(names[first : first + gpus]), "base_gpu_id": -number * gpus}
