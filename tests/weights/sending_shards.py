"""The script of each rank in test_shards.py: `torchrun sending_shards.py`. Four ranks with tensors in all placements
send parts of them to the ranks of two engines, which are threads of rank 0 with the receiving half of the loader."""

import random
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from millrace.buckets import ProcessGroup
from millrace.engines.stock.launching import EXTENSION
from millrace.extension.millrace_samples import separated
from millrace.train.world import end_rank
from millrace.weights.cast import Dtypes, cast
from millrace.weights.sharded import ShardedTensors
from millrace.weights.shards.exchange import RankPlace, places
from millrace.weights.shards.members import MEMBERS, join_all
from millrace.weights.shards.schedule import Schedule, ShardedView, written
from millrace.weights.shards.sending import Sending
from millrace.weights.shards.views import views_of
from millrace.weights.source import WeightSource, source_of
from millrace.weights.transports.parts_groups import PartsGroup
from millrace.weights.transports.sending_group import hosted_store
from tests.weights.exchanging_shards import BUCKET, CPU, RANKS, converted, drawn_boxes, tensors_of

ENGINES = {"a": 2, "b": 1}  # their ranks
SECONDS = 60.0


class Engines:
    """What rank 0 knows of the engines, and their ranks."""

    def __init__(self) -> None:
        sys.path.append(str(EXTENSION))
        from millrace_sglang.receiving import Group, ReceivingGroup  # type: ignore[import-not-found]

        self.groups, self.ranks = list[PartsGroup](), list[list[Any]]()
        for name, ranks in ENGINES.items():
            world = RANKS + ranks
            store, port = hosted_store("127.0.0.1", world, SECONDS)
            group = ProcessGroup(name, "gloo", "127.0.0.1", port, RANKS, world, by_bucket=True, senders=RANKS)
            engine: Any = None
            self.groups.append(PartsGroup(group, store, engine, SECONDS))
            place = name, "gloo", "127.0.0.1", port
            self.ranks.append(
                [ReceivingGroup(Group(*place, RANKS + rank, world, SECONDS, RANKS)) for rank in range(ranks)]
            )

    def announce(self, schedule: Schedule, number: int) -> list[int]:
        first, numbers = RANKS, []
        for group, ranks in zip(self.groups, self.ranks, strict=True):
            sizes = [
                schedule.rounds[number].received(first + rank, schedule.ranks)[:RANKS] for rank in range(len(ranks))
            ]
            numbers.append(group.announce(BUCKET, sizes))
            first += len(ranks)
        return numbers

    def check(self, schedule: Schedule, number: int, numbers: list[int], whole: Mapping[str, Tensor]) -> int:
        """Compares each part that has arrived with the whole tensor. Returns their number."""
        seen, receiver = 0, RANKS
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


def send(sharded: Mapping[str, Tensor], schedule: bytes, whole: Mapping[str, Tensor], engines: Engines | None) -> int:
    """Sends one version. Returns the number of parts that have arrived."""
    sending = Sending.begin(sharded, CPU, list(ENGINES), schedule)
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


def wants_of(views: list[ShardedView], seed: int) -> list[list[list[Any]]]:
    """The ranks of the trainer want nothing, and the two engines the same."""
    draw = random.Random(seed)
    of_engines = [[drawn_boxes(draw, view.shape) for view in views] for _ in range(2)]
    return [[[] for _ in views] for _ in range(RANKS)] + of_engines + of_engines[:1]


def check_sending(source: WeightSource, sharded: Mapping[str, Tensor], held: list[RankPlace]) -> None:
    views, whole = views_of(source, sharded), dict(source)
    engines = Engines() if dist.get_rank() == 0 else None
    groups = [one.group for one in engines.groups] if engines is not None else []
    assert join_all(CPU, groups, SECONDS) == {}
    for seed in range(3):  # by the same groups
        schedule = written(views, [place.boxes for place in held], wants_of(views, seed), BUCKET)
        seen = send(sharded, schedule, whole, engines)
        assert seen > 20 or engines is None
    assert sorted(MEMBERS) == sorted(ENGINES)
    dist.barrier()
    for group in engines.groups if engines is not None else ():
        group.close()
    ends = time.monotonic() + SECONDS
    while MEMBERS:
        assert time.monotonic() < ends, "a rank has not left its group"
        time.sleep(0.01)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sharded = ShardedTensors(tensors_of())
    held = places(sharded.tensors, CPU)
    source = cast(source_of(sharded).converted(converted), Dtypes("bfloat16", {"model.plain": "float32"}))
    check_sending(source, sharded.tensors, held)
    dist.destroy_process_group()
    end_rank()


if __name__ == "__main__":
    main()
