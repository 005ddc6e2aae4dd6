"""Membership of an engine's process in a sender's process group of torch. The engines' interpreters run this file."""

import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from millrace_environment import settings

# With these off, torch's watchdog does not end this process when the sender dies.
NCCL_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
POLL_SECONDS = 0.0005
CHECK_SECONDS = 0.2  # between two calls of `check`


def connect(address: str, port: int, world_size: int, seconds: float) -> Any:
    """Return a client of the sender's store. Its own waits end after `seconds`. Raises RuntimeError if nothing answers
    by then."""
    return dist.TCPStore(address, port, world_size, is_master=False, timeout=timedelta(seconds=seconds))


def join(store: Any, name: str, backend: str, rank: int, world_size: int, seconds: float) -> Any:
    """Join the group of that name. The store's keys have the prefixes that torch gives to such a group.

    With gloo, returns when all ranks have joined, and each later wait ends after `seconds`. With NCCL, the ranks meet
    in the first broadcast. Raises RuntimeError if the ranks do not meet in time.
    """
    if backend not in ("gloo", "nccl") or not 0 < rank < world_size:
        raise RuntimeError(f"rank {rank} of {world_size} can't receive over {backend}")
    for prefix in (name, f"{name}/", "cpu/" if backend == "gloo" else "cuda/"):
        store = dist.PrefixStore(prefix, store)
    deadline = timedelta(seconds=seconds)
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, world_size, deadline)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = 2 * deadline + timedelta(minutes=1)
    with settings(NCCL_SETTINGS):
        return dist.ProcessGroupNCCL(store, rank, world_size, options)


def receive(group: Any, tensor: torch.Tensor) -> Any:
    """Begin to receive a broadcast of rank 0, and return torch's handle of the work."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([tensor], options)


def receive_parts(group: Any, bucket: torch.Tensor, sizes: Sequence[int]) -> Any:
    """Begin to receive a bucket, [nbytes] uint8, from the first ranks, and return torch's handle of the work.

    sizes: how many bytes each of them sends. They lie in the bucket in the order of the ranks.
    """
    nothing = [0] * group.size()
    incoming = [*sizes, *nothing[len(sizes) :]]
    return group.alltoall_base(bucket, bucket.new_empty(0), incoming, nothing, dist.AllToAllOptions())


def meet(group: Any, seconds: float, device: torch.device | str) -> None:
    """Wait until all ranks of a group of several senders have met. NCCL's do in the first collective. Raises
    RuntimeError if they do not within `seconds`."""
    wait(group, receive(group, torch.empty(1, device=device)), seconds)


class Announcement(NamedTuple):
    """What rank 0's store says about the next bucket of parts.

    number: by which orders name it. room: the size of the largest bucket of the update. sizes: how many of its bytes
    each of the first ranks sends to this one.
    """

    number: int
    room: int
    sizes: tuple[int, ...]

    @classmethod
    def read(cls, text: str, receiver: int) -> "Announcement":
        """Read an announcement for a rank, by its place among those that receive. Raises what a text in another form
        makes."""
        number, room, of_ranks = json.loads(text)
        return cls(int(number), int(room), tuple(map(int, of_ranks[receiver])))


def wait(group: Any, work: Any, seconds: float, check: Callable[[], object] = bool) -> None:
    """Wait until all that was received has arrived. NCCL's own wait returns when the transfer is queued.

    work: the last one. check: raises RuntimeError when there is nothing to wait for any more. Raises RuntimeError if it
    takes longer than `seconds`; the group is then broken.
    """
    checked = time.monotonic()
    ends = checked + seconds
    while not work.is_completed():
        now = time.monotonic()
        if now > ends:
            group.abort()
            raise RuntimeError(f"not within {seconds:.0f} s; the group is broken, leave it")
        if now > checked + CHECK_SECONDS:
            check()
            checked = now
        time.sleep(POLL_SECONDS)
    work.wait()
