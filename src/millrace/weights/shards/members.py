"""A trainer's rank in the process groups by which it sends parts of tensors to the ranks of engines."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import orjson
import torch
import torch.distributed as dist
from torch import Tensor

from millrace.buckets import ProcessGroup
from millrace.extension.millrace_words import first_line
from millrace.launch.ports import own_address, url_of
from millrace.weights.shards.exchange import gathered, spread
from millrace.weights.transports.parts_groups import END
from millrace.weights.transports.sending_group import POLL_SECONDS, new_group

UNTIL_CLOSED = timedelta(days=20)  # a wait on the store that ends by rank 0's end

logger = logging.getLogger(__name__)

MEMBERS: "dict[str, Member]" = {}  # by the group's name; each until its group ends


class Member:
    """This rank in the group of one engine.

    A thread joins the group, and leaves it when rank 0 closes the group's store. seconds: in which the ranks must meet,
    and what is sent must arrive.
    """

    def __init__(self, group: ProcessGroup, rank: int, seconds: float, device: torch.device) -> None:
        self.group, self._rank, self._seconds, self._device = group, rank, seconds, device
        self._joined: Any = None  # torch's group, until it ends
        self._met: Future[None] = Future()
        MEMBERS[group.name] = self
        threading.Thread(target=self._run, name="millrace-member", daemon=True).start()

    @property
    def receivers(self) -> int:
        """The number of the engine's ranks."""
        return self.group.world_size - self.group.senders

    def why_not_met(self) -> str:
        """Wait until all ranks have met. Return why they have not; empty if they have."""
        try:
            self._met.result(self._seconds)
        except TimeoutError:
            self.leave()
            return f"the ranks did not meet within {self._seconds:.0f} s"
        except Exception as error:
            return first_line(error)
        return ""

    def begin(self, memory: Tensor, sizes: Sequence[int]) -> Any:
        """Begin to send bytes, [nbytes] uint8, and return torch's handle of the work; None if the group has ended.

        sizes: how many of them each of the engine's ranks gets.
        """
        group, nothing = self._joined, [0] * self.group.world_size
        if group is None:
            return None
        outgoing = [*nothing[: self.group.senders], *sizes]
        try:
            return group.alltoall_base(memory.new_empty(0), memory, nothing, outgoing, dist.AllToAllOptions())
        except RuntimeError as error:
            self._fail(error)
            return None

    def finish(self, work: Any) -> None:
        """Wait until the bytes are sent, or the group has ended. The engine says what failed."""
        if work is None:
            return
        try:
            _until(lambda: self._joined is None or work.is_completed(), self._seconds)
            if self._joined is not None:
                work.wait()
        except RuntimeError as error:
            self._fail(error)

    def leave(self) -> None:
        """Leave the group, in whatever state it is."""
        MEMBERS.pop(self.group.name, None)
        left, self._joined = self._joined, None
        if left is not None:
            threading.Thread(target=left.abort, daemon=True).start()  # NCCL's abort is slow

    def _fail(self, error: RuntimeError) -> None:
        logger.warning("rank %d can't send to group %s: %s", self._rank, self.group.name, first_line(error))
        self.leave()

    def _run(self) -> None:
        try:
            ends = self._join()
        except Exception as error:  # it is what `why_not_met` says
            self._met.set_exception(error)
        else:
            self._met.set_result(None)
            with suppress(RuntimeError):  # the store is gone
                ends.wait([f"{self.group.name}/{END}"], UNTIL_CLOSED)
        self.leave()

    def _join(self) -> Any:
        """Join, wait until all ranks have met, and return a client of the store. Raises RuntimeError or OSError."""
        group = self.group
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        # Each client is one connection, and a wait occupies it.
        store, ends = (
            dist.TCPStore(
                *(group.address, group.port, group.world_size),
                is_master=False,
                timeout=timedelta(seconds=self._seconds),
                wait_for_workers=False,
            )
            for _ in range(2)
        )
        address = own_address(url_of(group.address, group.port))
        place = self._device, address, self._rank, group.world_size, self._seconds
        self._joined = joined = new_group(store, group.name, *place)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        work = joined.broadcast([torch.empty(1, device=self._device)], options)
        _until(lambda: bool(work.is_completed()), self._seconds)
        work.wait()
        return ends


def join_all(device: torch.device, groups: Sequence[ProcessGroup] = (), seconds: float = 0.0) -> dict[str, str]:
    """Have all ranks of the trainer join groups that they are not in. Return why some did not form, by their names.

    Collective. groups: on rank 0. The ranks of the engines must be joining.
    """
    rows, seconds = orjson.loads(spread(orjson.dumps([[asdict(group) for group in groups], seconds]), device))
    rank, failed = dist.get_rank(), dict[str, str]()
    members = [MEMBERS.get(row["name"]) or Member(ProcessGroup(**row), rank, seconds, device) for row in rows]
    for member in members:
        if why := member.why_not_met():
            failed[member.group.name] = f"rank {rank} of the trainer: {why}"
    answers = [orjson.loads(text) for text in gathered(orjson.dumps(failed), device)]
    return {name: why for answer in reversed(answers) for name, why in answer.items()}


def _until(done: Callable[[], bool], seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not done():
        if time.monotonic() > ends:
            raise RuntimeError(f"not within {seconds:.0f} s")
        time.sleep(POLL_SECONDS)
