"""`millrace serve` as its user runs it: a real process with a real engine, asked by an SDK."""

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import openai
import pytest

CONFIG = """
folder: {folder}
model: {{kind: pretrained, path: {model}}}
engine: {{kind: embedded, replicas: 1}}
gateway: {{port: 0, folder: {folder}/episodes}}
"""
START = 120.0  # seconds
DOCS = Path(__file__).parents[2] / "docs/clusters.md"


@asynccontextmanager
async def served(folder: Path, *overrides: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Runs the command while the block runs, and yields the process and the gateway's URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "millrace", "serve", str(folder / "serve.yaml"), *overrides,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START):
            async for line in process.stdout:
                if found := re.search(rb"agents are served at (http://\S+);", line):
                    yield process, found[1].decode()
                    return
        raise AssertionError("the command ended")
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(START):
            assert await process.wait() == 0


async def ask(base_url: str, key: str) -> None:
    """Asks the model by OpenAI's SDK, for an answer of eight tokens."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
        answer = await client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "3 + 4?"}], max_tokens=8, temperature=0.5
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].finish_reason == "length"


async def test_an_episode_from_its_opening_to_its_samples(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(CONFIG.format(folder=tmp_path / "run", model=tiny_model))
    async with served(tmp_path) as (_, url):
        key = (tmp_path / "run" / "gateway.key").read_text()
        control = aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {key}"})
        async with control:
            async with control.post("/episodes", json={"metadata": {"task": 7}}) as response:
                opened = await response.json()
            await ask(opened["base_url"], opened["api_key"])
            async with control.post("/update_weights", json={"weight_dir": str(tiny_model)}) as response:
                assert (await response.json())["failed"] == {}
            async with control.post(f"/episodes/{opened['id']}/finish", json={"reward": 0.5}) as response:
                finished = await response.json()
            assert (finished["status"], finished["reward"], finished["generations"]) == ("closed", 0.5, 1)
            with pytest.raises(openai.ConflictError, match="closed"):
                await ask(opened["base_url"], opened["api_key"])
            async with control.get(f"/episodes/{opened['id']}/samples") as response:
                [sample] = (await response.json())["samples"]
        assert sum(sample["loss_mask"]) == 8
        assert sample["temperatures"] == [0.5]
        assert sample["version_spans"] == [[0, len(sample["token_ids"]) - 8, len(sample["token_ids"])]]
        await check_the_folder_is_in_use(tmp_path)
    async with served(tmp_path) as (_, url):  # the episode is still there, and the key is the same
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(url, headers=headers) as control, control.get("/episodes") as response:
            assert [episode["id"] for episode in (await response.json())["episodes"]] == [opened["id"]]


async def test_a_preemption_notice_takes_the_engines_of_a_host_out_and_others_come(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "serve.yaml").write_text(CONFIG.format(folder=tmp_path / "run", model=tiny_model))
    async with served(tmp_path, "engine.replicas={min: 1, max: 2}", "metrics.port=0") as (_, url):
        key = (tmp_path / "run" / "gateway.key").read_text()
        async with (
            aiohttp.ClientSession(url) as other,
            other.post("/preempt", json={"engine": "embedded-0"}) as refused,
        ):
            assert refused.status == 401
        async with aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {key}"}) as control:
            for body, status, words in (
                ({}, 400, "give either the name of an engine or the host"),
                ({"engine": "embedded-7"}, 404, "there is no engine embedded-7: embedded-0 (ready"),
                ({"engine": "embedded-0", "deadline": 0}, 400, "deadline: Input should be greater than 0"),
                ({"host": "10.0.0.1"}, 404, "there is no engine at 10.0.0.1"),
            ):
                async with control.post("/preempt", json=body) as response:
                    assert response.status == status
                    assert words in (await response.json())["error"]["message"]
            async with control.post("/preempt", json={"host": "127.0.0.1", "deadline": 5}) as response:
                assert await response.json() == {"preempted": ["embedded-0"]}
            async with control.post("/episodes", json={}) as response:
                opened = await response.json()
            await ask(opened["base_url"], opened["api_key"])  # waits for the engine that comes


async def test_the_trap_of_the_docs_takes_the_engines_of_its_host_out_and_others_come(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The line of docs/clusters.md, in a shell that gets SIGTERM."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (line,) = re.findall(r"^trap .*/preempt.*$", DOCS.read_text(), re.MULTILINE)
    (tmp_path / "serve.yaml").write_text(CONFIG.format(folder=tmp_path / "run", model=tiny_model))
    async with served(tmp_path, "engine.replicas=2") as (_, url):
        key = (tmp_path / "run" / "gateway.key").read_text()
        given = {"KEY": key, "GATEWAY": url, "ENGINE_HOST": "127.0.0.1"}
        shell = await asyncio.create_subprocess_exec(
            *("bash", "-c", f"{line}\necho ready; while sleep 0.1; do :; done"),
            env={**os.environ, **given},
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert shell.stdout is not None
            async with asyncio.timeout(60):
                assert await shell.stdout.readline() == b"ready\n"
                shell.send_signal(signal.SIGTERM)
                answer = json.loads(await shell.stdout.readuntil(b"}"))
            assert answer == {"preempted": ["embedded-0", "embedded-1"]}
        finally:
            shell.kill()
            await shell.communicate()
        async with aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {key}"}) as control:
            async with control.post("/episodes", json={}) as response:
                opened = await response.json()
            await ask(opened["base_url"], opened["api_key"])  # waits for the engines that come


async def check_the_folder_is_in_use(folder: Path) -> None:
    """A second server from the same folder would take the first one's episodes and key."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "millrace", "serve", str(folder / "serve.yaml"), stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(START):
        _, error = await process.communicate()
    assert process.returncode == 1
    assert b"run is in use by another `millrace serve`; give another name=..." in error


async def test_a_gateway_for_other_hosts_needs_a_key(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(CONFIG.format(folder=tmp_path / "run", model=tiny_model))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "millrace", "serve", str(tmp_path / "serve.yaml"), "gateway.host=0.0.0.0",
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(START):
        _, error = await process.communicate()
    assert process.returncode == 1
    assert b"set a key in the variable MILLRACE_GATEWAY_KEY" in error
