"""The script of each rank in test_sharded.py: `torchrun two_shards.py MODEL OUT`. Rank 0 publishes the tensors of
both."""

import asyncio
import itertools
import json
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from millrace.checksum import tensor_checksum
from millrace.config import EmbeddedEngineConfig
from millrace.errors import PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.train.world import end_rank
from millrace.weights.sharded import LedTensors, ShardedTensors, follow, leading


def split(tensors: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """Shards the tensors in turns: by rows, by columns, replicated, and as plain tensors."""
    shards: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        contexts = [Shard(0), Shard(tensor.ndim - 1), Replicate(), None]
        routing = contexts[number % len(contexts)]
        shards[name] = tensor if routing is None else distribute_tensor(tensor, mesh, [routing])
    return shards


def spoil(sharded: ShardedTensors) -> str:
    """Writes a NaN into one rank's shard of a tensor. Returns the tensor's name."""
    name, tensor = next((name, t) for name, t in sharded.tensors.items() if isinstance(t, DTensor))
    if dist.get_rank() == 1:
        tensor.to_local().view(-1)[-1] = float("nan")
    return name


async def publish_all(sharded: ShardedTensors, model: Path, logs: Path) -> dict[str, object]:
    config = EmbeddedEngineConfig(kind="embedded", threads=1)
    async with open_fleet(config, model, log_dir=logs) as fleet:
        with leading(sharded) as led:
            found = await publish(fleet, led)
        spoilt = spoil(sharded)
        with leading(sharded) as led:
            try:
                await fleet.publish(led, 4)
            except PublishError as error:
                found |= {"spoilt": spoilt, "not finite": str(error)}
        return found


async def publish(fleet: Fleet, led: LedTensors) -> dict[str, object]:
    (engine,) = fleet.engines.values()
    await fleet.publish(led, 1)
    first = await engine.checksums()
    refused = ""
    try:
        await fleet.publish(itertools.islice(led, 3), 2)
    except PublishError as error:
        refused = str(error)
    await fleet.publish(led, 3)
    return {
        "shapes": {name: list(shape) for name, shape in led.shapes()},
        "first": dict(first),
        "refused": refused,
        "third": dict(await engine.checksums()),
        "version": (await engine.info()).weight_version,
    }


def main() -> None:
    model, out = map(Path, sys.argv[1:])
    dist.init_process_group("gloo")
    whole = {name: tensor * 1.5 for name, tensor in load_file(model / "model.safetensors").items()}
    shards = split(whole, init_device_mesh("cpu", (2,)))
    held = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in shards.values())
    sharded = ShardedTensors(shards)
    if dist.get_rank() == 0:
        found = asyncio.run(publish_all(sharded, model, out))
        sent = {name: tensor_checksum(tensor) for name, tensor in whole.items()}
        share = held / sum(tensor.numel() for tensor in whole.values())
        (out / "found.json").write_text(json.dumps(found | {"sent": sent, "share": share}))
    else:
        follow(sharded)
        spoil(sharded)
        follow(sharded)
    dist.destroy_process_group()
    end_rank()


if __name__ == "__main__":
    main()
