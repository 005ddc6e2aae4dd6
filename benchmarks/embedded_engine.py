"""Measures tokens per second of the embedded engine through HTTP. The floor is transformers' batched `generate` on the
same requests.

    OMP_NUM_THREADS=1 python benchmarks/embedded_engine.py

The floor runs `generate` in this process: one padded batch, no HTTP, no scheduling, no logprobs returned. The engine
runs in a process of its own and answers separate calls that arrive together. Both sample at temperature 1 with as many
threads. They take turns, and the median round of each counts.

A trainer sends prompts of mixed lengths. Prompts of one length are the best case of `generate`, which then needs no
padding and no attention mask.
"""

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCAB = 300
START_LIMIT = 120.0  # seconds


def make_model(folder: Path) -> None:
    """Makes a model like the demo's: 4 layers, 128 wide, 0.8 M parameters."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def generate_rate(model: Any, prompts: list[list[int]], tokens: int) -> float:
    """Returns the tokens per second of one batched `generate` whose prompts are padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    begun = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=0,
    )
    seconds = time.perf_counter() - begun
    assert output.shape == (len(prompts), ids.shape[1] + tokens)
    return len(prompts) * tokens / seconds


async def engine_rate(session: aiohttp.ClientSession, url: str, prompts: list[list[int]], tokens: int) -> float:
    """Returns the tokens per second of one call for each prompt, all sent at once."""
    params = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}

    async def call(prompt: list[int]) -> int:
        body = orjson.dumps({"input_ids": prompt, "sampling_params": params, "return_logprob": True})
        async with session.post(f"{url}/generate", data=body) as response:
            answer = orjson.loads(await response.read())
        assert len(answer["meta_info"]["output_token_logprobs"]) == tokens
        return len(answer["output_ids"])

    begun = time.perf_counter()
    total = sum(await asyncio.gather(*(call(prompt) for prompt in prompts)))
    return total / (time.perf_counter() - begun)


async def until_healthy(session: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(START_LIMIT):
        while True:
            try:
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.05)


async def measure(args: argparse.Namespace, folder: Path, url: str, shortest: int) -> tuple[float, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(0)
    floors, engines = [], []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await until_healthy(session, url)
        for _ in range(args.rounds + 1):  # the first round warms up both
            # Each round has new prompts, so that no cache has anything of an earlier round.
            lengths = [rng.randint(shortest, 2 * args.prompt_tokens - shortest) for _ in range(args.requests)]
            prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
            floors.append(generate_rate(model, prompts, args.tokens))
            engines.append(await engine_rate(session, url, prompts, args.tokens))
    return statistics.median(floors[1:]), statistics.median(engines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=24, help="on average")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        options = {
            "--model": folder,
            "--port": port,
            "--threads": args.threads,
            "--max-running-requests": args.requests,
        }
        command = [
            sys.executable,
            "-m",
            "millrace.engines.embedded",
            *(str(x) for pair in options.items() for x in pair),
        ]
        server = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})
        print(f"{args.requests} requests of {args.tokens} tokens, {args.threads} thread(s), {args.rounds} rounds")
        try:
            for kind, shortest in (("of mixed lengths", 1), ("of equal length", args.prompt_tokens)):
                floor, engine = asyncio.run(measure(args, Path(folder), f"http://127.0.0.1:{port}", shortest))
                print(f"prompts of {args.prompt_tokens} tokens on average, {kind}")
                print(f"  floor: transformers generate   {floor:8.0f} tok/s")
                print(f"  embedded engine through HTTP   {engine:8.0f} tok/s")
                print(f"  ratio engine / floor           {engine / floor:8.2f}   (to reach: 1.00)")
        finally:
            server.terminate()
            server.wait(timeout=10)


if __name__ == "__main__":
    main()
