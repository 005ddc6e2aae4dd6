"""Start an SGLang server: one process, or one process for each node."""

import os
from collections.abc import Sequence
from pathlib import Path

from millrace.config.engines import SGLangEngineConfig
from millrace.engines.sglang.arguments import Ports, attention_dp, gpus, nodes, rank_gpus
from millrace.engines.spec import Launched, LaunchSpec
from millrace.engines.stock.arguments import Node, local_ranks
from millrace.engines.stock.interpreter import checked_interpreter
from millrace.engines.stock.kv_events import leftovers, new_endpoint
from millrace.engines.stock.launching import new_keys, start_nodes, with_dtype, with_extension
from millrace.engines.stock.placed import Planning, launch_at_places
from millrace.launch.base import Place
from millrace.launch.local import LOCAL
from millrace.launch.ports import free_block, free_port, free_ports, joined, require_free

SERVE = Path(__file__).with_name("serve.py")  # not imported: it runs on the engine's interpreter
# Files in shared memory. SGLang never removes the first, and a killed server removes none: 25 MB with several ranks.
LEFTOVERS = ("sglang_loads_*", "sgl_shm_mq_*", "sem.mp-*")
# With DP attention, SGLang also uses this many ports after the rendezvous port.
DERIVED_PORTS = 13


async def launch(config: SGLangEngineConfig, spec: LaunchSpec, *, python: Path | None = None) -> Launched:
    """Start an SGLang, and wait until it is healthy. See `millrace.engines.kinds.launch`.

    The logs are `NAME.log`, or `NAME-nodeN.log` for each node. The keys are new. python: an interpreter that has the
    engine; None for the config's, or that of the installed environment.
    """
    if spec.launcher is not LOCAL:
        return await launch_at_places(config, spec, Planning(gpus, _ports_at, _plan, _gpus_of), leftovers=LEFTOVERS)
    python = python or await checked_interpreter(config)
    name = spec.name(config.kind)
    config = await with_dtype(config, spec.model_path)
    api_key, admin_key = new_keys(spec.api_key)
    ports = choose_ports(config, spec.replica)
    planned = nodes(config, spec, ports=ports, api_key=api_key, admin_key=admin_key)
    server = await start_nodes(
        name,
        [with_extension(node) for node in planned],
        python=python,
        serve=SERVE,
        log_dir=spec.log_dir,
        leftovers=(*LEFTOVERS, *leftovers(ports.kv_events)),
        deadline=config.start_timeout,
    )
    url = planned[0].url if planned[0].rank == 0 else None
    on = rank_gpus(config, spec.replica, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Launched(name, url, api_key, admin_key, server, ports.kv_events, on)


def choose_ports(config: SGLangEngineConfig, replica: int) -> Ports:
    """Return the config's ports, and free ports for those that it leaves open.

    Raises LaunchError if a port of the config is in use.
    """
    http = free_ports(config.host, len(local_ranks(config)), "engine.host")
    if config.ports is not None:
        require_free(config.host, config.ports[replica])
        http[0] = config.ports[replica]
    shares_ranks = attention_dp(config)
    rendezvous = config.dist_init_addr
    if rendezvous is None and (config.nnodes > 1 or shares_ranks):
        rendezvous = f"127.0.0.1:{free_block('127.0.0.1', DERIVED_PORTS + 1)}"
    # Separate data-parallel ranks meet at a port each, which SGLang lets the kernel choose.
    nccl = None if config.dp_size > 1 and not shares_ranks else free_port(config.host, "engine.host")
    kv_events = new_endpoint() if config.kv_events and 0 in local_ranks(config) else None
    return Ports(tuple(http), nccl, rendezvous, kv_events)


async def _ports_at(config: SGLangEngineConfig, places: Sequence[Place]) -> Sequence[Ports]:
    """Return the ports of each node: two at its place, and on node 0's host also those where the ranks meet."""
    shares_ranks = attention_dp(config)
    meet = config.nnodes > 1 or shares_ranks
    firsts = [await place.free_ports(2 if rank or not meet else DERIVED_PORTS + 3) for rank, place in enumerate(places)]
    rendezvous = joined(places[0].host, firsts[0] + 2) if meet else None
    own_nccl = config.dp_size > 1 and not shares_ranks
    return [Ports((first,), None if own_nccl else first + 1, rendezvous) for first in firsts]


def _plan(config: SGLangEngineConfig, spec: LaunchSpec, ports: Ports, api_key: str, admin_key: str) -> Node:
    (node,) = nodes(config, spec, ports=ports, api_key=api_key, admin_key=admin_key)
    return node


def _gpus_of(config: SGLangEngineConfig) -> tuple[str, ...]:
    return rank_gpus(config, 0, None)
