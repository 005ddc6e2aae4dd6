"""Launches real SGLang servers. They get their settings, keep their keys secret, and leave nothing running."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from millrace.config.engines import SGLangEngineConfig
from millrace.engines.sglang.launch import choose_ports, launch
from millrace.engines.spec import LaunchSpec
from millrace.errors import LaunchError
from millrace.launch.ports import free_block
from tests.engines.processes import below, command_lines, logs, processes, until_ended

START_TIMEOUT = 240.0  # seconds; a start takes 20 on a quiet machine

SGLangPython = Callable[[str], Path]


def cpu_config(**settings: Any) -> SGLangEngineConfig:
    return SGLangEngineConfig(kind="sglang", device="cpu", threads=1, start_timeout=START_TIMEOUT, **settings)


async def generate(url: str, key: str | None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    async with (
        aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(60)) as session,
        session.post(f"{url}/generate", json=body) as response,
    ):
        return response.status, await response.json(content_type=None)


LAUNCHER = textwrap.dedent("""
    import asyncio, json, sys
    from pathlib import Path
    from millrace.config.engines import SGLangEngineConfig
    from millrace.engines.sglang.launch import launch
    from millrace.engines.spec import LaunchSpec

    async def main():
        config, model, python, log_dir = sys.argv[1:]
        launched = await launch(
            SGLangEngineConfig.model_validate_json(config),
            LaunchSpec(model_path=Path(model), log_dir=Path(log_dir), version=7, seed=5),
            python=Path(python),
        )
        print(json.dumps([launched.url, launched.api_key, launched.admin_key, repr(launched)]), flush=True)
        while launched.process.running:
            await asyncio.sleep(0.02)
        print(json.dumps([launched.process.describe_end(), launched.process.log_tail()]), flush=True)
        await asyncio.sleep(600)

    asyncio.run(main())
""")


@pytest.fixture
def launcher(tiny_model: Path, sglang_python: SGLangPython, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that launches an engine over two nodes, and prints its URL and keys, and later how it ended."""
    config = cpu_config(
        version="0.5.15",
        nnodes=2,
        tp_size=2,
        env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
        engine_args={"enable_metrics": True},
    )
    python = sglang_python("0.5.15")
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, config.model_dump_json(), str(tiny_model), str(python), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


async def told(launcher: subprocess.Popen[str]) -> list[str]:
    """Reads the next line that the launcher prints."""
    assert launcher.stdout is not None
    words: list[str] = json.loads(await asyncio.to_thread(launcher.stdout.readline))
    return words


@pytest.mark.slow
async def test_an_engine_over_two_nodes_keeps_its_keys_and_dies_with_its_launcher(
    launcher: subprocess.Popen[str], tmp_path: Path
) -> None:
    """The first node is a whole server, so these checks also hold for an engine of one node."""
    url, api_key, admin_key, shown = await told(launcher)
    tree = below(launcher.pid)

    assert (await generate(url, None))[0] == 401
    assert (await generate(url, "wrong"))[0] == 401
    status, answer = await generate(url, api_key)
    assert status == 200
    assert len(answer["output_ids"]) == 4
    assert answer["meta_info"]["weight_version"] == "7"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        async with session.post(
            f"{url}/flush_cache", headers={"Authorization": f"Bearer {api_key}"}
        ) as response:  # this is a control route
            assert response.status == 401
        async with session.post(f"{url}/flush_cache", headers={"Authorization": f"Bearer {admin_key}"}) as response:
            assert response.status == 200
        async with session.get(f"{url}/server_info", headers={"Authorization": f"Bearer {api_key}"}) as response:
            info = await response.json()
        async with session.get(f"{url}/metrics") as response:  # engine_args enabled it
            assert "sglang" in await response.text()
    assert info["random_seed"] == 5
    assert info["max_total_tokens"] == 65536

    written = logs(tmp_path)
    assert set(written) == {"sglang-0-node0.log", "sglang-0-node1.log"}
    for log in written.values():
        assert "api_key='***'" in log
    readable = "".join(written.values()) + command_lines(tree) + shown + json.dumps(info.get("launch_command"))
    assert "serve.py" in readable
    assert api_key not in readable
    assert admin_key not in readable

    (node1,) = (pid for pid in tree if "--node-rank=1" in command_lines({pid}) and is_serve(pid))
    os.kill(node1, signal.SIGKILL)
    end, log_tail = await told(launcher)
    assert end == "sglang-0-node1 was killed by SIGKILL"
    assert str(tmp_path / "sglang-0-node1.log") in log_tail
    # tests/launch/test_nodes.py tests that the end of one node ends the others. Here, the guard of the killed node has
    # ended its own processes. The other node outlives the launcher just long enough for its guard to end the rest.
    assert len(tree & processes().keys()) >= 4  # a guard, the server, its scheduler and its detokenizer
    os.kill(launcher.pid, signal.SIGKILL)
    await asyncio.to_thread(until_ended, tree, 15)


@pytest.mark.slow
async def test_an_argument_that_sglang_does_not_know_ends_in_its_own_words(
    tiny_model: Path, sglang_python: SGLangPython, tmp_path: Path
) -> None:
    before = below(os.getpid())
    config = cpu_config(engine_args={"no_such_argument": 3})
    with pytest.raises(LaunchError, match=r"(?s)sglang-0 ended with status 2.*unrecognized.*--no-such-argument=3"):
        await launch(config, LaunchSpec(model_path=tiny_model, log_dir=tmp_path), python=sglang_python("0.5.23"))
    assert below(os.getpid()) <= before


def is_serve(pid: int) -> bool:
    """Whether the process is a node's server itself, not its guard or one of its children."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1].endswith("serve.py")


async def test_an_interpreter_that_is_not_there_is_a_clear_error(tiny_model: Path, tmp_path: Path) -> None:
    before = below(os.getpid())
    with pytest.raises(LaunchError, match=r"(?s)/no/such/python could not be started"):
        await launch(cpu_config(), LaunchSpec(model_path=tiny_model, log_dir=tmp_path), python=Path("/no/such/python"))
    assert below(os.getpid()) <= before


def test_the_engines_program_stays_out_of_this_process() -> None:
    assert "millrace.engines.sglang.serve" not in sys.modules
    assert logging.getLogRecordFactory() is logging.LogRecord


def test_ranks_that_share_a_group_meet_where_the_ports_after_it_are_free() -> None:
    config = cpu_config(tp_size=2, dp_size=2, engine_args={"enable_dp_attention": True})
    ports = choose_ports(config, 0)
    assert ports.rendezvous is not None
    assert ports.nccl is not None
    assert len({*ports.http, ports.nccl, int(ports.rendezvous.rpartition(":")[2])}) == 3


def test_every_launch_publishes_at_its_own_endpoint() -> None:
    one, two = (choose_ports(cpu_config(kv_events=True), 0).kv_events for _ in range(2))
    assert one is not None
    assert two not in (None, one)
    assert choose_ports(cpu_config(), 0).kv_events is None


def test_ranks_that_share_nothing_get_no_common_port() -> None:
    ports = choose_ports(cpu_config(dp_size=2), 0)
    assert ports.nccl is None
    assert ports.rendezvous is None


def test_the_configs_port_is_taken_and_refused_when_it_is_not_free() -> None:
    port = free_block("127.0.0.1", 2)
    assert choose_ports(cpu_config(replicas=2, ports=(port, port + 1)), 1).http == (port + 1,)
    import socket

    with socket.create_server(("127.0.0.1", port)), pytest.raises(LaunchError, match=f"port {port} of 127.0.0.1"):
        choose_ports(cpu_config(ports=(port,)), 0)
