"""Start the server of a stock engine at the places that a launcher gives."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

from millrace.config.engines import SGLangEngineConfig, VLLMEngineConfig
from millrace.engines.spec import Launched, LaunchSpec
from millrace.engines.stock.arguments import Node
from millrace.engines.stock.launching import new_keys, start_at, with_dtype
from millrace.launch.base import Need, Place
from millrace.launch.nodes import Nodes
from millrace.launch.ports import is_here

Config = TypeVar("Config", SGLangEngineConfig, VLLMEngineConfig)
Ports = TypeVar("Ports")


@dataclass(frozen=True, slots=True)
class Planning(Generic[Config, Ports]):
    """What differs between the engines.

    gpus: the GPUs of an engine over all its nodes. ports: chooses the ports of each node at its place. plan: the one
    node that an engine's settings and ports describe, from its API key and admin key. gpus_of: the GPU of each rank.
    """

    gpus: Callable[[Config], int]
    ports: Callable[[Config, Sequence[Place]], Awaitable[Sequence[Ports]]]
    plan: Callable[[Config, LaunchSpec, Ports, str, str], Node]
    gpus_of: Callable[[Config], tuple[str, ...]]


async def launch_at_places(
    config: Config, spec: LaunchSpec, planning: Planning[Config, Ports], *, leftovers: Sequence[str]
) -> Launched:
    """Start a stock engine at places of `spec.launcher`, and wait until it is healthy.

    The logs are on the hosts of the places, in a folder of the same path as here. Raises LaunchError, as
    `millrace.engines.kinds.launch` does.
    """
    name = spec.name(config.kind)
    config = await with_dtype(config, spec.model_path)
    api_key, admin_key = new_keys(spec.api_key)
    gpus = planning.gpus(config) // config.nnodes if config.device == "cuda" else 0
    need = Need(gpus=gpus, cpus=config.threads or 1)
    places = await spec.launcher.reserve(name, need, config.nnodes, deadline=config.start_timeout)
    model = str(spec.model_path.absolute())
    python = "" if config.python is None else str(config.python)
    program: list[str] = [config.kind, config.version, config.device, python, model]
    # At its places, an engine is the first one: the launcher assigns the GPUs.
    alone = replace(spec, replica=0, seed=spec.seed + spec.replica, model_path=spec.model_path.absolute())
    try:
        ports = await planning.ports(config, places)
        configs = [_at(config, rank, place) for rank, place in enumerate(places)]
        nodes = [planning.plan(one, alone, its, api_key, admin_key) for one, its in zip(configs, ports, strict=True)]
        server = await start_at(
            name,
            list(zip(places, nodes, strict=True)),
            lambda place: [place.python, "-m", "millrace.engines.stock.at_place", *program],
            log_dir=spec.log_dir.absolute(),
            leftovers=leftovers,
            deadline=config.start_timeout,
        )
    except BaseException:
        await spec.launcher.release(places)
        raise
    url = nodes[0].url
    assert url is not None
    released = Nodes(name, [server], partial(spec.launcher.release, places))
    # GPUs of another host are no GPUs of this one, although their numbers are the same.
    on = planning.gpus_of(configs[0]) if is_here(url) else ()
    return Launched(name, url, api_key, admin_key, released, None, on)


def _at(config: Config, rank: int, place: Place) -> Config:
    """Return the settings of the node of this rank at its place."""
    update: dict[str, object] = {"host": place.host}
    if place.gpus is not None:
        update["cuda_visible_devices"] = place.gpus
    if config.nnodes > 1:
        update["node_rank"] = rank
        if isinstance(config, VLLMEngineConfig):
            update["env"] = {"VLLM_HOST_IP": place.host, **config.env}
    return config.model_copy(update=update)
