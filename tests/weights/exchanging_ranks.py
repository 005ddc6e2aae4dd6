"""The script of each rank in test_exchange.py: `exchanging_ranks.py MODEL OUT TRANSPORT SETTINGS`.

Two ranks shard a model by FSDP2, and publish it to engines with these settings. Versions 1, 2 and 5 are exchanged, or
sent to the engines' ranks with a transport for engines that are apart. While 3 is, a byte of each bucket changes before
an engine reads it. 4 is gathered, and has the weights of 5. While 6 is exchanged, rank 1 dies as it fills its second
bucket. 7 are the whole tensors of 4, and rank 0 publishes them alone.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from transformers import AutoModelForCausalLM

from millrace.config.engines import EngineConfig
from millrace.config.models import TransportName
from millrace.engines.sglang.adapter import SGLangEngine
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.errors import PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.train.world import end_rank
from millrace.weights.report import PublishReport
from millrace.weights.sharded import ShardedTensors, follow, leading
from millrace.weights.shards import exchange
from millrace.weights.shards.members import MEMBERS, Member
from millrace.weights.sidecar.handles import handle_of
from tests.conformance.run_checks import START_TIMEOUT
from tests.weights.variants import PROMPTS, greedy

BUCKET = 64 * 1024  # so that there are many
TOKENS = 12


def sharded_model(folder: Path, device: str = "cpu") -> ShardedTensors:
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
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
            shard += 0.1 * torch.randn(shard.shape, generator=make).to(shard.device)


def with_partial(sharded: ShardedTensors) -> ShardedTensors:
    """The same tensors, one of which is the sum of what the ranks have."""
    name, tensor = next((name, t) for name, t in sharded.tensors.items() if isinstance(t, DTensor))
    assert isinstance(tensor, DTensor)
    half = tensor.full_tensor().detach() / 2
    summed = DTensor.from_local(half, tensor.device_mesh, [Partial()], run_check=False)
    return ShardedTensors({**sharded.tensors, name: summed})


class Faults:
    """What happens to each bucket that a rank has filled, before an engine reads it or it is sent."""

    def __init__(self) -> None:
        self._handle_of, self._begin = handle_of, Member.begin
        self._version = self._filled = 0

    def begin(self, version: int) -> None:
        self._version, self._filled = version, 0

    def handle_of(self, slot: Any, shares: int) -> Any:
        self._happen(slot.bytes)
        return self._handle_of(slot, shares)

    def send(self, member: Member, memory: Tensor, sizes: Sequence[int]) -> Any:
        self._happen(memory, in_round=len(MEMBERS))
        return self._begin(member, memory, sizes)

    def _happen(self, memory: Tensor, in_round: int = 1) -> None:
        """in_round: how many buckets there are in one."""
        self._filled += 1
        if self._version == 3:
            memory[:1] ^= 1
        if self._version == 6 and dist.get_rank() == 1 and self._filled == 2 * in_round:
            os.kill(os.getpid(), signal.SIGKILL)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


async def lead(
    sharded: ShardedTensors,
    folder: Path,
    out: Path,
    transport: TransportName,
    settings: str,
    together: Callable[[int], object],
) -> Any:
    """What rank 0 does, and what it found."""
    log = Lines()
    logging.getLogger("millrace.weights.shards").addHandler(log)
    logging.getLogger("millrace.weights.shards").setLevel(logging.INFO)
    given = {"device": "cpu", "threads": 1, "start_timeout": START_TIMEOUT, **json.loads(settings)}
    config: EngineConfig = TypeAdapter(EngineConfig).validate_python(given)
    found: dict[str, Any] = {"tokens": {}, "exchanged": {}, "nbytes": {}, "held": {}, "groups": {}}
    async with open_fleet(config, folder, transport=transport, log_dir=out) as fleet:
        for version in (1, 2):
            together(version)
            whole = gathered(sharded)
            with leading(sharded, fleet.dtypes) as led:
                note(found, version, await fleet.publish(led, version, bucket_bytes=BUCKET))
            found["tokens"][version], found["groups"][version] = await tokens(fleet), groups(fleet)
            torch.save(whole, out / f"{version}.pt")
        engine = next(iter(fleet.engines.values()))
        assert isinstance(engine, SGLangEngine | VLLMEngine)
        needs = (engine._weight_loader if isinstance(engine, SGLangEngine) else engine._extension)._needs
        assert needs is not None
        found["needs"] = needs[:2]
        together(3)
        found["spoilt"] = await refused(sharded, fleet, 3)
        together(4)
        whole = gathered(sharded)
        torch.save(whole, out / "4.pt")
        with leading(with_partial(sharded), fleet.dtypes) as led:
            note(found, 4, await fleet.publish(led, 4, bucket_bytes=BUCKET))
        found["tokens"][4], found["held"][4] = await tokens(fleet), await held(fleet)
        with leading(sharded, fleet.dtypes) as led:
            note(found, 5, await fleet.publish(led, 5, bucket_bytes=BUCKET))
        found["held"][5], found["groups"][5] = await held(fleet), groups(fleet)
        together(6)
        found["died"] = await refused(sharded, fleet, 6)
        found["routable"] = sorted(fleet.snapshot.routable)
        await fleet.publish(list(whole.items()), 7)
        found["held"][7], found["routable again"] = await held(fleet), sorted(fleet.snapshot.routable)
    return found | {"log": log.lines}


async def refused(sharded: ShardedTensors, fleet: Fleet, version: int) -> str:
    """Publishes a version that no engine takes, and returns why."""
    try:
        with leading(sharded, fleet.dtypes) as led:
            await fleet.publish(led, version, bucket_bytes=BUCKET)
    except PublishError as error:
        return str(error)
    raise AssertionError(f"version {version} was published")


async def held(fleet: Fleet) -> list[Mapping[str, str]]:
    """The checksums of what each engine holds."""
    return [await engine.checksums() for engine in fleet.engines.values()]


def groups(fleet: Fleet) -> list[list[str]]:
    """The process groups of each engine."""
    return [list(getattr(engine, "_groups", ())) for engine in fleet.engines.values()]


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
    folder, out = map(Path, sys.argv[1:3])
    transport = cast(TransportName, sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sharded = sharded_model(folder)
    faults = Faults()
    exchange.handle_of = faults.handle_of  # type: ignore[attr-defined]
    Member.begin = lambda *given: faults.send(*given)  # type: ignore[method-assign]

    def together(version: int) -> None:
        """What both ranks do before a version is published."""
        change(sharded, version)
        faults.begin(version)

    if dist.get_rank() == 0:
        found = asyncio.run(lead(sharded, folder, out, transport, sys.argv[4], together))
        (out / "found.json").write_text(json.dumps(found))
        end_rank()
    for version in (1, 2, 3, 4, 5, 6):
        if version != 5:
            together(version)
        if version in (1, 2, 4):
            gathered(sharded)
        follow(with_partial(sharded) if version == 4 else sharded)


if __name__ == "__main__":
    main()
