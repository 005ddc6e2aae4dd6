"""What the ranks of a trainer have of its tensors, and what they send each other."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from millrace.engines.sglang.adapter import SGLangEngine
from millrace.extension.millrace_boxes import whole
from millrace.types import Capability, EngineInfo
from millrace.weights.cast import Dtypes, cast
from millrace.weights.shards.apart import require_fewer_bytes
from millrace.weights.shards.exchange import RankPlace
from millrace.weights.shards.plans import EngineRank, Plans
from millrace.weights.shards.schedule import read_schedule
from millrace.weights.shards.transport import beside_each
from millrace.weights.shards.views import NotExchangeable, views_of
from millrace.weights.source import NamedTensor, source_of
from millrace.weights.transports.base import PublishTarget
from millrace.weights.transports.process_group import ProcessGroupTransport
from millrace.weights.transports.sending_group import SendingGroup
from tests.torchrun import torchrun

TENSORS = {"w": torch.randn(4, 6), "b": torch.randn(4)}


def test_four_ranks_exchange_parts_of_tensors_in_all_placements() -> None:
    torchrun("tests/weights/exchanging_shards.py", ranks=4)


def test_four_ranks_send_parts_to_the_ranks_of_two_engines() -> None:
    torchrun("tests/weights/sending_shards.py", "cpu", ranks=4)


def test_views_are_found_without_values() -> None:
    def convert(tensors: Iterator[NamedTensor]) -> Iterator[NamedTensor]:
        for name, tensor in tensors:
            yield f"model.{name}", tensor[1:3].t() if name == "w" else tensor

    source = cast(source_of(TENSORS.items()).converted(convert), Dtypes("bfloat16", {"model.b": "float32"}))
    matrix, bias = views_of(source, TENSORS)
    assert (matrix.name, matrix.dtype, matrix.shape) == ("model.w", "bfloat16", (6, 2))
    assert (matrix.source, matrix.box, matrix.along) == (0, ((1, 3), (0, 6)), (1, 0))
    assert (bias.dtype, bias.itemsize, bias.shape, bias.source) == ("float32", 4, (4,), 1)


def test_plans_are_made_again_if_the_question_is_another() -> None:
    plans, source = Plans(), source_of(TENSORS.items())
    views = plans.views(source, TENSORS)
    assert plans.views(source, TENSORS) is views
    tied = {**TENSORS, "again": TENSORS["w"]}
    assert [view.source for view in plans.views(source_of(tied.items()), tied)] == [0, 1, 0]
    untied = {**TENSORS, "again": TENSORS["w"].clone()}
    assert [view.source for view in plans.views(source_of(untied.items()), untied)] == [0, 1, 2]

    ranks = [RankPlace((whole((4, 6)), whole((4,))), "host", None)]
    engines = {"sglang-0": [EngineRank(0, [[whole((4, 6))], []])]}
    first = plans.schedule(views, ranks, engines, 1024)
    assert plans.schedule(views, list(ranks), dict(engines), 1024) is first
    other = {**engines, "sglang-1": [EngineRank(0, [[((0, 2), (0, 6))], [((1, 3),)]])]}
    (one,) = read_schedule(plans.schedule(views, ranks, other, 1024)).rounds
    assert [piece.box for piece in one.pieces] == [whole((4, 6)), ((1, 3),)]


def computed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


def read(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor * tensor.max().item()


def compared(name: str, tensor: torch.Tensor) -> torch.Tensor:
    assert torch.equal(tensor, tensor)
    return tensor


def flattened(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1)[1:] if tensor.ndim > 1 else tensor


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (computed, "w is no part of one of the trainer's tensors"),
        (read, "reads the tensors' values"),
        (compared, "reads the tensors' values"),
        (flattened, "w is no rectangular part of the trainer's tensor"),
    ],
)
def test_what_is_no_part_of_a_tensor_must_be_gathered(change: object, why: str) -> None:
    assert callable(change)
    source = source_of(TENSORS.items()).converted(lambda tensors: ((n, change(n, t)) for n, t in tensors))
    with pytest.raises(NotExchangeable, match=why):
        views_of(source, TENSORS)


def target_of(ranks: int) -> PublishTarget:
    info = EngineInfo("sglang", "0.5.23", "/models/m", 0, 100, 100, frozenset({Capability.UPDATE_FROM_PARTS}), ranks)
    return PublishTarget(SGLangEngine("sglang-0", "http://127.0.0.1:1"), info)


async def test_the_rank_beside_an_engines_rank_is_on_its_host() -> None:
    here, there = RankPlace((), "host 0", None), RankPlace((), "host 1", None)
    assert beside_each(target_of(2), [here, here], on_gpus=False) == [0, 1]
    assert beside_each(target_of(4), [here, there, here], on_gpus=False) == [0, 2, 0, 2]
    on_gpu = replace(here, gpu="5a1b")
    with pytest.raises(NotExchangeable, match="sglang-0 is not on GPUs, and the trainer's tensors are elsewhere"):
        beside_each(target_of(1), [here, on_gpu], on_gpus=False)
    with pytest.raises(NotExchangeable, match="not every rank of sglang-0 is on a GPU of one of the trainer's ranks"):
        beside_each(target_of(1), [on_gpu], on_gpus=True)


@pytest.mark.parametrize(("together", "engines", "broadcast"), [(True, 3, True), (True, 2, False), (False, 3, False)])
def test_one_broadcast_for_more_engines_than_ranks_is_kept(together: bool, engines: int, broadcast: bool) -> None:
    transport = ProcessGroupTransport(SendingGroup, torch.device("cpu"), together=together)
    with pytest.raises(NotExchangeable, match="one broadcast reaches all 3 engines") if broadcast else nullcontext():
        require_fewer_bytes(transport, engines, senders=2)
