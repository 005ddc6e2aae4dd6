"""Measures a publish of a sharded trainer without a gather and with one.

    python -m benchmarks.gpu.shards [--size moe-15b] [--ranks 2] [--repeats 5] [--bucket-mb 1024]
        [--engine '{"kind": "vllm", "python": "...", "version": "0.23.0"}']
    python -m benchmarks.gpu.shards --transport nccl --ranks 1 --engine-ranks 1    # on two GPUs

It starts itself under torchrun, with one rank on each GPU. The ranks shard the model by FSDP2 in bfloat16, as
transformers has it (experts fused). Rank 0 starts one engine over the same GPUs: an SGLang (the default) with
Millrace's weight loader, or a vLLM with Millrace's extension. The two ways take turns: in the first, each rank of the
engine gets the parts that it needs from the rank beside it; in the second, rank 0 gathers each tensor and copies it to
all GPUs. After each, the engine must have the same checksums of its own tensors. Without GPUs: --engine '{"device":
"cpu", ...}'.

With `--transport nccl` the engine has the GPUs behind those of the trainer's ranks. In the first way, each
rank of the trainer sends each rank of the engine what it needs; in the second, rank 0 gathers and broadcasts. The two
ways do not take turns then, because an engine is in the process group of one way at a time. Without GPUs: `gloo`.
On one GPU, `--ranks 1 --engine-ranks 1` makes them two hosts to NCCL, which then sends by a socket: this shows that it
works, and not how fast it is.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.engines import engine_config, served
from benchmarks.gpu.models import write_config
from millrace.config.engines import SGLangEngineConfig, VLLMEngineConfig
from millrace.engines.sglang.loading import LOADER
from millrace.engines.stock.interpreter import StockConfig
from millrace.fleet.local import CUMEM
from millrace.train.world import World, end_rank, join_world
from millrace.types import GenerateRequest, SamplingParams
from millrace.weights.cast import Dtypes, cast
from millrace.weights.publisher import Publish
from millrace.weights.report import PublishReport
from millrace.weights.sharded import LedTensors, ShardedTensors, follow, leading
from millrace.weights.shards import way_for
from millrace.weights.source import WeightSource, source_of
from millrace.weights.trained import Trained, read_trained
from millrace.weights.transports.base import PublishTarget, Transport, TransportContext
from millrace.weights.transports.registry import create

MIB, GB = 2**20, 1e9
DEADLINE = 300.0
ENGINE: Callable[[PublishReport], object] = lambda report: report.engines[0]  # noqa: E731
BESIDE = "shm", "cuda_ipc"
WARM = 2  # publishes of each way that are not counted: the first one makes plans and allocates


def sharded_model(folder: Path, world: World) -> ShardedTensors:
    """Makes the model with random weights, of which each rank allocates only its shards."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=world.device)
    torch.manual_seed(world.rank)
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        parameter.to_local().data.normal_(std=0.02)
    return ShardedTensors(dict(model.named_parameters()))


