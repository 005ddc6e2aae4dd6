"""Start a vLLM server: one process, or one process for each node."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from millrace.config.engines import VLLMEngineConfig
from millrace.engines.spec import Launched, LaunchSpec
from millrace.engines.stock.arguments import Node, local_ranks
from millrace.engines.stock.interpreter import checked_interpreter
from millrace.engines.stock.kv_events import leftovers, new_endpoint
from millrace.engines.stock.launching import new_keys, start_nodes, with_dtype, with_extension
from millrace.engines.stock.placed import Planning, launch_at_places
from millrace.engines.vllm.arguments import Ports, gpus, nodes, rank_gpus
from millrace.errors import DataError, LaunchError
from millrace.launch.base import Place
from millrace.launch.local import LOCAL
from millrace.launch.ports import free_port, free_ports, joined, require_free
from millrace.model_config import head_dim

# Not imported: it runs on the engine's interpreter.
SERVE = Path(__file__).with_name("serve.py")
# Head sizes, in elements, for which vLLM's CPU attention has a kernel.
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
# Files in shared memory that a killed server of several ranks leaves: of collectives, then of message queues.
LEFTOVERS = ("vllm_dist_*", "psm_*", "sem.mp-*")


async def launch(config: VLLMEngineConfig, spec: LaunchSpec, *, python: Path | None = None) -> Launched:
    """Start a vLLM, and wait until it is healthy. See `millrace.engines.kinds.launch`.

    The logs are `NAME.log`, or `NAME-nodeN.log` for each node. The keys are new. python: an interpreter that has the
    engine; None for the config's, or that of the installed environment.
    """
    if config.device == "cpu":
        await asyncio.to_thread(require_heads, spec.model_path)
    if spec.launcher is not LOCAL:
        return await launch_at_places(config, spec, Planning(gpus, _ports_at, _plan, _gpus_of), leftovers=LEFTOVERS)
    python = python or await checked_interpreter(config)
    name = spec.name(config.kind)
    config = await with_dtype(config, spec.model_path)
    api_key, admin_key = new_keys(spec.api_key)
    ports, visible = choose_ports(config, spec.replica), os.environ.get("CUDA_VISIBLE_DEVICES")
    planned = nodes(config, spec, ports=ports, api_key=api_key, admin_key=admin_key, visible_gpus=visible)
    server = await start_nodes(
        name,
        [with_extension(node) for node in planned],
        python=python,
        serve=SERVE,
        log_dir=spec.log_dir,
        leftovers=(*LEFTOVERS, *leftovers(ports.kv_events)),
        deadline=config.start_timeout,
    )
    on = rank_gpus(config, spec.replica, visible)
    return Launched(name, planned[0].url, api_key, admin_key, server, ports.kv_events, on)


def require_heads(model_path: Path) -> None:
    """Raise LaunchError for a model with heads of a size that vLLM can't compute on the CPU.

    Its first request would crash vLLM.
    """
    try:
        size = head_dim(model_path)
    except DataError as error:
        raise LaunchError(str(error)) from error
    if size and size not in CPU_HEADS:
        known = ", ".join(map(str, CPU_HEADS))
        raise LaunchError(f"vLLM on the CPU has no attention kernel for heads of {size} elements, only for {known}")


def choose_ports(config: VLLMEngineConfig, replica: int) -> Ports:
    """Return the config's ports, and free ports for those that it leaves open.

    Raises LaunchError if a port of the config is in use.
    """
    http = None
    if 0 in local_ranks(config):
        http = free_port(config.host, "engine.host") if config.ports is None else config.ports[replica]
        require_free(config.host, http)
    kv_events = new_endpoint() if config.kv_events and 0 in local_ranks(config) else None
    if config.nnodes == 1:
        return Ports(http, None, None, kv_events)
    master, data_parallel = free_ports("127.0.0.1", 2)
    return Ports(
        http,
        config.dist_init_addr or f"127.0.0.1:{master}",
        (config.data_parallel_rpc_port or data_parallel) if config.dp_size > 1 else None,
        kv_events,
    )


async def _ports_at(config: VLLMEngineConfig, places: Sequence[Place]) -> Sequence[Ports]:
    """Return the ports of each node. All of them are on node 0's host."""
    several = config.nnodes > 1
    http = await places[0].free_ports(3 if several else 1)
    rendezvous = joined(places[0].host, http + 1) if several else None
    data_parallel = http + 2 if several and config.dp_size > 1 else None
    return [Ports(None if rank else http, rendezvous, data_parallel) for rank in range(len(places))]


def _plan(config: VLLMEngineConfig, spec: LaunchSpec, ports: Ports, api_key: str, admin_key: str) -> Node:
    (node,) = nodes(config, spec, ports=ports, api_key=api_key, admin_key=admin_key, visible_gpus=None)
    return node


def _gpus_of(config: VLLMEngineConfig) -> tuple[str, ...]:
    return rank_gpus(config, 0, None)
