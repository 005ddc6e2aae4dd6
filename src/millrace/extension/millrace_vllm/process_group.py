"""Tensors that a sender broadcasts to a torch process group, over Gloo or NCCL, and parts of them that several ranks
send."""

from collections.abc import Sequence
from typing import Any

import torch
from millrace_group import Announcement, connect, join, meet, receive, receive_parts, wait
from millrace_words import first_line

from .errors import RpcError
from .messages import TensorSpec, take
from .receive import view


class ReceivingGroup:
    """A sender's process group with this worker as a member. Rank 0, the sender, broadcasts. With several senders, its
    store says what comes from whom.

    Every wait ends after `timeout` seconds."""

    def __init__(self, wanted: dict[str, Any], rank: int, device: torch.device) -> None:
        self._name, self._backend = take(wanted, "name", str), take(wanted, "backend", str)
        self._timeout = float(take(wanted, "timeout", int, float))
        address, port = take(wanted, "address", str), take(wanted, "port", int)
        self._senders = take(wanted, "senders", int)
        self._receiver, self._received, self._early = rank, 0, dict[int, torch.Tensor]()
        self._device = torch.device("cpu") if self._backend == "gloo" else device
        rank, world_size = rank + take(wanted, "rank_offset", int), take(wanted, "world_size", int)
        try:
            self._store = connect(address, port, world_size, self._timeout)
            self._group = join(self._store, self._name, self._backend, rank, world_size, self._timeout)
            if self._senders:
                meet(self._group, self._timeout, self._device)
        except RuntimeError as error:  # torch's DistError is one
            raise RpcError(f"could not join group {self._name} at {address}:{port}: {first_line(error)}") from error

    def receive(self, specs: Sequence[TensorSpec], nbytes: int) -> torch.Tensor:
        """A bucket of `nbytes` bytes with the next tensors that rank 0 broadcasts: one for each spec, in their order.

        It is in the host's memory with Gloo, and on the device with NCCL."""
        bucket = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        try:
            work = None
            for spec in specs:
                work = receive(self._group, view(bucket, spec))
                if self._backend == "gloo":
                    work.wait()
            if work is not None:
                wait(self._group, work, self._timeout)
        except RuntimeError as error:
            raise RpcError(f"group {self._name}: the broadcast did not come: {first_line(error)}") from error
        return bucket

    def receive_parts(self, number: int) -> torch.Tensor:
        """The bucket of parts that rank 0 has announced under this number. Orders for two buckets may change places."""
        try:
            while number not in self._early:
                if number < self._received:
                    raise RpcError(f"group {self._name}: bucket {number} was received before")
                text = self._store.get(f"{self._name}/bucket/{self._received}").decode()
                coming = Announcement.read(text, self._receiver)
                bucket = torch.empty(sum(coming.sizes), dtype=torch.uint8, device=self._device)
                work = receive_parts(self._group, bucket, coming.sizes)
                wait(self._group, work, self._timeout, lambda: self._store.check([self._name]))
                self._early[coming.number] = bucket
                self._received += 1
        except (RuntimeError, ValueError) as error:  # ValueError: the group has ended
            raise RpcError(f"group {self._name}: bucket {number} did not come: {first_line(error)}") from error
        return self._early.pop(number)

    def close(self) -> None:
        self._group.shutdown()
