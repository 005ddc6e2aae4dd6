"""Measures the agent gateway: what it adds to each call of 1,000 episodes at once, in time and in CPU.

    python -m benchmarks.gateway [--episodes 1000] [--turns 6] [--seconds 4] [--stream]

The gateway is one process, and its agents are another one. Its fleet is scripted: it answers in `--seconds` with a
tool call. The floor is a bare aiohttp server that reads the same bodies and answers in the same time with equal JSON.
Each agent has tools, a system prompt and a conversation that grows, and it begins at a time of its own.
"""

import argparse
import asyncio
import gc
import multiprocessing
import random
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import aiohttp
import numpy as np
import orjson
from aiohttp import web
from tests.rollout.test_templates import tokenizer_of

from millrace.gateway import serve_gateway
from millrace.gateway.format import TemplateFormat, learn_format
from millrace.types import FinishReason, GenerateRequest, Generation, VersionSpan

KEY = "the gateway's key"
TURN = (
    "<think>\nI look at the file first.\n</think>\n\nLet me see.\n<tool_call>\n"
    '{"name": "read", "arguments": {"path": "src/main.py", "lines": [1, 200]}}\n</tool_call>'
)
WORDS = [
    "the",
    "server",
    "reads",
    "one",
    "line",
    "of",
    "each",
    "file",
    "and",
    "writes",
    "what",
    "changed",
    "since",
    "the",
    "last",
    "time",
    "it",
    "was",
    "asked",
]
PARTS = 16  # items of a stream


def tools() -> list[dict[str, object]]:
    """Ten tools, as coding agents have them."""
    properties = {f"argument_{i}": {"type": "string", "description": text(20, i)} for i in range(4)}
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": text(60, i),
                "parameters": {"type": "object", "properties": properties, "required": ["argument_0"]},
            },
        }
        for i, name in enumerate(["read", "write", "edit", "list", "find", "grep", "run", "fetch", "plan", "ask"])
    ]


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@dataclass
class Scripted:
    """A fleet that answers with the same tokens after the same time."""

    output: tuple[int, ...]
    seconds: float
    context_length: int = 1_000_000

    async def generate(self, request: GenerateRequest, **_: object) -> Generation:
        await asyncio.sleep(self.seconds)
        return self._made(request, len(self.output), FinishReason.STOP)

    async def stream(self, request: GenerateRequest, **_: object) -> AsyncGenerator[Generation, None]:
        for part in range(1, PARTS):
            await asyncio.sleep(self.seconds / PARTS)
            yield self._made(request, len(self.output) * part // PARTS, FinishReason.ABORT)
        await asyncio.sleep(self.seconds / PARTS)
        yield self._made(request, len(self.output), FinishReason.STOP)

    def _made(self, request: GenerateRequest, length: int, finish: FinishReason) -> Generation:
        logprobs = np.full(length, -0.5, np.float32)
        spans = (VersionSpan(1, 0, length),)
        return Generation(request.request_id, self.output[:length], logprobs, finish, spans, len(request.input_ids), 0)


def format_of_qwen() -> TemplateFormat:
    return learn_format(tokenizer_of("qwen3"), "qwen3")


async def gateway(pipe: Connection, seconds: float) -> None:
    """Serves the gateway, and answers each message with the CPU seconds so far."""
    turns = format_of_qwen()
    ids = (*turns.chat.tokenizer.encode(TURN, add_special_tokens=False), turns.stop_token_ids[0])
    async with serve_gateway(Scripted(ids, seconds), turns, key=KEY) as served:  # type: ignore[arg-type]
        await answering(pipe, served.url)


async def floor(pipe: Connection, seconds: float) -> None:
    """Serves what an engine's chat route costs without an engine."""
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "read", "arguments": '{"path":"src/main.py","lines":[1,200]}'},
    }
    message = {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning": "I look at the file first.",
        "tool_calls": [call],
    }

    async def answer(http: web.Request) -> web.StreamResponse:
        body = orjson.loads(await http.read())
        if not body.get("stream"):
            await asyncio.sleep(seconds)
            made = {
                "id": "x",
                "object": "chat.completion",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            }
            return web.Response(body=orjson.dumps(made), content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        for part in range(PARTS):
            await asyncio.sleep(seconds / PARTS)
            delta = {"content": "Let "} if part + 1 < PARTS else {"tool_calls": [{"index": 0, **call}]}
            chunk = {"id": "x", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}
            await response.write(b"data: " + orjson.dumps(chunk) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application(client_max_size=2**26)
    app.add_routes([web.post("/{path:.*}", answer)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    await answering(pipe, f"http://127.0.0.1:{runner.addresses[0][1]}")


async def answering(pipe: Connection, url: str) -> None:
    gc.collect()
    gc.freeze()  # what was imported, as `millrace serve` does
    pipe.send(url)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, pipe.recv):
        pipe.send(time.process_time())


def process(serve: Callable[[Connection, float], Coroutine[Any, Any, None]], pipe: Connection, seconds: float) -> None:
    asyncio.run(serve(pipe, seconds))


@dataclass
class Load:
    """The agents' side. latencies: seconds of each call beyond the engine's."""

    http: aiohttp.ClientSession
    seconds: float
    stream: bool
    latencies: list[float] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)

    async def agent(self, url: str, turns: int, number: int, start: float) -> None:
        """One agent: each turn is a tool call, and its answer has some hundred tokens."""
        await asyncio.sleep(start)
        messages: list[dict[str, object]] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"Task {number}: {text(100, number)}"},
        ]
        for turn in range(turns):
            body = orjson.dumps({"model": "m", "messages": messages, "tools": TOOLS, "stream": self.stream})
            started = time.monotonic()
            async with self.http.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                data = await response.read()
            self.latencies.append(time.monotonic() - started - self.seconds)
            assert response.status == 200, data
            message = streamed(data) if self.stream else orjson.loads(data)["choices"][0]["message"]
            [call] = message["tool_calls"]
            answer = {"role": "tool", "tool_call_id": call["id"], "content": text(200, number + turn)}
            messages += [message, answer]


