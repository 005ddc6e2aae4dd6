"""Runs an engine whose ranks are data-parallel and share the experts of a mixture: generate, sleep, publish, and the
conformance checks. Each prints its figures or its error, and the next one runs anyway.

    python -m benchmarks.gpu.spread [--size moe-15b] [--repeats 5] [--bucket-mb 2048 4096] [--seconds 540] --engine
        '{"kind": "sglang", "tp_size": 2, "dp_size": 2, "ep_size": 2, "engine_args": {"enable_dp_attention": true}}'
        '{"kind": "vllm", "dp_size": 2, "ep_size": 2}'

The trainer is on the first GPU, which it shares with the engine's first rank, and publishes by CUDA IPC. The floor is
two copies of the model on that GPU: into the bucket and out of it. The checks run on a second server, of a small
mixture whose weights are files (--only figures or --only checks leaves out the other). On the CPU, add
--size moe-tiny and "device": "cpu", "dtype": "float32"; vLLM then needs the plugin that `python -m tests.collectives
FOLDER` writes, as "env": {"PYTHONPATH": "FOLDER"}.
"""

import argparse
import asyncio
import faulthandler
import json
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.gpu.engines import engine_config, served
from benchmarks.gpu.models import random_tensors, write_config, write_tokenizer
from benchmarks.gpu.weights import MIB, copy_bandwidth, timed
from millrace.conformance import CHECKS, Outcome, Result, Runner, Subject
from millrace.engines.stock.interpreter import StockConfig
from millrace.types import EngineInfo, GenerateRequest, MemoryTag, SamplingParams
from millrace.weights.publisher import Publish
from millrace.weights.source import source_of
from millrace.weights.transports.base import PublishTarget, TransportContext
from millrace.weights.transports.registry import create

CHECKED = "moe-small"  # the size of the model that the checks run on
SHOWN, WIDTH = 15, 240  # lines of a log, and their length
ENDING = 30.0  # seconds that servers have to end after the time is up
LEGS = ("begin", "load", "attest", "commit")


def spread_config(settings: str, *, tokenizer: bool = False, load_format: str = "dummy") -> StockConfig:
    """Reads an engine's config from JSON. It takes less of each GPU than the engine would, which leaves room for the
    trainer."""
    given = json.loads(settings)
    arguments = dict(given.get("engine_args", {}))
    if arguments.pop("enable_expert_parallel", False):
        given["ep_size"] = given.get("tp_size", 1) * given.get("dp_size", 1)
    share = {"sglang": "mem_fraction_static", "vllm": "gpu_memory_utilization"}[given["kind"]]
    room = {} if given.get("device") == "cpu" else {share: 0.4}
    given = {"max_running_requests": 128, **room, **given, "engine_args": {"load_format": load_format, **arguments}}
    return engine_config(json.dumps(given), tokenizer=tokenizer)


class Steps:
    """Runs steps one after another, and keeps which of them failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    async def run(self, name: str, step: Awaitable[None], deadline: float) -> None:
        """Prints the error of a step that fails, with where it was raised."""
        print(f"--- {name}", flush=True)
        try:
            async with asyncio.timeout(deadline):
                await step
        except Exception:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            self.failed.append(name)


@asynccontextmanager
async def spread_server(config: StockConfig, folder: Path, logs: Path, steps: Steps) -> AsyncIterator[PublishTarget]:
    """Starts the server, and says how long that took and what it is. If a step fails meanwhile, the errors in the
    server's log are printed, and its end."""
    began, failed = time.perf_counter(), len(steps.failed)
    try:
        async with served(config, folder, logs) as (launched, engine):
            info: EngineInfo = await engine.info()
            info = replace(info, gpus=launched.gpus if len(launched.gpus) == info.ranks else ())
            print(
                f"{info.kind} {info.engine_version} started in {time.perf_counter() - began:.1f} s: {info.ranks} ranks "
                f"on GPUs {', '.join(info.gpus) or 'that are not known'}; {', '.join(sorted(info.capabilities))}",
                flush=True,
            )
            yield PublishTarget(engine, info)
            began = 0.0
    finally:
        if len(steps.failed) > failed or began:
            show_logs(logs)


