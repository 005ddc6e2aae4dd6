"""Measures the client: CPU seconds per generate call with 1,000 calls in flight. The floor is a bare aiohttp + orjson
loop.

    python benchmarks/client.py [--calls 5000] [--in-flight 1000] [--repeats 15]

Both talk to the same stub server in another process, which answers at once with 64 tokens and their logprobs. The two
take turns, so that both see the same machine.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import aiohttp
import orjson
from aiohttp import web

from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.engines.sglang_wire import encode_generate
from millrace.types import GenerateRequest, SamplingParams

TOKENS = 64
ANSWER = orjson.dumps(
    {
        "text": "",
        "output_ids": list(range(TOKENS)),
        "meta_info": {
            "id": "x",
            "finish_reason": {"type": "length", "length": TOKENS},
            "prompt_tokens": 128,
            "completion_tokens": TOKENS,
            "cached_tokens": 0,
            "weight_version": "1",
            "weight_versions": [{"version": "1", "start": 0, "end": TOKENS}],
            "output_token_logprobs": [[-1.2345678, i, None] for i in range(TOKENS)],
        },
    }
)


def serve(ready: Connection) -> None:
    async def generate(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=ANSWER, content_type="application/json")

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        ready.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


async def in_flight(call: Callable[[int], Awaitable[None]], calls: int, width: int) -> float:
    """Returns the CPU seconds of this process per call, with `width` calls at a time."""
    numbers = iter(range(calls))

    async def worker() -> None:
        for number in numbers:
            await call(number)

    started = time.process_time()
    await asyncio.gather(*(worker() for _ in range(width)))
    return (time.process_time() - started) / calls


async def measure(url: str, calls: int, width: int, repeats: int) -> None:
    sampling = SamplingParams(max_new_tokens=TOKENS)
    prompt = tuple(range(128))
    engine = EmbeddedEngine("stub", url, api_key="key")
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers={"Authorization": "Bearer key"})

    async def by_millrace(number: int) -> None:
        generation = await engine.generate(GenerateRequest(prompt, sampling, request_id=f"r{number}"), deadline=60)
        assert len(generation.output_ids) == TOKENS

    async def bare(number: int) -> None:
        body = orjson.dumps(encode_generate(GenerateRequest(prompt, sampling, request_id=f"r{number}")))
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{url}/generate", data=body, headers=headers) as response:
            answer = orjson.loads(await response.read())
        assert len(answer["output_ids"]) == TOKENS

    floors, ours = [], []
    for repeat in range(repeats + 1):
        floor = await in_flight(bare, calls, width)
        seconds = await in_flight(by_millrace, calls, width)
        if repeat:  # the first round opens the connections
            floors.append(floor)
            ours.append(seconds)
            print(f"bare {floor * 1e6:6.1f} us   millrace {seconds * 1e6:6.1f} us   ratio {seconds / floor:.3f}")
    print(f"{calls} calls, {width} in flight, {repeats} rounds; the ratio is to be 1.25 at most")
    for name, pick in (("medians", statistics.median), ("fastest", min)):
        floor, seconds = pick(floors), pick(ours)
        print(f"{name}: bare {floor * 1e6:.1f} us, millrace {seconds * 1e6:.1f} us, ratio {seconds / floor:.3f}")
    await engine.close()
    await session.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=5_000)
    parser.add_argument("--in-flight", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    receiving, sending = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(sending,), daemon=True)
    server.start()
    try:
        url = f"http://127.0.0.1:{receiving.recv()}"
        asyncio.run(measure(url, arguments.calls, arguments.in_flight, arguments.repeats))
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