class Memory:
    """The memory that each rank's torch has beside its shards at most, in a publish. Collective."""

    def __init__(self, world: World) -> None:
        self._world, self._before = world, 0

    def begin(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def end(self) -> list[float]:
        """Returns the bytes of each rank."""
        peak = torch.cuda.max_memory_allocated() - self._before if self._world.device.type == "cuda" else 0
        peaks = torch.zeros(self._world.size, dtype=torch.float64, device=self._world.device)
        peaks[self._world.rank] = peak
        found: list[float] = self._world.sum(peaks).tolist()
        return found


async def publish(
    target: PublishTarget, source: WeightSource, version: int, transport: Transport, bucket_bytes: int, *, whole: bool
) -> PublishReport:
    """Publishes as a fleet does. whole: gather the tensors although they could be exchanged."""
    began = time.monotonic()
    source = replace(source, led=None) if whole else source
    async with way_for(source, [target], transport, bucket_bytes=bucket_bytes, deadline=DEADLINE) as way:
        run = Publish([target], source, version, way, bucket_bytes=bucket_bytes, deadline=DEADLINE)
        report = await run.run()
    assert not report.failed, report.failed
    assert (report.exchanged is None) == whole, "the weights were gathered; see the log"
    return replace(report, seconds=time.monotonic() - began)


def converted(led: LedTensors, trained: Trained) -> WeightSource:
    return cast(trained.tensors(source_of(led)), Dtypes("bfloat16", {}))


def show(way: str, reports: Sequence[PublishReport], peaks: Sequence[Sequence[float]], crossed: float) -> None:
    def median(of: Callable[[PublishReport], object], field: str) -> str:
        return f"{statistics.median(getattr(of(report), f'{field}_seconds') for report in reports) * 1e3:.1f}"

    legs = ", ".join(f"{leg} {median(ENGINE, leg)}" for leg in ("begin", "load", "attest", "commit"))
    seconds = statistics.median(report.seconds for report in reports) * 1e3
    most = ", ".join(f"{max(of_rank) / GB:.2f}" for of_rank in zip(*peaks, strict=True))
    print(
        f"{way}, medians of {len(reports)}: publish {seconds:.1f} ms, pause {median(ENGINE, 'pause')} ms ({legs}; "
        f"staging {median(lambda report: report, 'stage')}); between GPUs {crossed / GB:.3f} GB; the most memory of "
        f"each rank besides its shards {most} GB",
        flush=True,
    )


def apart(config: StockConfig, first: int, ranks: int) -> StockConfig:
    """Returns the settings of one engine on the GPUs from `first` on."""
    on_cpu = config.device == "cpu"
    place = {"tp_size": ranks, "dtype": "bfloat16", "base_gpu_id": 0 if on_cpu else first}
    if isinstance(config, SGLangEngineConfig):
        place["engine_args"] = {**config.engine_args, "custom_weight_loader": [LOADER]}
    # SGLang's NCCL must allocate memory as that of this process does.
    environment = threads_of(config, ranks) if on_cpu else {CUMEM: "-2"}
    if not on_cpu and torch.cuda.device_count() == 1:
        place["base_gpu_id"], environment["NCCL_HOSTID"], os.environ["NCCL_HOSTID"] = 0, "engine", "trainer"
    return config.model_copy(update={**place, "env": {**environment, **config.env}})


def threads_of(config: StockConfig, ranks: int) -> dict[str, str]:
    """Returns the variables by which an engine on the CPU has several ranks."""
    if isinstance(config, SGLangEngineConfig):
        return {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def over_all_ranks(config: StockConfig, ranks: int) -> StockConfig:
    """Returns the settings of one engine with a rank beside each rank of the trainer. On GPUs it leaves the trainer
    more than half of the memory."""
    shared = {"tp_size": ranks, "dtype": "bfloat16"}
    on_cpu = config.device == "cpu"
    if isinstance(config, SGLangEngineConfig):
        own = {
            "engine_args": {**config.engine_args, "custom_weight_loader": [LOADER]},
            "mem_fraction_static": None if on_cpu else config.mem_fraction_static or 0.4,
        }
    else:
        assert isinstance(config, VLLMEngineConfig)
        own = {"gpu_memory_utilization": None if on_cpu else config.gpu_memory_utilization or 0.4}
    return config.model_copy(
        update={**shared, **own, "env": {**config.env, **(threads_of(config, ranks) if on_cpu else {})}}
    )


async def lead(sharded: ShardedTensors, world: World, folder: Path, arguments: argparse.Namespace) -> None:
    """Runs on rank 0."""
    config, beside = engine_config(arguments.engine), arguments.transport in BESIDE
    config = over_all_ranks(config, world.size) if beside else apart(config, world.size, arguments.engine_ranks)
    trained, memory, nbytes = read_trained(folder), Memory(world), 0
    reports: dict[bool, list[PublishReport]] = {False: [], True: []}
    peaks: dict[bool, list[list[float]]] = {False: [], True: []}
    held: list[Mapping[str, str]] = []
    async with served(config, folder, folder.parent) as (launched, engine):
        info = replace(await engine.info(), gpus=launched.gpus)
        target = PublishTarget(engine, info)
        each = arguments.repeats + WARM
        ways = [False, True] * each if beside else [False] * each + [True] * each
        transport = None
        for turn, whole in enumerate(ways):
            context = TransportContext(capabilities=info.capabilities, here=True)
            transport = transport or create(arguments.transport, context)
            memory.begin()
            with leading(sharded) as led:
                source = converted(led, trained)
                bucket_bytes = arguments.bucket_mb * MIB
                report = await publish(target, source, turn + 1, transport, bucket_bytes, whole=whole)
                if ways[turn : turn + 2] != [whole, whole]:  # otherwise its groups are kept for the next publish
                    await transport.close()
                    transport = None
            of_ranks, nbytes = memory.end(), report.nbytes
            if ways[:turn].count(whole) < WARM:
                held.append(await engine.checksums())
                continue
            reports[whole].append(report)
            peaks[whole].append(of_ranks)
        differing = sorted({name for sums in held for name, value in sums.items() if held[0].get(name) != value})
        assert not differing, f"the two ways gave the engine different weights: {differing[:8]} of {len(held[0])}"
        request = GenerateRequest((5, 6, 7), SamplingParams(8, ignore_eos=True), request_id="after")
        generation = await engine.generate(request, deadline=60)
    print(f"{nbytes / GB:.2f} GB in {len(sharded.tensors)} tensors, buckets of {arguments.bucket_mb} MiB", flush=True)
    exchanged = reports[False][-1].exchanged
    assert exchanged is not None
    show("exchanged" if beside else "sent", reports[False], peaks[False], exchanged)
    # All ranks gather all tensors, and rank 0 copies its buckets to the engine's other GPUs.
    copies = world.size - 1 if beside else arguments.engine_ranks
    show("gathered", reports[True], peaks[True], (world.size - 1 + copies) * nbytes)
    print(f"afterwards it generates, as version {generation.version_spans[-1].version}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="moe-15b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mb", type=int, default=1024)
    parser.add_argument("--engine", default="{}")
    parser.add_argument("--transport", choices=(*BESIDE, "nccl", "gloo"), help="default: beside the trainer's ranks")
    parser.add_argument("--engine-ranks", type=int, default=2, help="of an engine apart")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
        os.execv(sys.executable, [sys.executable, *torchrun, "-m", "benchmarks.gpu.shards", *sys.argv[1:]])
    device = engine_config(arguments.engine).device
    arguments.transport = arguments.transport or BESIDE[device == "cuda"]
    with join_world(device) as world, tempfile.TemporaryDirectory() as scratch:
        folder = write_config(arguments.size, Path(scratch, "model"))
        sharded = sharded_model(folder, world)
        if world.rank == 0:
            asyncio.run(lead(sharded, world, folder, arguments))
        else:
            memory = Memory(world)
            for _ in range(2 * (arguments.repeats + WARM)):
                memory.begin()
                follow(sharded)
                memory.end()
        dist.barrier()
    end_rank()


if __name__ == "__main__":
    main()
