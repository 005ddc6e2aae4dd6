"""A real server in a process of its own, with a tiny model, and a plain HTTP client."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from millrace.launch.ports import free_port

VOCAB = 300
CONTEXT = 512
EOS = 299
START_LIMIT = 60.0  # seconds; the machine may be busy with other work


def make_model(folder: Path, seed: int) -> Path:
    """Makes a tiny Qwen3 with tied embeddings. Its random weights are wide enough to give tokens clearly different
    logits."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.15,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Limits torch to one thread. For models this small a second thread only waits, and the servers need the other
    core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "base", seed=0)


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same architecture and other weights."""
    return make_model(tmp_path_factory.mktemp("models") / "other", seed=1)


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def base(model_dir: Path) -> Any:
    return _load(model_dir)


@pytest.fixture(scope="session")
def other(other_dir: Path) -> Any:
    return _load(other_dir)


def server_command(model: Path, port: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "millrace.engines.embedded", "--model", str(model), "--port", str(port), *options]


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def mapped_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    async def until_healthy(self) -> None:
        end = time.monotonic() + START_LIMIT
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < end:
                assert self.process.poll() is None, self.log.read_text()
                try:
                    async with session.get(f"{self.url}/health") as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.02)
        raise AssertionError(f"not healthy within {START_LIMIT} s: {self.log.read_text()}")

    def end(self) -> int:
        """Asks the server to end and returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=10)


StartServer = Callable[..., Server]


@pytest.fixture(scope="session")
def start_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """Starts servers without waiting for them. Servers that still run at the end are killed."""
    started: list[Server] = []

    def start(*options: str, env: Mapping[str, str] = {}, model: Path = model_dir) -> Server:
        port = free_port("127.0.0.1")
        log = tmp_path_factory.mktemp("server") / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                server_command(model, port, "--threads", "1", *options),
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            )
        started.append(Server(process, f"http://127.0.0.1:{port}", log))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait(timeout=10)


class Api:
    """An HTTP client of one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str | None = None) -> None:
        self._session, self.url = session, url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        data = None if body is None else orjson.dumps(body)
        async with self._session.request(method, self.url + path, data=data, headers=self._headers) as response:
            raw = await response.read()
            return response.status, orjson.loads(raw) if response.content_type == "application/json" else raw

    async def post(self, path: str, body: object = None) -> Any:
        status, answer = await self.call("POST", path, {} if body is None else body)
        assert status == 200, answer
        return answer

    async def get(self, path: str) -> Any:
        status, answer = await self.call("GET", path)
        assert status == 200, answer
        return answer

    async def refused(self, path: str, body: object = None, status: int = 400) -> str:
        """Makes a call that must be refused and returns the message."""
        got, answer = await self.call("POST", path, {} if body is None else body)
        assert got == status, answer
        message = answer["error"]["message"]
        assert isinstance(message, str)
        return message

    async def generate(self, input_ids: list[int], *, rid: str | None = None, **params: object) -> Any:
        body: dict[str, object] = {"input_ids": input_ids, "sampling_params": params, "return_logprob": True}
        if rid is not None:
            body["rid"] = rid
        return await self.post("/generate", body)

    async def stream(self, input_ids: list[int], *, rid: str | None = None, **params: object) -> AsyncIterator[Any]:
        body: dict[str, object] = {
            "input_ids": input_ids,
            "sampling_params": params,
            "return_logprob": True,
            "stream": True,
        }
        if rid is not None:
            body["rid"] = rid
        async with self._session.post(
            f"{self.url}/generate", data=orjson.dumps(body), headers=self._headers
        ) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield orjson.loads(line[6:])

    async def load(self) -> Any:
        return (await self.get("/v1/loads"))["loads"][0]

    async def until(self, condition: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not await condition():
            assert time.monotonic() < end, "the condition did not come true in time"
            await asyncio.sleep(0.005)

    async def until_running(self, count: int) -> None:
        async def running() -> bool:
            return bool((await self.load())["num_running_reqs"] == count)

        await self.until(running)


@pytest.fixture(scope="session")
def session_server(start_server: StartServer) -> Server:
    return start_server("--faults", "--max-running-requests", "16", "--cached-prefixes", "8", "--weight-version", "0")


@pytest.fixture
async def api(session_server: Server, model_dir: Path) -> AsyncIterator[Api]:
    """A client of the shared server. It is reset to its first state: base weights as version 0, nothing running, an
    empty cache."""
    await session_server.until_healthy()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        api = Api(session, session_server.url)
        await api.post("/inject_fault", {"kind": "slow", "seconds": 0})
        await api.post("/abort_request", {"abort_all": True})
        await api.post("/continue_generation")
        await api.post("/abort_weight_update")
        await api.post("/resume_memory_occupation")
        if (await api.get("/model_info"))["weight_version"] != "0":
            await api.post("/update_weights_from_disk", {"model_path": str(model_dir), "weight_version": "0"})
        await api.post("/flush_cache")
        yield api


def logprobs_of(model: Any, prompt: list[int], output: list[int], temperature: float = 1.0) -> list[float]:
    """Returns the logprob of each output token by transformers' own full forward pass."""
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1].float()
    logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    return [float(row[token]) for row, token in zip(logprobs_TV, output, strict=True)]


def reported_logprobs(answer: Any) -> list[float]:
    entries = answer["meta_info"]["output_token_logprobs"]
    assert [entry[1] for entry in entries] == answer["output_ids"]
    return [entry[0] for entry in entries]


def greedy_of(model: Any, prompt: list[int], count: int) -> list[int]:
    """Returns the greedy tokens of transformers' own generation."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return list(output[0, len(prompt) :].tolist())
