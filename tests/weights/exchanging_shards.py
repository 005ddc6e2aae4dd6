"""The script of each rank in test_shards.py: `torchrun exchanging_shards.py`. Four ranks with tensors in all placements
exchange parts of them, without an engine. Each checks its own buckets."""

import random
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from millrace.extension.millrace_boxes import Box, common, disjoint, elements, whole
from millrace.extension.millrace_samples import separated
from millrace.train.world import end_rank
from millrace.weights.cast import Dtypes, cast
from millrace.weights.sharded import ShardedTensors
from millrace.weights.shards.exchange import Exchange, RankPlace, places
from millrace.weights.shards.schedule import ShardedView, written
from millrace.weights.shards.views import views_of
from millrace.weights.sidecar.messages import Form
from millrace.weights.source import NamedTensor, WeightSource, source_of

RANKS, BUCKET = 4, 512
CPU = torch.device("cpu")


def tensors_of() -> dict[str, Tensor]:
    """The same tensors on all ranks, sharded: by FSDP2 over tensor parallelism, by FSDP2, and by hand."""
    torch.manual_seed(0)
    flat, square = init_device_mesh("cpu", (RANKS,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    both = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 7))
    parallelize_module(both, square["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(both, mesh=square["dp"])
    alone = nn.Sequential(nn.Linear(5, 9))
    fully_shard(alone, mesh=flat)
    tied = distribute_tensor(torch.randn(8, 3), flat, [Shard(0)])
    return {
        **{f"both.{name}": parameter for name, parameter in both.named_parameters()},
        **{f"alone.{name}": parameter for name, parameter in alone.named_parameters()},
        "tied": tied,
        "again": tied,
        "columns": distribute_tensor(torch.randn(3, 9), flat, [Shard(1)]),
        "few rows": distribute_tensor(torch.randn(3, 4), flat, [Shard(0)]),
        "hybrid": distribute_tensor(torch.randn(6, 4), square, [Replicate(), Shard(0)]),
        "experts": distribute_tensor(torch.randn(6, 8, 5), flat, [Shard(0)]),
        "plain": torch.randn(4, 4),
        "scalar": torch.randn(()),
        "counts": torch.arange(7),
    }


def converted(tensors: Iterator[NamedTensor]) -> Iterator[NamedTensor]:
    """Renames, splits and transposes tensors, as the way to a checkpoint does."""
    for name, tensor in tensors:
        if name != "experts":
            yield f"model.{name}", tensor
            continue
        for number, expert in enumerate(tensor.unbind(0)):
            yield f"model.{number}.gate", expert[:4]
            yield f"model.{number}.up", expert[4:].t()


def drawn_boxes(draw: random.Random, shape: tuple[int, ...]) -> list[Box]:
    def box() -> Box:
        starts = [draw.randrange(size) for size in shape]
        return tuple((start, draw.randint(start + 1, size)) for start, size in zip(starts, shape, strict=True))

    return disjoint(box() for _ in range(draw.randrange(3)))


def not_local(view: ShardedView, box: Box, owned: Box | None) -> int:
    source = view.to_source(box)
    both = None if owned is None else common(source, owned)
    return view.itemsize * (elements(source) - (0 if both is None else elements(both)))


def check_boxes(sharded: Mapping[str, Tensor], full: Mapping[str, Tensor], held: list[RankPlace]) -> None:
    for (name, tensor), box in zip(sharded.items(), held[dist.get_rank()].boxes, strict=True):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if box is None:
            assert local.numel() == 0, name
        else:
            assert torch.equal(local, full[name][tuple(slice(start, end) for start, end in box)]), name


def check_exchange(source: WeightSource, sharded: Mapping[str, Tensor], held: list[RankPlace], seed: int) -> int:
    """Exchanges parts that are drawn at random, and compares each with the whole tensor. Returns their number."""
    views, whole_tensors, rank = views_of(source, sharded), dict(source), dist.get_rank()
    assert [(view.name, view.shape, view.dtype) for view in views] == [
        (name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in whole_tensors.items()
    ]
    draw = random.Random(seed)
    wants = [[drawn_boxes(draw, view.shape) for view in views] for _ in range(RANKS)]
    if seed == 0:
        wants = [[[whole(view.shape)] for view in views] for _ in range(RANKS)]
    schedule = written(views, [place.boxes for place in held], wants, BUCKET)
    exchange = Exchange.begin(sharded, CPU, (Form.TORCH_STORAGE, Form.MEMORY_FILE)[seed % 2], schedule)
    assert exchange.held_bytes <= 2 * BUCKET
    received, seen = 0, 0
    for number, one in enumerate(exchange.schedule.rounds):
        filled = exchange.fill(number, [0] * RANKS)[rank]
        received += filled.exchanged
        memory = exchange._slots[number % 2].bytes
        for piece, offset in one.bucket(rank, RANKS):
            tensor = whole_tensors[views[piece.tensor].name]
            expected = tensor[tuple(slice(start, end) for start, end in piece.box)]
            assert memory[offset : offset + piece.nbytes].view(tensor.dtype).tolist() == expected.flatten().tolist()
            seen += 1
        assert len(separated(filled.samples)) == sum(piece.receiver == rank for piece in one.pieces)
    assert received == sum(
        not_local(view, box, held[rank].boxes[view.source])
        for view, boxes in zip(views, wants[rank], strict=True)
        for box in boxes
    )
    exchange.close()
    assert exchange.held_bytes == 0
    return seen


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sharded = ShardedTensors(tensors_of())
    held = places(sharded.tensors, CPU)
    check_boxes(sharded.tensors, dict(sharded), held)
    # Each rank iterates over the whole tensors to compare, so that no rank leads.
    source = cast(source_of(sharded).converted(converted), Dtypes("bfloat16", {"model.plain": "float32"}))
    seen = sum(check_exchange(source, sharded.tensors, held, seed) for seed in range(3))
    assert seen > 100, seen
    dist.destroy_process_group()
    end_rank()


if __name__ == "__main__":
    main()
