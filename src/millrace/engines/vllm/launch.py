"""Start a vLLM server: one process, or one process for each node."""

import asyncio
import os
from pathlib import Path

from millrace.config.engines import VLLMEngineConfig
from millrace.engines.spec import Launched, LaunchSpec
from millrace.engines.stock.arguments import local_ranks
from millrace.engines.stock.interpreter import checked_interpreter
from millrace.engines.stock.kv_events import leftovers, new_endpoint
from millrace.engines.stock.launching import new_keys, start_nodes, with_dtype, with_extension
from millrace.engines.vllm.arguments import Ports, nodes, rank_gpus
from millrace.errors import DataError, LaunchError
from millrace.launch.ports import free_port, free_ports, require_free
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
    python = python or await checked_interpreter(config)
    name = spec.name(config.kind)
    if config.device == "cpu":
        await asyncio.to_thread(require_heads, spec.model_path)
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
