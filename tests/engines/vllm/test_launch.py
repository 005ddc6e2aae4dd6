"""Launches real vLLM servers. They get their settings, keep their keys secret, and leave nothing running."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from millrace.config.engines import VLLMEngineConfig
from millrace.engines.join import join
from millrace.engines.spec import LaunchSpec
from millrace.engines.vllm.launch import choose_ports, launch
from millrace.errors import LaunchError
from millrace.extension.millrace_vllm_keys import DATA, OPEN
from millrace.launch.ports import free_ports
from tests.engines.processes import below, command_lines, logs, until_ended

START_TIMEOUT = 300.0  # seconds; a start takes 20 on a quiet machine


def cpu_config(**settings: Any) -> VLLMEngineConfig:
    return VLLMEngineConfig(kind="vllm", device="cpu", threads=1, start_timeout=START_TIMEOUT, **settings)


@asynccontextmanager
async def client(url: str, key: str | None) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(url, headers=headers, timeout=aiohttp.ClientTimeout(60)) as session:
        yield session


async def generate(url: str, key: str | None) -> tuple[int, Any]:
    body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4, "ignore_eos": True, "temperature": 0.5}}
    body["sampling_params"] |= {"logprobs": 0}  # type: ignore[operator]
    async with client(url, key) as session, session.post("/inference/v1/generate", json=body) as response:
        return response.status, await response.json()


async def statuses(url: str, key: str | None, routes: list[tuple[str, str]]) -> dict[tuple[str, str], int]:
    found = {}
    async with client(url, key) as session:
        for method, path in routes:
            async with session.request(method, path, json={}) as response:
                found[method, path] = response.status
    return found


LAUNCHER = textwrap.dedent("""
    import asyncio, json, sys
    from pathlib import Path
    from millrace.config.engines import VLLMEngineConfig
    from millrace.engines.vllm.launch import launch
    from millrace.engines.spec import LaunchSpec

    async def main():
        config, model, python, log_dir = sys.argv[1:]
        launched = await launch(
            VLLMEngineConfig.model_validate_json(config),
            LaunchSpec(model_path=Path(model), log_dir=Path(log_dir), seed=5),
            python=Path(python),
        )
        print(json.dumps([launched.url, launched.api_key, launched.admin_key, repr(launched)]), flush=True)
        await asyncio.sleep(600)

    asyncio.run(main())
