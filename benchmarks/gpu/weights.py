"""Measures weights and memory on a real server: a publish compared with its floor, sleep and wake.

    python -m benchmarks.gpu.weights [--size 1.5b] [--repeats 7] [--bucket-mb 512 2048 4096]
        [--transport cuda_ipc nccl] [--trainer-gpu 0 1] [--engine '{"kind": "vllm", "python": "...", ...}']

Trainer and server are on one GPU, and the tensors travel by CUDA IPC. On the CPU (--engine '{"device": "cpu"}') they
travel by shared memory. NCCL takes two GPUs: with --trainer-gpu 1, the server has the first. Several transports, with a
GPU for each, take turns on one server. SGLang loads in its own way with "engine_args": {"custom_weight_loader": null}.
With ucx, a sidecar is started
whose memory is on the server's GPU. That makes one more copy, within the GPU or, with --trainer-gpu, over NVLink. The
floor of a publish is two device-to-device copies of the model (into the bucket, out of it) at the bandwidth measured in
the same run. With two GPUs it is one copy from one to the other.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks.gpu.engines import engine_config, served
from benchmarks.gpu.models import random_tensors, write_config
from benchmarks.sidecar import sidecar
from millrace.config.models import TransportName
from millrace.engines.base import Engine
from millrace.types import GenerateRequest, MemoryTag, SamplingParams
from millrace.weights.publisher import Publish
from millrace.weights.report import PublishReport
from millrace.weights.source import source_of
from millrace.weights.transports.base import PublishTarget, TransportContext
from millrace.weights.transports.registry import create

MIB, GIB = 2**20, 2**30


def copy_bandwidth(device: torch.device, to: torch.device, nbytes: int) -> float:
    """Measures the bytes per second of a copy from the device's memory to another device or to another place on it.
    Each byte is read once and written once."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source, device=to)
    seconds = []
    for _ in range(20):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return nbytes / statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def used_gib(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / GIB


async def measure_publish(
    target: PublishTarget,
    tensors: list[tuple[str, torch.Tensor]],
    arguments: argparse.Namespace,
    name: TransportName,
    sidecars: Mapping[str, str],
) -> None:
    """Prints one line for each size of bucket. name: the transport. The version starts at 1 and grows by one with each
    publish."""
    nbytes, device = sum(tensor.nbytes for _, tensor in tensors), tensors[0][1].device
    across = device.type == "cuda" and device.index != 0
    bandwidth = copy_bandwidth(device, torch.device("cuda", 0) if across else device, min(nbytes, 2 * GIB))
    floor = (1 if across else 2) * nbytes / bandwidth
    print(
        f"{nbytes / 1e9:.2f} GB in {len(tensors)} tensors; a copy {'to the other GPU ' if across else ''}runs at "
        f"{bandwidth / 1e9:,.0f} GB/s; floor ({'one copy' if across else 'two copies'}) {floor * 1e3:.2f} ms",
        flush=True,
    )

    version = 0
    for mebibytes in arguments.bucket_mb:
        transport = create(name, TransportContext(capabilities=target.info.capabilities, sidecars=sidecars))
        reports: list[PublishReport] = []
        for _ in range(arguments.repeats + 2):
            version += 1
            publish = Publish(
                [target],
                source_of(tensors),
                version,
                transport,
                bucket_bytes=mebibytes * MIB,
                deadline=120,
            )
            report = await publish.run()
            assert not report.failed, report.failed
            reports.append(report)
        await transport.close()
        seconds, pause, begin, load, attest, commit, stage = (
            statistics.median(values)
            for values in zip(
                *(
                    (
                        r.seconds,
                        e.pause_seconds,
                        e.begin_seconds,
                        e.load_seconds,
                        e.attest_seconds,
                        e.commit_seconds,
                        r.stage_seconds,
                    )
                    for r in reports[2:]  # the first ones allocate the memory
                    for e in r.engines
                ),
                strict=True,
            )
        )
        print(
            f"buckets of {mebibytes} MiB, medians of {arguments.repeats}: publish {seconds * 1e3:.1f} ms, pause "
            f"{pause * 1e3:.1f} ms (begin {begin * 1e3:.1f}, load {load * 1e3:.1f}, attest {attest * 1e3:.1f}, commit "
            f"{commit * 1e3:.1f}; staging {stage * 1e3:.1f}); pause over floor {pause / floor:.1f}",
            flush=True,
        )


async def measure_sleep(engine: Engine, repeats: int, device: torch.device) -> None:
    kinds = [frozenset({MemoryTag.KV_CACHE}), frozenset({MemoryTag.WEIGHTS})]
    legs: dict[str, list[float]] = {}
    freed: list[float] = []
    for _ in range(repeats):
        awake = used_gib(device)
        for what in kinds:
            await timed(legs, f"sleep {min(what)}", engine.sleep(what))
        freed.append(awake - used_gib(device))
        for what in reversed(kinds):
            await timed(legs, f"wake {min(what)}", engine.wake(what))
    lines = ", ".join(f"{name} {statistics.median(values) * 1e3:.1f} ms" for name, values in legs.items())
    print(f"medians of {repeats}: {lines}; freed {statistics.median(freed):.2f} GiB", flush=True)


async def timed(legs: dict[str, list[float]], name: str, call: object) -> None:
    started = time.perf_counter()
    await call  # type: ignore[misc]
    legs.setdefault(name, []).append(time.perf_counter() - started)


async def run(arguments: argparse.Namespace) -> None:
    config = engine_config(arguments.engine)
    on_gpu = config.device == "cuda"
    transports = arguments.transport or ["cuda_ipc" if on_gpu else "shm"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(arguments.size, Path(scratch, "model"))
        async with served(config, folder, Path(scratch)) as (_, engine):
            target = PublishTarget(engine, await engine.info())
            # Sleep comes first, since it leaves no weights.
            await measure_sleep(engine, arguments.repeats, torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
            for name, gpu in zip(transports, arguments.trainer_gpu, strict=True):
                device = torch.device("cpu")
                if on_gpu:
                    device = torch.device("cuda", gpu)
                    torch.cuda.set_device(device)
                print(f"{name}, from {device}", flush=True)
                tensors = random_tensors(folder, device)
                with sidecar(config.device) if name == "ucx" else nullcontext("") as url:
                    await measure_publish(target, tensors, arguments, name, {engine.name: url})
                del tensors
            request = GenerateRequest((5, 6, 7), SamplingParams(8, ignore_eos=True), request_id="after")
            generation = await engine.generate(request, deadline=60)
            print(f"afterwards it generates, as version {generation.version_spans[-1].version}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="1.5b")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bucket-mb", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--transport", choices=["shm", "cuda_ipc", "gloo", "nccl", "ucx"], nargs="+")
    parser.add_argument("--trainer-gpu", type=int, nargs="+", default=[0])
    parser.add_argument("--engine", default="{}")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