def streamed(data: bytes) -> dict[str, Any]:
    """The message of a stream."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning": "", "tool_calls": []}
    for line in data.split(b"\n\n"):
        if line.startswith(b"data: {"):
            delta = orjson.loads(line[6:])["choices"][0]["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning"] += delta.get("reasoning") or ""
            message["tool_calls"] += delta.get("tool_calls") or []
    return message


SYSTEM, TOOLS = text(1000, 7), tools()


async def opened(http: aiohttp.ClientSession, url: str, episodes: int) -> list[str]:
    """The chat routes of that many new episodes."""
    urls = []
    for _ in range(episodes):
        async with http.post(f"{url}/episodes", headers={"Authorization": f"Bearer {KEY}"}) as response:
            urls.append((await response.json())["base_url"] + "/v1/chat/completions")
    return urls


async def measure(name: str, pipe: Connection, options: argparse.Namespace) -> tuple[float, float, float, float]:
    """Median and 99th percentile of the latency, and CPU seconds per call of server and client."""
    url = await asyncio.to_thread(pipe.recv)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as http:
        urls = (
            await opened(http, url, options.episodes)
            if name == "gateway"
            else [f"{url}/v1/chat/completions"] * options.episodes
        )
        load = Load(http, options.seconds, options.stream)
        pipe.send(True)
        server, client = await asyncio.to_thread(pipe.recv), time.process_time()
        starts = [options.seconds * number / options.episodes for number in range(options.episodes)]
        await asyncio.gather(*(load.agent(one, options.turns, i, starts[i]) for i, one in enumerate(urls)))
        calls = options.episodes * options.turns
        client = (time.process_time() - client) / calls
        pipe.send(True)
        server = (await asyncio.to_thread(pipe.recv) - server) / calls
    pipe.send(False)
    ordered = sorted(load.latencies)
    return statistics.median(ordered), ordered[int(len(ordered) * 0.99)], server, client


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--stream", action="store_true")
    options = parser.parse_args()
    found = {}
    for name, serve in (("floor", floor), ("gateway", gateway)):
        here, there = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=process, args=(serve, there, options.seconds), daemon=True
        )
        server.start()
        try:
            found[name] = asyncio.run(measure(name, here, options))
        finally:
            server.terminate()
            server.join()
        median, most, cpu, client = (1000 * value for value in found[name])
        print(
            f"{name:8} latency beyond the engine's: median {median:.2f} ms, p99 {most:.2f} ms; "
            f"CPU per call: server {cpu:.3f} ms, agents {client:.3f} ms"
        )
    (median, most, cpu, client), (ours, our_most, our_cpu, _) = found["floor"], found["gateway"]
    print(
        f"added: median {1000 * (ours - median):.2f} ms, p99 {1000 * (our_most - most):.2f} ms, "
        f"CPU {1000 * (our_cpu - cpu):.3f} ms"
    )
    print(
        f"CPU of the gateway to that of the bare server {our_cpu / cpu:.2f}, "
        f"to that of the agents' client {our_cpu / client:.2f}"
    )


if __name__ == "__main__":
    main()
