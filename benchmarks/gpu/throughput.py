"""Compares tokens per second on a real server: through Millrace, by a bare aiohttp client to the same server, and by
SGLang in-process with all the data gathered on one caller.

    python -m benchmarks.gpu.throughput [--size 0.5b] [--requests 1024] [--tokens 512] [--repeats 3] [--forms]
        [--engine '{"kind": "vllm", "python": "...", "engine_args": {...}}']

Millrace and the bare client take turns on one server. --forms adds the other ways of asking a vLLM server. SGLang
in-process then has the GPU for itself. On a CPU, to try the script, leave it out (--skip-in-process).
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from benchmarks.gpu.engines import Form, engine_config, forms, served
from benchmarks.gpu.models import write_config, write_tokenizer
from millrace.config.engines import SGLangEngineConfig
from millrace.engines.spec import Launched
from millrace.engines.stock.engine import StockEngine
from millrace.engines.stock.interpreter import StockConfig, interpreter
from millrace.types import GenerateRequest, SamplingParams

PROMPT_TOKENS = 128
DEADLINE = 600.0
IN_PROCESS = Path(__file__).with_name("sglang_in_process.py")

Call = Callable[[GenerateRequest], Awaitable[int]]


def requests(count: int, tokens: int, vocab_size: int, label: str) -> list[GenerateRequest]:
    """Makes prompts that share no prefix."""
    draw = random.Random(label)
    sampling = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    return [
        GenerateRequest(
            tuple(draw.randrange(2, vocab_size) for _ in range(PROMPT_TOKENS)), sampling, request_id=f"{label}-{i}"
        )
        for i in range(count)
    ]


async def rate(call: Call, work: list[GenerateRequest], width: int) -> float:
    """Measures tokens per second with `width` requests at a time."""
    queue = iter(work)
    tokens = 0

    async def worker() -> None:
        nonlocal tokens
        for request in queue:
            made = await call(request)  # `tokens += await` would lose what other tasks add meanwhile
            tokens += made

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(width)))
    return tokens / (time.perf_counter() - started)


async def measure(
    launched: Launched, engine: StockEngine[Any], asked: Mapping[str, Form], arguments: argparse.Namespace
) -> None:
    vocab_size = (await engine.info()).vocab_size
    headers = {"Authorization": f"Bearer {launched.api_key}", "Content-Type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=DEADLINE)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers, timeout=timeout) as bare:

        async def by_millrace(request: GenerateRequest) -> int:
            return len((await engine.generate(request, deadline=DEADLINE)).output_ids)

        def by_aiohttp(form: Form) -> Call:
            async def call(request: GenerateRequest) -> int:
                async with bare.post(f"{launched.url}{form.path}", data=orjson.dumps(form.body(request))) as response:
                    response.raise_for_status()
                    answer = orjson.loads(await response.read())
                return len(answer["output_ids"] if "output_ids" in answer else answer["choices"][0]["token_ids"])

            return call

        ways: dict[str, Call] = {"millrace": by_millrace}
        for name, form in asked.items():
            try:
                await by_aiohttp(form)(requests(1, 8, vocab_size, name)[0])
                ways[name] = by_aiohttp(form)
            except aiohttp.ClientResponseError as error:  # vLLM 0.23 has no text to return beside token ids
                print(f"{name}: left out, the server answers {error.status}", flush=True)
        for width in arguments.in_flight:
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for repeat in range(arguments.repeats + 1):
                # They take turns, and the first one changes from round to round.
                for name in sorted(ways, reverse=bool(repeat % 2)):
                    work = requests(arguments.requests, arguments.tokens, vocab_size, f"{name}-{width}-{repeat}")
                    speed = await rate(ways[name], work, width)
                    if repeat:  # the first round warms up
                        rates[name].append(speed)
                        print(f"{width} in flight, {name}: {speed:,.0f} tok/s", flush=True)
            medians = {name: statistics.median(values) for name, values in rates.items()}
            print(
                f"{width} in flight, medians of {arguments.repeats}: "
                + ", ".join(f"{name} {value:,.0f} tok/s" for name, value in medians.items())
                + f"; millrace over bare {medians['millrace'] / medians['bare']:.3f} (aim: at least 0.98)",
                flush=True,
            )


async def in_process(config: StockConfig, folder: Path, arguments: argparse.Namespace) -> None:
    """Does the same work by sglang.Engine, in a process of the engine's own interpreter."""
    settings = {
        "model_path": str(folder),
        "device": config.device,
        "max_running_requests": config.max_running_requests,
        **config.engine_args,
    }
    work = {
        "requests": arguments.requests,
        "tokens": arguments.tokens,
        "prompt_tokens": PROMPT_TOKENS,
        "in_flight": arguments.in_flight,
        "repeats": arguments.repeats,
    }
    process = await asyncio.create_subprocess_exec(
        str(interpreter(config)),
        str(IN_PROCESS),
        json.dumps(settings),
        json.dumps(work),
        env={**os.environ, **config.env},
    )
    try:
        async with asyncio.timeout(DEADLINE):
            await process.wait()
    except TimeoutError:
        process.kill()
        raise


async def run(arguments: argparse.Namespace) -> None:
    config = engine_config(arguments.engine, tokenizer=arguments.forms)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(arguments.size, Path(scratch, "model"))
        if arguments.forms:
            write_tokenizer(folder)  # /v1/completions needs a tokenizer to make text
        started = time.perf_counter()
        asked = forms(config.kind) if arguments.forms else {"bare": forms(config.kind)["bare"]}
        async with served(config, folder, Path(scratch)) as (launched, engine):
            print(f"{arguments.size}: server up after {time.perf_counter() - started:.0f} s", flush=True)
            await measure(launched, engine, asked, arguments)
        if isinstance(config, SGLangEngineConfig) and not arguments.skip_in_process:
            await in_process(config, folder, arguments)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--forms", action="store_true")
    parser.add_argument("--skip-in-process", action="store_true")
    parser.add_argument("--engine", default="{}")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
