"""Starts an SGLang server: one process, or one for each of its nodes."""

import getpass
import os
import secrets
import socket
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from millrace.config.models import SGLangEngineConfig
from millrace.engines.sglang.arguments import Ports, attention_dp, local_ranks, nodes
from millrace.errors import EngineError, LaunchError
from millrace.http import HttpClient
from millrace.launch.nodes import Nodes
from millrace.launch.ports import free_port, require_free
from millrace.launch.process import ServerProcess

SERVE = Path(__file__).with_name("serve.py")  # not imported: it is the engine's
# In shared memory, where SGLang never removes the first, and a killed server none: 25 MB with several ranks.
LEFTOVERS = ("sglang_loads_*", "sgl_shm_mq_*", "sem.mp-*")
PROBE_DEADLINE = 10.0  # of one GET /health, which generates a token: a second on a quiet CPU
# With DP attention SGLang takes the ports after the one where its ranks meet, up to this distance.
DERIVED_PORTS = 13
BLOCK_ATTEMPTS = 50


@dataclass(frozen=True, slots=True)
class Launched:
    """A server that was started here and is healthy. `url` is None where another host is node 0, which answers HTTP."""

    name: str
    url: str | None
    api_key: str = field(repr=False)
    admin_key: str = field(repr=False)
    process: ServerProcess | Nodes


async def launch(
    config: SGLangEngineConfig, model_path: Path, *, python: Path, replica: int, log_dir: Path, version: int, seed: int
) -> Launched:
    """Starts replica number `replica` with the interpreter `python`, which has SGLang, and waits until it is healthy.

    Its logs are `sglang-R.log`, or `sglang-R-nodeN.log` for each node. The keys are made here and known to nobody else.
    Raises ConfigError when engine_args or env contradict the settings, and LaunchError, with the end of the server's
    log, when it does not come up; nothing is left running then.
    """
    name = f"sglang-{replica}"
    api_key, admin_key = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    planned = nodes(
        config,
        model_path,
        replica=replica,
        version=version,
        seed=seed,
        ports=choose_ports(config, replica),
        api_key=api_key,
        admin_key=admin_key,
    )
    interpreter, path = programs_of(python)
    # What torch has compiled stays from one start to the next, though the server's own temporary folder does not.
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
    processes: list[ServerProcess] = []
    clients: list[HttpClient] = []
    try:
        for node in planned:
            label = name if len(planned) == 1 else f"{name}-node{node.rank}"
            processes.append(
                await ServerProcess.start(
                    label,
                    [str(interpreter), str(SERVE), *node.arguments],
                    log_dir / f"{label}.log",
                    env={"PATH": path, "TORCHINDUCTOR_CACHE_DIR": compiled, **node.environment},
                    leftovers=LEFTOVERS,
                )
            )
            clients.append(HttpClient(label, node.url))
        server = processes[0] if len(processes) == 1 else Nodes(name, processes)

        async def healthy() -> bool:  # a port may have been taken by another server, which answers for a dead one
            return await all_healthy(clients) and server.running

        await server.until_healthy(healthy, deadline=config.start_timeout)
        url = planned[0].url if planned[0].rank == 0 else None
        return Launched(name, url, api_key, admin_key, server)
    except BaseException:
        await Nodes(name, processes).end()
        raise
    finally:
        for client in clients:
            await client.close()


def programs_of(python: Path) -> tuple[Path, str]:
    """The interpreter's path, and a PATH on which its own programs come first: kernels are compiled with its ninja."""
    interpreter = python.absolute()  # a link stays one: what it leads to knows nothing of the virtual environment
    return interpreter, f"{interpreter.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


async def all_healthy(clients: list[HttpClient]) -> bool:
    """Whether every node answers. Node 0 generates a token for it; the others answer once their ranks are ready."""
    for client in clients:
        try:
            await client.control("GET", "/health", deadline=PROBE_DEADLINE)
        except EngineError:
            return False  # it is starting; when it can't, its process ends or the caller's deadline passes
    return True


def choose_ports(config: SGLangEngineConfig, replica: int) -> Ports:
    """The config's ports and, for what it leaves open, the kernel's. Raises LaunchError when the config's are taken."""
    http = free_ports(config.host, len(local_ranks(config)))
    if config.ports is not None:
        require_free(config.host, config.ports[replica])
        http[0] = config.ports[replica]
    shares_ranks = attention_dp(config)
    rendezvous = config.dist_init_addr
    if rendezvous is None and (config.nnodes > 1 or shares_ranks):
        rendezvous = f"127.0.0.1:{free_block('127.0.0.1', DERIVED_PORTS + 1)}"
    # Data-parallel ranks that share nothing each meet at a port of their own, which SGLang has the kernel choose.
    nccl = None if config.dp_size > 1 and not shares_ranks else free_port(config.host)
    return Ports(tuple(http), nccl, rendezvous)


def free_ports(host: str, count: int) -> list[int]:
    """Different ports that were free a moment ago."""
    with ExitStack() as held:
        return [held.enter_context(socket.create_server((host, 0))).getsockname()[1] for _ in range(count)]


def free_block(host: str, count: int) -> int:
    """The first of `count` successive ports that were free a moment ago."""
    for _ in range(BLOCK_ATTEMPTS):
        first = free_port(host)
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.create_server((host, port)))
            except (OSError, OverflowError):
                continue  # one is taken, or there is no such port
            return first
    raise LaunchError(f"{host} has no {count} successive free ports; name a host:port in engine.dist_init_addr")
