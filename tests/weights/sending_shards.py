"""The script of each rank in test_shards.py and gpu/test_sent_parts.py: `torchrun sending_shards.py cpu|cuda`. Four
ranks with tensors in all placements send parts of them to the ranks of two engines, which are threads of rank 0 with
the receiving half of the loader. On GPUs, any number of ranks sends to one engine on the other GPUs."""

import os
import random
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from millrace.buckets import ProcessGroup
from millrace.engines.stock.launching import EXTENSION
from millrace.extension.millrace_samples import separated
from millrace.train.world import end_rank
from millrace.weights.cast import Dtypes, cast
from millrace.weights.sharded import ShardedTensors
from millrace.weights.shards.exchange import places
from millrace.weights.shards.members import MEMBERS, join_all
from millrace.weights.shards.schedule import Schedule, ShardedView, written
from millrace.weights.shards.sending import Sending
from millrace.weights.shards.views import views_of
from millrace.weights.source import WeightSource, source_of
from millrace.weights.transports.parts_groups import PartsGroup
from millrace.weights.transports.sending_group import backend_of, hosted_store
from tests.weights.exchanging_shards import BUCKET, converted, drawn_boxes, tensors_of

SECONDS = 60.0


class Engines:
    """What rank 0 knows of the engines, and their ranks.

    engines: the number of each one's ranks, by its name."""

    def __init__(self, engines: Mapping[str, int], senders: int, device: torch.device) -> None:
        sys.path.append(str(EXTENSION))
        from millrace_receiving import Group, ReceivingGroup

        self.groups, self.ranks = list[PartsGroup](), list[list[Any]]()
        self._senders, backend, first = senders, backend_of(device), senders  # the engines' first GPU
        for name, ranks in engines.items():
            world = senders + ranks
            store, port = hosted_store("127.0.0.1", world, SECONDS)
            group = ProcessGroup(name, backend, "127.0.0.1", port, senders, world, by_bucket=True, senders=senders)
            engine: Any = None
            self.groups.append(PartsGroup(group, store, engine, SECONDS))
            place, joined = (name, backend, "127.0.0.1", port), []
            for rank in range(ranks):
                with torch.cuda.device(first) if device.type == "cuda" else nullcontext():
                    joined.append(ReceivingGroup(Group(*place, senders + rank, world, SECONDS, senders)))
                first += 1
            self.ranks.append(joined)

    def announce(self, schedule: Schedule, number: int) -> list[int]:
        first, numbers = self._senders, []
        for group, ranks in zip(self.groups, self.ranks, strict=True):
            sizes = [
                schedule.rounds[number].received(first + rank, schedule.ranks)[: self._senders]
                for rank in range(len(ranks))
            ]
            numbers.append(group.announce(BUCKET, sizes))
            first += len(ranks)
        return numbers

    def check(self, schedule: Schedule, number: int, numbers: list[int], whole: Mapping[str, Tensor]) -> int:
        """Compares each part that has arrived with the whole tensor. Returns their number."""
        seen, receiver = 0, self._senders
        for arrived, ranks in zip(numbers, self.ranks, strict=True):
            for rank in ranks:
                bucket = rank.bucket(arrived, SECONDS)
                for piece, offset in schedule.rounds[number].bucket(receiver, schedule.ranks):
                    tensor = whole[schedule.views[piece.tensor].name]
                    expected = tensor[tuple(slice(start, end) for start, end in piece.box)]
                    got = bucket[offset : offset + piece.nbytes].view(tensor.dtype)
                    assert got.tolist() == expected.flatten().tolist(), (number, piece)
                    seen += 1
                receiver += 1
        return seen

    def close(self) -> None:
        """Ends the groups while all ranks wait for a bucket that no one sends."""
        sizes = [[[8] * self._senders for _ in ranks] for ranks in self.ranks]
        numbers = [group.announce(64, of_group) for group, of_group in zip(self.groups, sizes, strict=True)]
        for group in self.groups:
            group.close()
        for number, ranks in zip(numbers, self.ranks, strict=True):
            for rank in ranks:
                began = time.monotonic()
                try:
                    rank.bucket(number, SECONDS)
                except RuntimeError:
                    assert time.monotonic() < began + SECONDS / 2, "a rank has waited for a group that has ended"
                else:
                    raise AssertionError("a bucket came that no one has sent")


def send(
    sharded: Mapping[str, Tensor],
    device: torch.device,
    names: list[str],
    schedule: bytes,
    whole: Mapping[str, Tensor],
    engines: Engines | None,
) -> int:
    """Sends one version. Returns the number of parts that have arrived."""
    sending = Sending.begin(sharded, device, names, schedule)
    assert 0 < sending.held_bytes <= 2 * BUCKET
    seen, planned, rank = 0, sending.schedule, dist.get_rank()
    assert len(planned.rounds) > 3
    for number, one in enumerate(planned.rounds):
        numbers = engines.announce(planned, number) if engines is not None else []
        samples = sending.fill(number)
        assert len(separated(samples[rank])) == sum(piece.sender == rank for piece in one.pieces)
        if engines is not None:
            seen += engines.check(planned, number, numbers, whole)
    sending.close()
    assert sending.held_bytes == 0
    return seen


def wants_of(views: list[ShardedView], senders: int, receivers: int, seed: int) -> list[list[list[Any]]]:
    """The ranks of the trainer want nothing."""
    draw = random.Random(seed)
    of_engines = [[drawn_boxes(draw, view.shape) for view in views] for _ in range(receivers)]
    return [[[] for _ in views] for _ in range(senders)] + of_engines


def check_sending(source: WeightSource, sharded: Mapping[str, Tensor], of: Mapping[str, int]) -> None:
    device, senders = next(iter(sharded.values())).device, dist.get_world_size()
    held = places(sharded, device)
    views, whole = views_of(source, sharded), {name: tensor.cpu() for name, tensor in source}
    engines = Engines(of, senders, device) if dist.get_rank() == 0 else None
    groups = [one.group for one in engines.groups] if engines is not None else []
    assert join_all(device, groups, SECONDS) == {}
    for seed in range(3):  # by the same groups
        wants = wants_of(views, senders, sum(of.values()), seed)
        schedule = written(views, [place.boxes for place in held], wants, BUCKET)
        seen = send(sharded, device, list(of), schedule, whole, engines)
        assert seen > 20 or engines is None
    assert sorted(MEMBERS) == sorted(of)
    dist.barrier()
    if engines is not None:
        engines.close()
    ends = time.monotonic() + SECONDS
    while MEMBERS:
        assert time.monotonic() < ends, "a rank has not left its group"
        time.sleep(0.01)


def on_gpus(device: torch.device) -> dict[str, Tensor]:
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    torch.manual_seed(0)
    shapes = {"rows": (64, 40), "few": (3, 200), "experts": (6, 8, 50)}
    return {name: distribute_tensor(torch.randn(s, device=device), mesh, [Shard(0)]) for name, s in shapes.items()}


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "cuda":
        device = torch.device("cuda", int(os.environ["RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
        tensors, engines = on_gpus(device), {"a": torch.cuda.device_count() - dist.get_world_size()}
    else:
        dist.init_process_group("gloo")
        tensors, engines = tensors_of(), {"a": 2, "b": 1}
    sharded = ShardedTensors(tensors)
    source = cast(source_of(sharded).converted(converted), Dtypes("bfloat16", {"model.plain": "float32"}))
    check_sending(source, sharded.tensors, engines)
    dist.destroy_process_group()
    end_rank()


if __name__ == "__main__":
    main()
