"""Measures LoRA adapters on a real server: runs their conformance checks, times an adapter from its publish to its
first token, and measures how publishing adapters slows down generation.

    python -m benchmarks.gpu.lora [--size 0.5b] [--rank 16] [--repeats 7] [--requests 64]
        [--engine '{"kind": "vllm", "python": "..."}']

The model has random weights, which are written to disk first (TMPDIR needs room for two copies of it). It also runs on
the CPU (--size tiny --engine '{"device": "cpu", ...}').
"""

import argparse
import asyncio
import json
import re
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.gpu.engines import engine_config
from benchmarks.gpu.models import random_tensors, write_config
from millrace.conformance import CHECKS, Runner, Subject
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.types import Capability, GenerateRequest, LoraConfig, SamplingParams

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODULE = re.compile(rf"(.*\.(?:{'|'.join(MODULES)}))\.weight")
WATCHED_SECONDS = 10.0

Tensors = Mapping[str, torch.Tensor]


def write_model(size: str, folder: Path, seed: int) -> Tensors:
    torch.manual_seed(seed)
    tensors = dict(random_tensors(write_config(size, folder), torch.device("cpu")))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return tensors


def lora(model: Tensors, rank: int) -> list[tuple[str, torch.Tensor]]:
    tensors = []
    for name, weight in model.items():
        if found := MODULE.fullmatch(name):
            rows, columns = weight.shape
            key = f"base_model.model.{found[1]}"
            tensors.append((f"{key}.lora_A.weight", (torch.randn(rank, columns) / columns**0.5).bfloat16()))
            tensors.append((f"{key}.lora_B.weight", (torch.randn(rows, rank) * 0.1).bfloat16()))
    return tensors


def request(name: str, tokens: int) -> GenerateRequest:
    return GenerateRequest(
        tuple(range(5, 37)), SamplingParams(tokens, temperature=1.0, ignore_eos=True), request_id=name
    )


async def measure_alone(fleet: Fleet, model: Tensors, config: LoraConfig, repeats: int) -> None:
    rows = []
    for version in range(1, repeats + 3):
        tensors = lora(model, config.rank)
        started = time.perf_counter()
        report = await fleet.publish_lora(tensors, version, config=config)
        assert not report.failed, report.failed
        published = time.perf_counter() - started
        made = await fleet.generate(request(f"first-{version}", 1), deadline=60)
        assert [span.version for span in made.version_spans] == [version], made.version_spans
        first = time.perf_counter() - started
        rows.append((report.stage_seconds, report.engines[0].load_seconds, published, first))
    stage, load, published, first = (statistics.median(values) * 1e3 for values in zip(*rows[2:], strict=True))
    print(
        f"rank {config.rank}, {report.nbytes / 1e6:.2f} MB, medians of {repeats}: written in {stage:.1f} ms, loaded in "
        f"{load:.1f} ms, published in {published:.1f} ms, its first token after {first:.1f} ms",
        flush=True,
    )


async def measure_busy(
    fleet: Fleet, model: Tensors, config: LoraConfig, requests: int, version: int, *, publishing: bool
) -> int:
    """Measures tokens per second with so many requests at a time, with or without an adapter each second. Returns the
    last version."""
    made, ends = 0, time.perf_counter() + WATCHED_SECONDS

    async def ask(number: int) -> None:
        nonlocal made
        turn = 0
        while time.perf_counter() < ends:
            generation = await fleet.generate(request(f"busy-{number}-{turn}", 64), deadline=120)
            assert len(generation.version_spans) == 1, generation.version_spans
            made, turn = made + len(generation.output_ids), turn + 1

    async def publish() -> None:
        nonlocal version
        while publishing and time.perf_counter() < ends:
            version += 1
            report = await fleet.publish_lora(lora(model, config.rank), version, config=config)
            assert not report.failed, report.failed
            await asyncio.sleep(1.0)

    begun, first = time.perf_counter(), version
    await asyncio.gather(publish(), *(ask(number) for number in range(requests)))
    rate = made / (time.perf_counter() - begun)
    print(f"{requests} requests at a time, {version - first} adapters published: {rate:,.0f} tokens/s", flush=True)
    return version


async def run(arguments: argparse.Namespace) -> None:
    lora: dict[str, object] = {"enable_lora": True, "max_lora_rank": arguments.rank, "load_format": "auto"}
    settings = json.loads(arguments.engine)
    if settings.get("kind", "sglang") == "sglang":
        lora["lora_target_modules"] = list(MODULES)
    settings["engine_args"] = {**lora, **settings.get("engine_args", {})}
    config = LoraConfig(arguments.rank, 2.0 * arguments.rank, MODULES)
    with tempfile.TemporaryDirectory() as scratch:
        folder, other = Path(scratch, "model"), Path(scratch, "other")
        model = write_model(arguments.size, folder, 0)
        write_model(arguments.size, other, 1)
        engine_settings = engine_config(json.dumps(settings))
        async with open_fleet(engine_settings, folder, log_dir=Path(scratch, "logs")) as fleet:
            await measure_alone(fleet, model, config, arguments.repeats)
            version = arguments.repeats + 2
            for publishing in (False, True, False):
                version = await measure_busy(fleet, model, config, arguments.requests, version, publishing=publishing)
            await fleet.publish(list(model.items()), version + 1)  # this takes off the last adapter
            # The checks come last, since they update the engine without the fleet's knowledge.
            [engine] = fleet.engines.values()
            runner = Runner(Subject(engine, await engine.info(), folder, other))
            for check in CHECKS:
                if Capability.LORA in check.needs:
                    result = await runner.examine(check)
                    print(f"{result.check}: {result.outcome} {result.reason}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--engine", default="{}")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