""")


@pytest.fixture
def nodes() -> tuple[VLLMEngineConfig, VLLMEngineConfig]:
    """Plans an engine over two nodes, as each node would."""
    (port,) = free_ports("127.0.0.1", 1)
    common = {
        "nnodes": 2,
        "tp_size": 2,
        "dist_init_addr": f"127.0.0.1:{port}",
        "env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_HOST_IP": "127.0.0.1"},
        "engine_args": {"served_model_name": "tuned", "enable_prefix_caching": False},
    }
    return cpu_config(node_rank=0, **common), cpu_config(node_rank=1, **common)


@pytest.fixture
def launcher(
    nodes: tuple[VLLMEngineConfig, VLLMEngineConfig], tiny_model: Path, vllm_python: Path, tmp_path: Path
) -> Iterator[subprocess.Popen[str]]:
    """A process that launches the first node and prints its URL and keys."""
    arguments = [nodes[0].model_dump_json(), str(tiny_model), str(vllm_python), str(tmp_path / "0")]
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, *arguments], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
async def test_a_node_joins_and_all_keep_the_keys_and_die_with_the_firsts_launcher(
    nodes: tuple[VLLMEngineConfig, VLLMEngineConfig],
    launcher: subprocess.Popen[str],
    tiny_model: Path,
    vllm_python: Path,
    tmp_path: Path,
) -> None:
    """The first node is a whole server, so these checks also hold for an engine of one node."""
    shared_before = shared_memory()
    joined = asyncio.Event()
    config = nodes[1].model_copy(update={"python": vllm_python})
    second = asyncio.create_task(join(config, tiny_model, log_dir=tmp_path / "1", seed=5, ready=joined.set))
    try:
        assert launcher.stdout is not None
        line = await asyncio.to_thread(launcher.stdout.readline)
        assert joined.is_set()
        url, api_key, admin_key, shown = json.loads(line)
        tree = below(os.getpid())

        settings = await require_guarded(url, api_key, admin_key)
        readable = logs(tmp_path / "0")["vllm-0.log"] + logs(tmp_path / "1")["vllm-0.log"]
        readable += command_lines(tree) + shown + settings
        assert "serve.py" in readable
        assert api_key not in readable
        assert admin_key not in readable

        own = below(launcher.pid)
        assert len(own) >= 3  # the guard, the server and its engine
        os.kill(launcher.pid, signal.SIGKILL)
        await asyncio.to_thread(until_ended, own, 15)
        with pytest.raises(LaunchError, match=f"node 0 is gone: nothing answers at {nodes[0].dist_init_addr}|vllm-0 "):
            await asyncio.wait_for(second, 30)
    finally:
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
    await asyncio.to_thread(until_ended, tree - {launcher.pid}, 15)
    assert not {name for name in shared_memory() - shared_before if name.startswith("vllm_dist_")}


async def require_guarded(url: str, api_key: str, admin_key: str) -> str:
    """Requires that the server has the config's settings and that no route accepts a wrong key. Returns the server's
    description of itself."""
    status, answer = await generate(url, api_key)
    assert status == 200
    assert len(answer["choices"][0]["token_ids"]) == 4
    assert answer["model"] == "tuned"  # from engine_args

    async with client(url, api_key) as session:
        async with session.get("/openapi.json") as response:
            described = await response.json()
        async with session.get("/server_info") as response:
            settings: str = (await response.json())["vllm_config"]
        async with session.get("/get_world_size") as response:
            assert await response.json() == {"world_size": 2}
        async with session.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 2}) as response:
            assert response.status == 200
    assert "seed=5" in settings
    assert "enable_prefix_caching=False" in settings

    routes = [(method.upper(), path) for path, methods in described["paths"].items() for method in methods]
    control = [(method, path) for method, path in routes if method != "GET" and path not in DATA]
    assert {"/pause", "/sleep", "/collective_rpc", "/update_weights", "/abort_requests"} <= {
        path for _, path in control
    }
    guarded = [(method, path) for method, path in routes if path not in OPEN]
    assert set((await statuses(url, None, guarded)).values()) == {401}
    assert set((await statuses(url, "wrong", guarded)).values()) == {401}
    assert set((await statuses(url, api_key, control)).values()) == {401}
    harmless = [("POST", "/reset_prefix_cache"), ("POST", "/pause"), ("POST", "/resume"), ("GET", "/health")]
    assert set((await statuses(url, admin_key, harmless)).values()) == {200}
    assert (await statuses(url, None, [("GET", path) for path in OPEN])) == {("GET", path): 200 for path in OPEN}
    return str(described) + settings


@pytest.mark.slow
async def test_an_argument_that_vllm_does_not_know_ends_in_its_own_words(
    tiny_model: Path, vllm_python: Path, tmp_path: Path
) -> None:
    before = below(os.getpid())
    config = cpu_config(engine_args={"no_such_argument": 3})
    with pytest.raises(LaunchError, match=r"(?s)vllm-0 ended with status 2.*unrecognized.*--no-such-argument=3"):
        await launch(config, LaunchSpec(model_path=tiny_model, log_dir=tmp_path), python=vllm_python)
    assert below(os.getpid()) <= before


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def test_only_node_0_gets_a_port_for_http_and_no_port_twice() -> None:
    alone = choose_ports(cpu_config(), 0)
    assert alone.http is not None
    assert (alone.rendezvous, alone.data_parallel) == (None, None)
    both = choose_ports(cpu_config(nnodes=2, dp_size=2), 0)
    assert both.rendezvous is not None
    assert len({both.http, both.data_parallel, int(both.rendezvous.rpartition(":")[2])}) == 3
    second = cpu_config(nnodes=2, dp_size=2, node_rank=1, dist_init_addr="10.0.0.1:6000", data_parallel_rpc_port=6001)
    assert choose_ports(second, 0).http is None
    assert choose_ports(second, 0).rendezvous == "10.0.0.1:6000"
    assert choose_ports(second, 0).data_parallel == 6001


def test_the_configs_port_is_taken_and_refused_when_it_is_not_free() -> None:
    first, second = free_ports("127.0.0.1", 2)
    assert choose_ports(cpu_config(replicas=2, ports=(first, second)), 1).http == second
    with socket.create_server(("127.0.0.1", first)), pytest.raises(LaunchError, match=f"port {first} of 127.0.0.1"):
        choose_ports(cpu_config(ports=(first,)), 0)


async def test_a_model_that_would_kill_it_is_refused_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_attention_heads": 4}')
    with pytest.raises(LaunchError, match="no attention kernel for heads of 16 elements, only for 32, 64"):
        await launch(cpu_config(), LaunchSpec(model_path=tmp_path, log_dir=tmp_path), python=tmp_path)
