"""What each rank of a trainer does to send parts of its tensors to the ranks of engines that are apart.

As in `exchange`, everything here is collective.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import torch
import torch.distributed as dist
from torch import Tensor

from millrace.errors import PublishError
from millrace.weights.shards.exchange import gathered, spread
from millrace.weights.shards.filling import Copies, prepared, samples_of
from millrace.weights.shards.members import MEMBERS, Member
from millrace.weights.shards.schedule import Schedule, read_schedule
from millrace.weights.shards.views import shards_of


class Outgoing:
    """What a rank sends in one round. sizes: for each receiver, how many bytes it gets."""

    def __init__(
        self, schedule: Schedule, number: int, rank: int, shards: Sequence[Tensor], device: torch.device
    ) -> None:
        one = schedule.rounds[number]
        pieces = list(one.outgoing(rank, schedule.ranks))
        self.copies = Copies(schedule, rank, pieces, shards, device)
        self.samples = samples_of(schedule, pieces, device)
        self.sizes = one.sent(rank, schedule.ranks)[len(schedule.owners) :]


@dataclass(slots=True)
class Sending:
    """One version on this rank. tensors: its shards. members: its place in the group of each engine, in the order in
    which the schedule numbers their ranks."""

    tensors: Sequence[Tensor]
    schedule: Schedule
    device: torch.device
    members: Sequence[Member]
    rank: int = field(default_factory=dist.get_rank)
    _slots: list[Tensor] = field(default_factory=list)
    _running: dict[int, list[tuple[Member, Any]]] = field(default_factory=dict)  # by the slot that is sent

    @classmethod
    def begin(
        cls, tensors: Mapping[str, Tensor], device: torch.device, groups: Sequence[str] = (), schedule: bytes = b""
    ) -> "Sending":
        """Return the sending that rank 0 has planned, with its memory.

        groups: on rank 0, the names of the engines' groups; all ranks have joined them. schedule: on rank 0, from
        `schedule.written`. Raises PublishError on all ranks if one of them has no room or has lost a group.
        """
        names = orjson.loads(spread(orjson.dumps(list(groups)), device))
        planned = read_schedule(spread(schedule, device))
        made = cls(shards_of(tensors), planned, device, [])
        why = ""
        try:
            made.members = [MEMBERS[name] for name in names]
            made._allocate()
        except KeyError as error:
            why = f"rank {made.rank} is no longer in group {error}"
        except PublishError as error:
            why = f"rank {made.rank}: {error}"
        if reasons := [text.decode() for text in gathered(why.encode(), device) if text]:
            made.close()
            raise PublishError(reasons[0])
        return made

    @property
    def held_bytes(self) -> int:
        """The memory that this rank has besides its shards."""
        return sum(slot.nbytes for slot in self._slots)

    def fill(self, number: int) -> list[str]:
        """Begin to send the parts of a round, and return the sampled checksums of what each rank sends, in the order of
        its pieces. The bucket of the round before the last must have been loaded.

        An engine whose group has ended gets nothing.
        """
        outgoing = prepared(self.schedule, number, self.tensors, lambda: self._outgoing(number))
        slot = number % len(self._slots)
        self._finish(slot)
        memory = self._slots[slot]
        outgoing.copies.run(self.tensors, memory)
        samples = outgoing.samples.checksums(memory)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        first, at, running = 0, 0, self._running[slot]
        for member in self.members:
            sizes = outgoing.sizes[first : first + member.receivers]
            running.append((member, member.begin(memory[at : at + sum(sizes)], sizes)))
            first, at = first + member.receivers, at + sum(sizes)
        return [text.decode() for text in gathered(samples.encode(), self.device)]

    def close(self) -> None:
        """Free the memory, when it is sent or the groups have ended."""
        for slot in self._running:
            self._finish(slot)
        self._slots.clear()

    def _finish(self, slot: int) -> None:
        for member, work in self._running.get(slot, ()):
            member.finish(work)
        self._running[slot] = []

    def _allocate(self) -> None:
        size = self.schedule.outgoing_bytes(self.rank)
        try:
            for _ in range(min(2, len(self.schedule.rounds))):
                self._slots.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        except torch.OutOfMemoryError as error:
            raise PublishError(
                f"no {size / 2**20:.0f} MiB on {self.device} for what it sends; lower publish.bucket_bytes"
            ) from error

    def _outgoing(self, number: int) -> Outgoing:
        return Outgoing(self.schedule, number, self.rank, self.tensors, self.device)
