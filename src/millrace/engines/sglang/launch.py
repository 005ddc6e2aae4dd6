"""Starts an SGLang server: one process, or one for each of its nodes."""

from contextlib import ExitStack
from pathlib import Path

from millrace.config.models import SGLangEngineConfig
from millrace.engines.sglang.arguments import Ports, attention_dp, nodes
from millrace.engines.stock.arguments import local_ranks
from millrace.engines.stock.kv_events import leftovers, new_endpoint
from millrace.engines.stock.launching import Launched, new_keys, start_nodes, with_dtype
from millrace.errors import LaunchError
from millrace.launch.ports import bound, free_port, free_ports, require_free

SERVE = Path(__file__).with_name("serve.py")  # not imported: it is the engine's
# In shared memory, where SGLang never removes the first, and a killed server none: 25 MB with several ranks.
LEFTOVERS = ("sglang_loads_*", "sgl_shm_mq_*", "sem.mp-*")
# With DP attention SGLang takes the ports after the one where its ranks meet, up to this distance.
DERIVED_PORTS = 13
BLOCK_ATTEMPTS = 50


async def launch(
    config: SGLangEngineConfig,
    model_path: Path,
    *,
    python: Path,
    replica: int,
    log_dir: Path,
    version: int,
    seed: int,
    prefix: str = "sglang",
    api_key: str | None = None,
) -> Launched:
    """Starts replica number `replica` with the interpreter `python`, which has SGLang, and waits until it is healthy.

    Its logs are `PREFIX-R.log`, or `PREFIX-R-nodeN.log` for each node. The keys are made here and known to nobody else.
    Raises ConfigError when engine_args or env contradict the settings, and LaunchError, with the end of the server's
    log, when it does not come up; nothing is left running then.
    """
    name = f"{prefix}-{replica}"
    config = await with_dtype(config, model_path)
    api_key, admin_key = new_keys(api_key)
    ports = choose_ports(config, replica)
    planned = nodes(
        config,
        model_path,
        replica=replica,
        version=version,
        seed=seed,
        ports=ports,
        api_key=api_key,
        admin_key=admin_key,
    )
    server = await start_nodes(
        name,
        planned,
        python=python,
        serve=SERVE,
        log_dir=log_dir,
        leftovers=(*LEFTOVERS, *leftovers(ports.kv_events)),
        deadline=config.start_timeout,
    )
    return Launched(name, planned[0].url if planned[0].rank == 0 else None, api_key, admin_key, server, ports.kv_events)


def choose_ports(config: SGLangEngineConfig, replica: int) -> Ports:
    """The config's ports and, for what it leaves open, the kernel's. Raises LaunchError when the config's are taken."""
    http = free_ports(config.host, len(local_ranks(config)), "engine.host")
    if config.ports is not None:
        require_free(config.host, config.ports[replica])
        http[0] = config.ports[replica]
    shares_ranks = attention_dp(config)
    rendezvous = config.dist_init_addr
    if rendezvous is None and (config.nnodes > 1 or shares_ranks):
        rendezvous = f"127.0.0.1:{free_block('127.0.0.1', DERIVED_PORTS + 1)}"
    # Data-parallel ranks that share nothing each meet at a port of their own, which SGLang has the kernel choose.
    nccl = None if config.dp_size > 1 and not shares_ranks else free_port(config.host, "engine.host")
    kv_events = new_endpoint() if config.kv_events and 0 in local_ranks(config) else None
    return Ports(tuple(http), nccl, rendezvous, kv_events)


def free_block(host: str, count: int) -> int:
    """The first of `count` successive ports that were free a moment ago."""
    for _ in range(BLOCK_ATTEMPTS):
        first = free_port(host)
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(bound(host, port))
            except (OSError, OverflowError):
                continue  # one is taken, or there is no such port
            return first
    raise LaunchError(f"{host} has no {count} successive free ports; name a host:port in engine.dist_init_addr")