def show_logs(folder: Path) -> None:
    """Prints the first errors in each log, and its end."""
    for log in folder.glob("*.log"):
        lines = [line[:WIDTH] for line in log.read_text(errors="replace").splitlines()]
        errors = [line for line in lines if re.search(r"[A-Za-z]Error\b", line)]
        print(f"--- {log}: errors", *errors[:SHOWN], "--- and its end", *lines[-SHOWN:], sep="\n", flush=True)


async def measure_generation(target: PublishTarget, count: int = 64, tokens: int = 128) -> None:
    sampling = SamplingParams(tokens, ignore_eos=True)
    asked = [GenerateRequest((5 + number, 6, 7, 8), sampling) for number in range(count)]
    for name in ("first", "second"):
        began = time.perf_counter()
        made = await asyncio.gather(*(target.engine.generate(one, deadline=240) for one in asked))
        seconds = time.perf_counter() - began
        assert all(len(one.output_ids) == tokens for one in made)
        rate = count * tokens / seconds
        print(f"{name} time: {count} x {tokens} tokens in {seconds:.2f} s, {rate:,.0f}/s", flush=True)


async def measure_sleep(target: PublishTarget, repeats: int) -> None:
    """Ends awake, without weights."""
    legs: dict[str, list[float]] = {}
    kinds = [frozenset({MemoryTag.KV_CACHE}), frozenset({MemoryTag.WEIGHTS})]
    freed: list[list[float]] = []
    for _ in range(repeats):
        awake = used_gib()
        for what in kinds:
            await timed(legs, f"sleep {min(what)}", target.engine.sleep(what))
        freed.append([before - now for before, now in zip(awake, used_gib(), strict=True)])
        for what in reversed(kinds):
            await timed(legs, f"wake {min(what)}", target.engine.wake(what))
    lines = ", ".join(f"{name} {median_ms(values)} ms" for name, values in legs.items())
    of_gpus = ", ".join(f"{statistics.median(values):.2f}" for values in zip(*freed, strict=True))
    print(f"medians of {repeats}: {lines}; freed {of_gpus or 0} GiB of each GPU", flush=True)


def used_gib() -> list[float]:
    """Returns what is used of each GPU."""
    pairs = (torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count()))
    return [(total - free) / 2**30 for free, total in pairs]


def median_ms(values: Iterable[float]) -> str:
    return f"{statistics.median(values) * 1e3:.1f}"


async def measure_publish(
    target: PublishTarget, tensors: list[tuple[str, torch.Tensor]], sizes: list[int], repeats: int
) -> None:
    """Prints one line for each size of bucket, and requires that the engine generates afterwards."""
    device = tensors[0][1].device
    nbytes = sum(tensor.nbytes for _, tensor in tensors)
    bandwidth = copy_bandwidth(device, device, min(nbytes, 2**31))
    floor = 2 * nbytes / bandwidth
    print(
        f"{nbytes / 1e9:.2f} GB in {len(tensors)} tensors; a copy runs at {bandwidth / 1e9:,.0f} GB/s; floor (two "
        f"copies) {floor * 1e3:.2f} ms",
        flush=True,
    )
    version = target.info.weight_version or 0
    for mebibytes in sizes:
        context = TransportContext(capabilities=target.info.capabilities)
        transport = create("cuda_ipc" if device.type == "cuda" else "shm", context)
        reports = []
        for _ in range(repeats + 2):  # the first two make plans and allocate memory
            version += 1
            source = source_of(tensors)
            publish = Publish([target], source, version, transport, bucket_bytes=mebibytes * MIB, deadline=120)
            reports.append(await publish.run())
            assert not reports[-1].failed, reports[-1].failed
        await transport.close()
        first, counted = reports[0], reports[2:]
        engines = [report.engines[0] for report in counted]
        legs = ", ".join(f"{leg} {median_ms(getattr(one, f'{leg}_seconds') for one in engines)}" for leg in LEGS)
        pause = statistics.median(one.pause_seconds for one in engines)
        print(
            f"buckets of {mebibytes} MiB, medians of {repeats}: publish {median_ms(r.seconds for r in counted)} ms, "
            f"pause {pause * 1e3:.1f} ms ({legs}; staging {median_ms(r.stage_seconds for r in counted)}); pause over "
            f"floor {pause / floor:.1f}; the first publish {first.seconds * 1e3:.0f} ms",
            flush=True,
        )
    request = GenerateRequest((5, 6, 7), SamplingParams(8, ignore_eos=True), request_id="after")
    generation = await target.engine.generate(request, deadline=60)
    assert [span.version for span in generation.version_spans] == [version]
    print(f"afterwards it generates, as version {version}", flush=True)


