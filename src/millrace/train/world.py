"""The ranks of one trainer. A single process is a world of size 1 and needs no process group."""

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
    """This rank and its collectives. Ranks exchange numbers and bytes only: nothing is pickled."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def make_current(self) -> None:
        """Make `device` the thread's current device, which FSDP and NCCL use. CUDA keeps one for each thread."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place, and return it. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Take the elementwise maximum over the ranks, in place, and return it. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def broadcast(self, data: bytes) -> bytes:
        """Return the data of rank 0 on every rank. Collective."""
        if self.size == 1:
            return data
        length = torch.tensor(len(data))
        dist.broadcast(length, src=0)
        sent = torch.frombuffer(bytearray(data.ljust(int(length), b"\0")), dtype=torch.uint8)
        dist.broadcast(sent, src=0)
        return bytes(sent.tolist())

    def any(self, flag: bool) -> bool:
        """Return whether the flag is True on any rank. Collective, and so also a barrier."""
        return bool(self.max(torch.tensor(float(flag), device=self.device)).item())


@contextmanager
def join_world(device: str, *, timeout: float = 1800.0) -> Iterator[World]:
    """Join the process group that torchrun's environment variables describe, and leave it at the end of the block.

    Without these variables the world has size 1. device: `cpu` (gloo) or `cuda` (nccl, one GPU for each rank); a single
    rank uses the first GPU, or the one of `cuda:INDEX`. timeout: seconds for each collective; a rank that waits longer
    for the others fails. Raises ConfigError if the device is not available.
    """
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise ConfigError(f"train.device is {device!r}; the trainer runs on `cpu`, `cuda` or, say, `cuda:1`")
    kind, _, index = device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"train.device is {device!r}, but torch sees no GPU; set train.device to `cpu`")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        index = os.environ["LOCAL_RANK"]
    # A GPU always has its index, which torch.cuda.set_device needs.
    local = torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(kind)
    world = World(local, int(os.environ.get("RANK", "0")), size)
    world.make_current()
    if size == 1:
        yield world
        return
    # gloo is used beside nccl, because dcp exchanges a checkpoint's metadata on the CPU.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    yield world
    dist.destroy_process_group()  # not after an error: NCCL would wait for a collective that other ranks are in


def end_rank(status: int = 0) -> None:
    """End this process at once, with this exit status, if torchrun started it. Call it last.

    Gloo's threads may still be releasing the memory of the last collective, and torch 2.13 aborts an interpreter that
    exits meanwhile. torchrun would then report a failure of a rank that has done all its work.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
