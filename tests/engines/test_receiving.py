"""A rank receives buckets in a process group ahead of the orders for them. The rank is a thread of this process."""

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from millrace.engines.stock.launching import EXTENSION
from millrace.weights.transports.sending_group import SendingGroup

DEADLINE = 20.0
NBYTES = 1_234_567  # of a bucket; no other tensor here has as many


@pytest.fixture
def receive(monkeypatch: pytest.MonkeyPatch) -> Callable[[SendingGroup], Any]:
    """Returns what makes the rank that receives from a sender."""
    monkeypatch.syspath_prepend(str(EXTENSION))
    import millrace_receiving

    def receive(sender: SendingGroup) -> Any:
        place = {"address": "127.0.0.1", "port": sender.port, "rank": 1, "world_size": 2, "seconds": DEADLINE}
        group = millrace_receiving.Group.read({"name": sender.name, "backend": "gloo", **place})
        return millrace_receiving.ReceivingGroup(group)

    return receive


def buffers() -> int:
    return sum(type(one) is torch.Tensor and one.untyped_storage().nbytes() == NBYTES for one in gc.get_objects())


async def until_no_buffers() -> None:
    async with asyncio.timeout(DEADLINE):
        while buffers():
            await asyncio.sleep(0.01)


async def send(sender: SendingGroup, number: int) -> None:
    await sender.broadcast_bucket(number, torch.full((NBYTES,), number, dtype=torch.uint8))


@pytest.mark.parametrize("dies", [False, True])
async def test_the_buffers_are_freed_when_the_sender_ends(dies: bool, receive: Callable[[SendingGroup], Any]) -> None:
    """Also the one that holds a bucket which nobody asked for, and while the group is known."""
    sender = SendingGroup("freed", torch.device("cpu"), "127.0.0.1", receivers=1, deadline=DEADLINE)
    group = receive(sender)
    for number in range(5):
        await send(sender, number)
        if number < 4:
            assert set(group.bucket(number, DEADLINE).tolist()) == {number}
    assert buffers() >= 2
    if dies:
        sender.abort("it is gone")
    await asyncio.to_thread(sender.close)
    await until_no_buffers()
    says = "bucket 5 did not come: " + ("" if dies else "the sender has closed the group")
    with pytest.raises(RuntimeError, match=says):
        await asyncio.to_thread(group.bucket, 5, DEADLINE)
    with pytest.raises(RuntimeError, match="the group is closed"):
        await asyncio.to_thread(group.bucket, 5, DEADLINE)


async def test_a_rank_that_leaves_before_the_first_bucket_joins_no_group(
    receive: Callable[[SendingGroup], Any],
) -> None:
    sender = SendingGroup("left", torch.device("cpu"), "127.0.0.1", receivers=1, deadline=1.0)
    group = receive(sender)
    group.close()
    [waiting] = [thread for thread in threading.enumerate() if thread.name == "millrace-receive"]
    with pytest.raises(RuntimeError):
        await send(sender, 0)
    await asyncio.to_thread(waiting.join, DEADLINE)
    assert not waiting.is_alive()
    await asyncio.to_thread(sender.close)