async def check(target: PublishTarget, folder: Path, other: Path) -> None:
    """Runs the conformance checks. Prints the failed ones and those that can't be run, and how many there were, also if
    the time is up."""
    runner, results = Runner(Subject(target.engine, target.info, folder, other)), list[Result]()
    try:
        async for result in runner.run(CHECKS):
            results.append(result)
            if result.outcome is not Outcome.PASSED:
                print(f"{result.outcome} {result.check} ({result.seconds:.1f} s): {result.reason}", flush=True)
    finally:
        counts = ", ".join(f"{sum(one.outcome is outcome for one in results)} {outcome}" for outcome in Outcome)
        seconds = sum(one.seconds for one in results)
        print(f"conformance: {len(results)} of {len(CHECKS)} checks, {counts}, in {seconds:.1f} s", flush=True)
    assert not runner.lost, runner.lost
    assert not any(one.outcome is Outcome.FAILED for one in results)


def write_weights(folder: Path, seed: int) -> Path:
    """Writes a small mixture of experts with weights so large that they matter, and a tokenizer."""
    write_config(CHECKED, folder)
    write_tokenizer(folder)
    torch.manual_seed(seed)
    tensors = {}
    for name, tensor in random_tensors(folder, torch.device("cpu")):
        scale = 0.02 if "embed" in name else tensor.shape[-1] ** -0.5
        tensors[name] = (tensor / 0.02 * scale if tensor.ndim > 1 else torch.ones_like(tensor)).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


async def figures(arguments: argparse.Namespace, steps: Steps, scratch: Path) -> None:
    """Generates, sleeps and publishes with random weights."""
    config = spread_config(arguments.engine)
    device = torch.device("cpu" if config.device == "cpu" else "cuda:0")
    folder = write_config(arguments.size, scratch / "model")
    async with spread_server(config, folder, arguments.logs or scratch, steps) as target:
        await steps.run("generate", measure_generation(target), 480)
        await steps.run("sleep", measure_sleep(target, arguments.repeats), 240)
        tensors = random_tensors(folder, device)
        publish = measure_publish(target, tensors, arguments.bucket_mb, arguments.repeats)
        await steps.run("publish", publish, 480)
        await steps.run("generate again", measure_generation(target), 480)


async def checks(arguments: argparse.Namespace, steps: Steps, scratch: Path) -> None:
    """Runs the conformance checks on a small model."""
    config = spread_config(arguments.engine, tokenizer=True, load_format="auto")
    folder, other = (write_weights(scratch / name, seed) for seed, name in enumerate(("own", "other")))
    async with spread_server(config, folder, arguments.logs or scratch, steps) as target:
        await steps.run("check", check(target, folder, other), 900)


async def run(arguments: argparse.Namespace) -> int:
    steps = Steps()
    with tempfile.TemporaryDirectory() as made:
        for name, part in (("figures", figures), ("checks", checks)):
            if arguments.only in (None, name):
                await steps.run(name, part(arguments, steps, Path(made, name)), arguments.seconds)
    print(f"failed: {', '.join(steps.failed) or 'nothing'}", flush=True)
    return 1 if steps.failed else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="moe-15b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mb", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--seconds", type=float, default=540, help="for the figures, and again for the checks")
    parser.add_argument("--logs", type=Path, help="folder of the servers' logs; by default they are removed")
    parser.add_argument("--only", choices=["figures", "checks"])
    parser.add_argument("--engine", required=True)
    arguments = parser.parse_args()
    # If a call that can't be cancelled hangs, this ends the process, and with it the servers.
    parts = 2 if arguments.only is None else 1
    faulthandler.dump_traceback_later(parts * arguments.seconds + ENDING, exit=True)
    sys.exit(asyncio.run(run(arguments)))


if __name__ == "__main__":
    main()
