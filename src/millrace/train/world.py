"""The ranks of one trainer. A single process is a world of one and needs no process group."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from millrace.errors import ConfigError


@dataclass(frozen=True, slots=True)
class World:
    """Who this rank is. Only numbers travel between ranks here: nothing is pickled."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def make_current(self) -> None:
        """Makes `device` the calling thread's: CUDA keeps the current device per thread, and FSDP and NCCL go by it."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest over ranks, in place. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's, on every rank. Collective."""
        if self.size == 1:
            return data
        length = torch.tensor(len(data))
        dist.broadcast(length, src=0)
        sent = torch.frombuffer(bytearray(data.ljust(int(length), b"\0")), dtype=torch.uint8)
        dist.broadcast(sent, src=0)
        return bytes(sent.tolist())

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. Collective, and so also a barrier."""
        return bool(self.max(torch.tensor(float(flag), device=self.device)).item())


@contextmanager
def join_world(device: str, *, timeout: float = 1800.0) -> Iterator[World]:
    """The world that torchrun's environment variables describe, or a world of one without them.

    Joins the process group at entry and leaves it at exit. `device` is `cpu` (gloo) or `cuda` (nccl, one GPU a
    rank; in a world of one the first, or that of the index).
    `timeout`, in seconds, is the deadline of every collective: a rank that waits longer for another one fails.
    Raises ConfigError where the device is not there.
    """
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise ConfigError(f"train.device is {device!r}; the trainer runs on `cpu`, `cuda` or, say, `cuda:1`")
    kind, _, index = device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"train.device is {device!r}, but torch sees no GPU; set train.device to `cpu`")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        index = os.environ["LOCAL_RANK"]
    # A GPU always with its index, which torch wants when a device is made current.
    local = torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(kind)
    world = World(local, int(os.environ.get("RANK", "0")), size)
    world.make_current()
    if size == 1:
        yield world
        return
    # gloo beside nccl: a checkpoint's bookkeeping is exchanged on the CPU.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield world
    finally:
        dist.destroy_process_group()


def end_rank() -> None:
    """Ends this process with success, at once, where torchrun started it; the last that it does.

    Gloo's threads may still be letting go of what the last collective held, and torch 2.13 aborts an interpreter that
    ends under them: torchrun would take a rank that has done all its work for one that failed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
