"""The server process: its start and end, its keys, and the faults that it makes on demand."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest

from millrace.launch.ports import free_port
from tests.engines.embedded.conftest import Api, Server, StartServer, server_command

KEYS = {"MILLRACE_API_KEY": "key-of-the-readers", "MILLRACE_ADMIN_API_KEY": "key-of-the-admins"}


@pytest.fixture(scope="session")
def guarded(start_server: StartServer) -> Server:
    return start_server(env=KEYS)


@pytest.fixture(scope="session")
def expendable(start_server: StartServer) -> list[Server]:
    """Servers that one test each breaks. They are started together, because a start costs seconds."""
    return [start_server("--faults") for _ in range(2)]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_port_in_use_is_one_clear_line(model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        begun = time.monotonic()
        result = run(*server_command(model_dir, port))
        assert time.monotonic() - begun < 3  # it ends before it imports anything heavy
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1
    assert str(port) in result.stderr
    assert "--port" in result.stderr


def test_port_0_is_refused(model_dir: Path) -> None:
    result = run(*server_command(model_dir, 0))
    assert result.returncode != 0
    assert "--port" in result.stderr


def test_a_folder_without_a_model_is_one_clear_line(tmp_path: Path) -> None:
    result = run(*server_command(tmp_path, free_port("127.0.0.1")))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert str(tmp_path) in result.stderr
    assert "config.json" in result.stderr


def libraries_cpu_seconds() -> float:
    """Measures the CPU seconds of importing torch and transformers' model."""
    before = os.times()
    imported = "import torch; import transformers.models.qwen3.modeling_qwen3"
    subprocess.run([sys.executable, "-c", imported], check=True, timeout=120)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


async def test_it_is_healthy_within_6_seconds_and_ends_within_2(guarded: Server) -> None:
    """The start is measured in CPU seconds. On an idle machine these are wall seconds. A busy machine takes more of
    them for the same work, so it may take twice as long as importing the libraries."""
    await guarded.until_healthy()
    spent = guarded.cpu_seconds()
    assert spent < 6 or spent < 2 * libraries_cpu_seconds()
    async with aiohttp.ClientSession() as session:
        api = Api(session, guarded.url, KEYS["MILLRACE_API_KEY"])
        running = asyncio.create_task(
            api.call("POST", "/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 500, "n": 60}})
        )
        await _check_keys(guarded)
        begun = time.monotonic()
        guarded.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(guarded.process.wait, 10) == 0
        assert time.monotonic() - begun < 2
        await asyncio.wait([running])
    log = guarded.log.read_text()
    assert "Traceback" not in log
    assert not any(key in log for key in KEYS.values())


async def _check_keys(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        reader = Api(session, server.url, KEYS["MILLRACE_API_KEY"])
        admin = Api(session, server.url, KEYS["MILLRACE_ADMIN_API_KEY"])
        control = "/pause_generation", "/continue_generation", "/begin_weight_update", "/abort_weight_update"
        for stranger in (Api(session, server.url), Api(session, server.url, "unknown-key")):
            assert (await stranger.call("GET", "/health"))[0] == 200
            for path in ("/model_info", "/server_info", "/v1/loads", "/health_generate"):
                assert (await stranger.call("GET", path))[0] == 401
            assert "key" in await stranger.refused("/generate", {"input_ids": [1]}, status=401)
        for path in control:
            await reader.refused(path, status=401)
            await admin.post(path)
        for knower in (reader, admin):
            await knower.get("/model_info")
            await knower.generate([1], max_new_tokens=1)
        assert (await admin.call("POST", "/inject_fault", {"kind": "crash"}))[0] == 404  # the route needs --faults


async def test_a_crash_after_so_many_tokens(expendable: list[Server]) -> None:
    server = expendable[0]
    await server.until_healthy()
    async with aiohttp.ClientSession() as session:
        api = Api(session, server.url)
        await api.post("/inject_fault", {"kind": "drop_connection", "count": 1})
        with pytest.raises(aiohttp.ClientConnectionError):
            await api.generate([1], max_new_tokens=2)
        await api.generate([1], max_new_tokens=2)
        await api.post("/inject_fault", {"kind": "crash", "after_tokens": 20})
        await api.generate([1], max_new_tokens=10, ignore_eos=True)
        with pytest.raises(aiohttp.ClientError):
            await api.generate([1], max_new_tokens=100, ignore_eos=True)
    assert await asyncio.to_thread(server.process.wait, 10) == -signal.SIGKILL


async def test_a_hanging_model_still_ends_and_a_hanging_loop_answers_no_request(expendable: list[Server]) -> None:
    server = expendable[1]
    await server.until_healthy()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.5)) as session:
        api = Api(session, server.url)
        await api.post("/inject_fault", {"kind": "hang"})
        with pytest.raises(TimeoutError):
            await api.generate([1], max_new_tokens=2)
        assert (await api.call("GET", "/health"))[0] == 200
        await api.get("/v1/loads")
        await api.post("/inject_fault", {"kind": "hang", "where": "http"})

        async def silent() -> bool:
            try:
                await api.get("/health")
            except TimeoutError:
                return True
            return False

        await api.until(silent)
    assert server.process.poll() is None
