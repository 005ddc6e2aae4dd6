"""The weight loader of SGLang's processes receives buckets by a process group, as a rank that is a thread of this
process."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest
import torch

from millrace.buckets import ProcessGroup
from millrace.checksum import sampled_checksums
from millrace.engines.sglang.loading import AnswerStore, LoaderUpdate
from millrace.weights.transports.layouts import layout_of
from millrace.weights.transports.sending_group import SendingGroup
from tests.engines.sglang.test_loader import Model, Tensors, load, loaded, packed, require_same, weights

__all__ = ["load"]
Load = Callable[[torch.nn.Module, Any], None]
DEADLINE = 20.0
NOTHING = torch.zeros(0, dtype=torch.uint8)


class Sender:
    """Rank 0 of a group, and what the adapter does with the answers of the loader, which is rank 1."""

    def __init__(self, load: Load, name: str) -> None:
        self._load, self.model, self.update = load, Model(), LoaderUpdate("sglang-0")
        self.group = SendingGroup(name, torch.device("cpu"), "127.0.0.1", receivers=1, deadline=DEADLINE)
        place = "127.0.0.1", self.group.port
        self.answers = AnswerStore(ProcessGroup(name, "gloo", *place, 1, 2, by_bucket=True), 1, DEADLINE)

    async def broadcast(self, number: int, tensors: Tensors) -> None:
        await self.group.broadcast_bucket(number, packed(tensors))

    async def order(self, number: int, tensors: Tensors, *, seconds: float = DEADLINE) -> Mapping[str, Any]:
        """Have the loader load a bucket, and return its answer."""
        specs = layout_of(list(tensors.items())).specs
        [order] = self.update.orders(specs, self.answers.places(number, seconds))
        await asyncio.to_thread(self._load, self.model, [(order, NOTHING)])
        [text] = await asyncio.to_thread(self.answers.read, number)
        answer: Mapping[str, Any] = json.loads(text)
        return answer

    async def send(self, number: int, tensors: Tensors) -> Mapping[str, Any]:
        sending = asyncio.create_task(self.broadcast(number, tensors))
        answer = await self.order(number, tensors)
        await sending
        return answer


@pytest.fixture
async def sender(load: Load) -> AsyncIterator[Sender]:
    sender = Sender(load, "weights")
    yield sender
    await asyncio.to_thread(sender.group.close)


def receivers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "millrace-receive"]


def ended(threads: list[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(DEADLINE)
    return not any(thread.is_alive() for thread in threads)


async def test_later_buckets_are_loaded_by_the_plan(sender: Sender) -> None:
    for number in range(5):
        sender.update = LoaderUpdate("sglang-0")
        tensors = weights(number)
        answer = await sender.send(number, tensors)
        assert answer["samples"] == "".join(sampled_checksums(list(tensors.values())))
        assert answer["missing"] == 0
        require_same(sender.model, loaded(tensors))
    assert sender.model.loads == 1


async def test_the_next_bucket_arrives_while_no_one_asks_for_it(sender: Sender) -> None:
    await sender.send(0, weights(0))
    await sender.broadcast(1, weights(1))  # it ends because the rank has received it
    require_same(sender.model, loaded(weights(0)))
    await sender.order(1, weights(1))
    require_same(sender.model, loaded(weights(1)))


async def test_a_bucket_that_was_never_asked_for_is_dropped(sender: Sender) -> None:
    await sender.send(0, weights(0))
    await sender.broadcast(1, weights(1))
    await sender.send(2, weights(2))
    require_same(sender.model, loaded(weights(2)))


async def test_an_order_for_the_same_bucket_loads_it_again(sender: Sender) -> None:
    """As SGLang gives it to a draft model."""
    await sender.send(0, weights(0))
    assert (await sender.order(0, weights(0)))["missing"] == 0


async def test_the_wait_for_a_bucket_ends(sender: Sender, load: Load) -> None:
    await sender.send(0, weights(0))
    answer = await sender.order(1, weights(1), seconds=0.2)
    assert answer["error"] == "RuntimeError: group weights: bucket 1 did not come: not within 0 s"
    sender.group.abort("the rank has left")
    other = Sender(load, "another")  # the model is another too, but the process goes on
    await other.send(0, weights(3))
    require_same(other.model, loaded(weights(3)))
    await asyncio.to_thread(other.group.close)


async def test_a_rank_leaves_when_the_sender_closes_the_group(load: Load) -> None:
    before = receivers()
    sender = Sender(load, "closing")
    await sender.send(0, weights(0))
    joined = [thread for thread in receivers() if thread not in before]
    assert len(joined) == 1
    await asyncio.to_thread(sender.group.close)
    assert await asyncio.to_thread(ended, joined)


async def test_a_rank_leaves_its_group_for_the_next_one(sender: Sender, load: Load) -> None:
    """A sender that could not close its group, such as one on a host that lost its network."""
    before = receivers()
    await sender.send(0, weights(0))
    joined = [thread for thread in receivers() if thread not in before]
    following = Sender(load, "following")
    following.model = sender.model
    await following.send(0, weights(1))
    require_same(sender.model, loaded(weights(1)))
    await asyncio.to_thread(sender.group.close)
    assert await asyncio.to_thread(ended, joined)
    await asyncio.to_thread(following.group.close)


async def test_a_sender_that_is_gone_is_an_answer_that_no_one_reads(sender: Sender, load: Load) -> None:
    await sender.send(0, weights(0))
    [order] = sender.update.orders((), sender.answers.places(1, DEADLINE))
    sender.group.abort("it is gone")
    del sender.answers
    await asyncio.to_thread(sender.group.close)
    await asyncio.to_thread(load, sender.model, [(order, NOTHING)])  # raises nothing, and ends at once
