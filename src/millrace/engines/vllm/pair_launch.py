"""Start the servers of a replica that computes prompts and generates on different servers."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from millrace.config.engines import VLLMEngineConfig
from millrace.engines.spec import Launched, LaunchSpec
from millrace.engines.vllm.arguments import gpus, require_no_contradiction
from millrace.engines.vllm.launch import launch
from millrace.engines.vllm.pair import PrefillDecodeEngine
from millrace.engines.vllm.prefill import LEASE, Decode, Prefill
from millrace.launch.nodes import Nodes
from millrace.launch.ports import free_ports

Member = TypeVar("Member", Decode, Prefill)


async def launch_pair(config: VLLMEngineConfig, spec: LaunchSpec) -> tuple[PrefillDecodeEngine, Launched]:
    """Start the servers, and wait until all are healthy. Raises what `millrace.engines.kinds.launch` raises.

    The logs are `NAME-decode-0.log`, `NAME-prefill-0.log` and so on. If one server ends, all are ended.
    """
    assert config.prefill_decode is not None
    require_no_contradiction(config)
    members = member_configs(config, spec.replica, free_ports(config.host, servers(config), "engine.host"))
    starts = (
        launch(one, replace(spec, replica=number, prefix=f"{spec.name(config.kind)}-{role}", seed=spec.seed + seed))
        for role, number, seed, one in members
    )
    started = await asyncio.gather(*starts, return_exceptions=True)
    launched = [one for one in started if isinstance(one, Launched)]
    process = Nodes(spec.name(config.kind), [one.process for one in launched])
    if failed := [one for one in started if isinstance(one, BaseException)]:
        await process.end()
        raise failed[0]
    name, count = process.name, len(launched) - config.prefill_decode.prefill

    def client(kind: type[Member], one: Launched) -> Member:
        assert one.url is not None
        return kind(name, one.url, api_key=one.api_key, admin_key=one.admin_key, model_path=spec.model_path)

    engine = PrefillDecodeEngine(
        [client(Decode, one) for one in launched[:count]], [client(Prefill, one) for one in launched[count:]]
    )
    on = tuple(gpu for one in launched for gpu in one.gpus)
    return engine, replace(launched[0], name=name, process=process, gpus=on)


def servers(config: VLLMEngineConfig) -> int:
    """Return the number of servers of a replica."""
    assert config.prefill_decode is not None
    return config.prefill_decode.prefill + config.prefill_decode.decode


def member_configs(
    config: VLLMEngineConfig, replica: int, ports: Sequence[int]
) -> Sequence[tuple[str, int, int, VLLMEngineConfig]]:
    """Return each server's role, its number among those of this role, what its seed has more than the replica's, and
    its settings. Decode servers come first. ports: one for each server, by which NIXL's agents meet."""
    assert config.prefill_decode is not None
    transfer = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_buffer_device": config.device,
        "kv_connector_extra_config": {"kv_lease_duration": LEASE},
    }
    arguments = {**config.engine_args, "kv_transfer_config": transfer}
    roles = [("decode", number) for number in range(config.prefill_decode.decode)]
    roles += [("prefill", number) for number in range(config.prefill_decode.prefill)]
    members = []
    for place, ((role, number), port) in enumerate(zip(roles, ports, strict=True)):
        ahead = replica * len(roles) + place - number  # `launch` adds the number to the seed, and so many GPUs
        side = {"VLLM_NIXL_SIDE_CHANNEL_HOST": config.host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}
        update = {
            "prefill_decode": None,
            "replicas": 1,
            "env": {**side, **config.env},
            "engine_args": arguments,
            "base_gpu_id": config.base_gpu_id + ahead * gpus(config),
        }
        members.append((role, number, ahead, config.model_copy(update=update)))
    return members
