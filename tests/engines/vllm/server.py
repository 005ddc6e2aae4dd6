"""A real vLLM server on the CPU for tests, with Millrace's extension in its workers or without."""

import json
import mmap
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import torch

from millrace.checksum import sampled_checksums
from millrace.engines.stock.launching import EXTENSION
from millrace.extension.millrace_boxes import Box, label, read_box
from millrace.launch.ports import free_port
from millrace.launch.process import ServerProcess
from millrace.weights.plan import layout, padded

START_DEADLINE = 300.0  # seconds; a start takes 20 on a quiet machine
PROMPTS = ([5, 9, 200, 17, 44, 3], [301, 8, 8, 120], [77])


class SharedBucket:
    """Tensors in a memory file, as a trainer provides them."""

    def __init__(self, weights: Mapping[str, torch.Tensor], name: str = "bucket") -> None:
        self.specs = layout(
            [(n, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes) for n, t in weights.items()]
        )
        size = sum(padded(spec.nbytes) for spec in self.specs)
        self._fd = os.memfd_create(name)
        os.ftruncate(self._fd, size)
        self._bytes = torch.frombuffer(mmap.mmap(self._fd, size), dtype=torch.uint8)
        for spec, tensor in zip(self.specs, weights.values(), strict=True):
            self._bytes[spec.offset : spec.offset + spec.nbytes] = tensor.contiguous().reshape(-1).view(torch.uint8)

    def described(self) -> tuple[str, str]:
        place = {"kind": "shared_memory", "path": f"/proc/{os.getpid()}/fd/{self._fd}"}
        return json.dumps(place), json.dumps([(s.name, s.dtype, s.shape, s.offset, s.nbytes) for s in self.specs])

    def take_back(self) -> None:
        """Overwrites the memory, so that any later read of it gets wrong content."""
        self._bytes.fill_(0x5A)
        os.close(self._fd)


def rows(tensors: Mapping[str, torch.Tensor]) -> str:
    """What the extension is told about the tensors of an update."""
    return json.dumps([(n, str(t.dtype).removeprefix("torch."), t.shape, 0, t.nbytes) for n, t in tensors.items()])


class BucketOfParts(SharedBucket):
    """Boxes of tensors in a memory file, for the only rank of a server."""

    def __init__(self, weights: Mapping[str, torch.Tensor], boxes: Sequence[tuple[str, Box]]) -> None:
        self.pieces = {
            label(name, box): weights[name][tuple(slice(start, end) for start, end in box)] for name, box in boxes
        }
        super().__init__(self.pieces)
        self._boxes = boxes

    def described(self) -> tuple[str, str]:
        place, _ = super().described()
        parts = [(n, s.dtype, box, s.offset) for (n, box), s in zip(self._boxes, self.specs, strict=True)]
        return json.dumps({"ranks": [json.loads(place)]}), json.dumps(parts)


class Server:
    """A vLLM server, and calls of it by plain HTTP."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self.url = session, url

    async def post(self, path: str, body: Any = None) -> Any:
        async with self._session.post(path, json=body or {}) as response:
            assert response.status == 200, await response.text()
            return await response.json(content_type=None) if response.content_length else None

    async def get(self, path: str) -> Any:
        async with self._session.get(path) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    async def healthy(self) -> bool:
        try:
            async with self._session.get("/health") as response:
                return response.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def call(self, method: str, *args: str) -> Any:
        answer = await self.post("/collective_rpc", {"method": f"millrace_{method}", "args": args})
        [result] = answer["results"]
        return result

    async def done(self, method: str, *args: str) -> Any:
        result = await self.call(method, *args)
        assert "error" not in result, result
        return result

    async def refusal(self, method: str, *args: str) -> str:
        result = await self.call(method, *args)
        assert set(result) == {"error"}, result
        return str(result["error"])

    async def load(self, weights: Mapping[str, torch.Tensor]) -> str:
        """Loads one bucket, and changes its memory right after. Returns which tensors the server ignored."""
        bucket = SharedBucket(weights)
        result = await self.done("load", *bucket.described())
        bucket.take_back()
        ignored: str = result["ignored"]
        return ignored

    async def needs(self, weights: Mapping[str, torch.Tensor]) -> list[tuple[str, Box]]:
        """Returns the boxes of these tensors that the server's only rank needs."""
        found = (await self.done("needs", rows(weights)))["boxes"]
        return [(name, box) for name, boxes in zip(weights, found, strict=True) for box in map(read_box, boxes)]

    async def load_parts(self, weights: Mapping[str, torch.Tensor], boxes: Sequence[tuple[str, Box]]) -> None:
        """Loads one bucket of parts, and compares the server's samples of them."""
        bucket = BucketOfParts(weights, boxes)
        samples = (await self.done("load_parts", *bucket.described()))["samples"]
        assert samples == "".join(sampled_checksums([piece.contiguous() for piece in bucket.pieces.values()]))
        bucket.take_back()

    async def refused_load(self, weights: Mapping[str, torch.Tensor]) -> str:
        bucket = SharedBucket(weights)
        error = await self.refusal("load", *bucket.described())
        bucket.take_back()
        return error

    async def checksums(self) -> dict[str, str]:
        sums: dict[str, str] = (await self.done("checksums"))["checksums"]
        return sums

    async def outputs(self) -> list[tuple[list[int], list[float]]]:
        """Returns greedy tokens and their logprobs."""
        made = []
        for prompt in PROMPTS:
            sampling = {"max_tokens": 12, "temperature": 0.0, "logprobs": 1, "ignore_eos": True}
            answer = await self.post("/inference/v1/generate", {"token_ids": prompt, "sampling_params": sampling})
            [choice] = answer["choices"]
            made.append((choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]]))
        return made

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        await self.post("/pause?mode=abort&at_once=true")
        await self.post("/reset_prefix_cache")
        yield
        await self.post("/resume")


@asynccontextmanager
async def serving(folder: Path, python: Path, logs: Path, *, extension: bool = True) -> AsyncIterator[Server]:
    """Starts a server on the CPU, with Millrace's extension and middleware or without."""
    port = free_port("127.0.0.1")
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--enforce-eager", "--kv-cache-memory-bytes", str(2**26), "--enable-scale-out"]
    command += ["--distributed-executor-backend", "uni"]
    if extension:
        command += ["--worker-extension-cls", "millrace_vllm.Extension", "--middleware", "millrace_vllm_keys.Keys"]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXTENSION)}
    environment |= {"MILLRACE_API_KEY": "data", "MILLRACE_ADMIN_API_KEY": "admin"}
    url = f"http://127.0.0.1:{port}"
    process = await ServerProcess.start("vllm", command, logs / f"vllm-{port}.log", env=environment)
    try:
        timeout = aiohttp.ClientTimeout(60)
        # vLLM closes a connection after an error of its own, while the next request may already be on its way.
        connector = aiohttp.TCPConnector(force_close=True)
        headers = {"Authorization": "Bearer admin"}
        async with aiohttp.ClientSession(url, connector=connector, timeout=timeout, headers=headers) as session:
            server = Server(session, url)
            await process.until_healthy(server.healthy, deadline=START_DEADLINE)
            yield server
    finally:
        await process.end()
