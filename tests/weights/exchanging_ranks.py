"""The script of each rank in test_exchange.py: `torchrun exchanging_ranks.py MODEL PYTHON OUT SETTINGS`. Two ranks
shard a model by FSDP2, and publish it to SGLangs with these settings."""

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from transformers import AutoModelForCausalLM

from millrace.config.engines import SGLangEngineConfig
from millrace.errors import PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.train.world import end_rank
from millrace.weights.report import PublishReport
from millrace.weights.sharded import ShardedTensors, follow, leading
from millrace.weights.shards import exchange
from millrace.weights.sidecar.handles import handle_of
from tests.conformance.run_checks import START_TIMEOUT
from tests.weights.variants import PROMPTS, greedy

BUCKET = 64 * 1024  # so that there are many
TOKENS = 12


def sharded_model(folder: Path) -> ShardedTensors:
    model = AutoModelForCausalLM.from_pretrained(folder)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return ShardedTensors(dict(model.named_parameters()))


def change(sharded: ShardedTensors, seed: int) -> None:
    """Trains the weights a little: each rank its shards."""
    make = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    with torch.no_grad():
        for tensor in sharded.tensors.values():
            shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            shard += 0.1 * torch.randn(shard.shape, generator=make)


def with_partial(sharded: ShardedTensors) -> ShardedTensors:
    """The same tensors, one of which is the sum of what the ranks have."""
    name, tensor = next((name, t) for name, t in sharded.tensors.items() if isinstance(t, DTensor))
    assert isinstance(tensor, DTensor)
    half = tensor.full_tensor().detach() / 2
    summed = DTensor.from_local(half, tensor.device_mesh, [Partial()], run_check=False)
    return ShardedTensors({**sharded.tensors, name: summed})


class Spoiling:
    """Changes a byte of each bucket that a rank has filled, before an engine reads it."""

    def __init__(self) -> None:
        self._real = handle_of
        self.armed = False

    def __call__(self, slot: Any, shares: int) -> Any:
        if self.armed:
            slot.bytes[0] ^= 1
        return self._real(slot, shares)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


async def lead(
    sharded: ShardedTensors, folder: Path, python: Path, out: Path, settings: str, together: Callable[[int], object]
) -> Any:
    """What rank 0 does, and what it found."""
    log = Lines()
    logging.getLogger("millrace.weights.shards").addHandler(log)
    logging.getLogger("millrace.weights.shards").setLevel(logging.INFO)
    config = SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        python=python,
        version="0.5.23",
        threads=1,
        start_timeout=START_TIMEOUT,
        **json.loads(settings),
    )
    found: dict[str, Any] = {"tokens": {}, "exchanged": {}, "nbytes": {}}
    async with open_fleet(config, folder, log_dir=out) as fleet:
        for version in (1, 2):
            together(version)
            whole = gathered(sharded)
            with leading(sharded, fleet.dtypes) as led:
                note(found, version, await fleet.publish(led, version, bucket_bytes=BUCKET))
            found["tokens"][version] = await tokens(fleet)
            torch.save(whole, out / f"{version}.pt")
        found["needs"] = next(iter(fleet.engines.values()))._needs  # type: ignore[attr-defined]
        together(3)
        with leading(sharded, fleet.dtypes) as led:
            try:
                await fleet.publish(led, 3, bucket_bytes=BUCKET)
            except PublishError as error:
                found["spoilt"] = str(error)
        together(4)
        torch.save(gathered(sharded), out / "4.pt")
        with leading(with_partial(sharded), fleet.dtypes) as led:
            note(found, 4, await fleet.publish(led, 4, bucket_bytes=BUCKET))
        found["tokens"][4] = await tokens(fleet)
    return found | {"log": log.lines}


def note(found: dict[str, Any], version: int, report: PublishReport) -> None:
    assert not report.failed, report.failed
    found["exchanged"][version], found["nbytes"][version] = report.exchanged, report.nbytes


async def tokens(fleet: Fleet) -> list[list[list[int]]]:
    """Those of each engine, for two prompts."""
    return [
        [list((await greedy(engine, prompt, "after", TOKENS)).output_ids) for prompt in PROMPTS[:2]]
        for engine in fleet.engines.values()
    ]


def gathered(sharded: ShardedTensors) -> Mapping[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in sharded}


def main() -> None:
    folder, python, out = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sharded = sharded_model(folder)
    spoiling = exchange.handle_of = Spoiling()  # type: ignore[attr-defined]

    def together(version: int) -> None:
        """What both ranks do before a version is published."""
        change(sharded, version)
        spoiling.armed = version == 3

    if dist.get_rank() == 0:
        found = asyncio.run(lead(sharded, folder, python, out, sys.argv[4], together))
        (out / "found.json").write_text(json.dumps(found))
    else:
        for version in (1, 2, 3, 4):
            together(version)
            if version != 3:
                gathered(sharded)
            follow(with_partial(sharded) if version == 4 else sharded)
    dist.destroy_process_group()
    end_rank()


if __name__ == "__main__":
    main()
