"""What each rank of a trainer does in an exchange: says what it has, and fills buckets for the engines beside it.

Everything here is collective: all ranks of the default process group call it in the same order. Ranks exchange numbers
and texts only; nothing is pickled.
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import torch
import torch.distributed as dist
from torch import Tensor

from millrace.errors import PublishError
from millrace.extension.millrace_boxes import Box, read_box
from millrace.weights.shards.filling import Filling, prepared
from millrace.weights.shards.schedule import Schedule, read_schedule
from millrace.weights.shards.views import NotExchangeable, own_boxes, shards_of
from millrace.weights.sidecar.handles import AnySlot, handle_of, new_slot
from millrace.weights.sidecar.messages import Form, Handle, Message


@dataclass(frozen=True, slots=True)
class RankPlace:
    """A rank of the trainer: what it has, and where it is.

    boxes: of each tensor; None if it has nothing of it. host: equal for ranks on one host. gpu: the UUID of its GPU;
    None if its tensors are on the CPU.
    """

    boxes: tuple[Box | None, ...]
    host: str
    gpu: str | None


class Filled(Message):
    """A rank's bucket of one round.

    handle: for the engines' ranks beside it. samples: the sampled checksums of the parts in it, one after the other.
    exchanged: the bytes of the parts that other ranks have sent.
    """

    handle: Handle
    samples: str
    exchanged: int


def places(tensors: Mapping[str, Tensor], device: torch.device) -> list[RankPlace]:
    """Return what each rank has. Raises NotExchangeable on all ranks if a rank's part of a tensor is no box."""
    why, boxes = "", list[Box | None]()
    try:
        boxes = own_boxes(tensors)
    except NotExchangeable as error:
        why = str(error)
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    host = f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    answers = [orjson.loads(text) for text in gathered(orjson.dumps([why, boxes, host, gpu]), device)]
    if reasons := [why for why, *_ in answers if why]:
        raise NotExchangeable(reasons[0])
    return [
        RankPlace(tuple(None if box is None else read_box(box) for box in boxes), host, gpu)
        for _, boxes, host, gpu in answers
    ]


@dataclass(slots=True)
class Exchange:
    """One version's exchange on this rank. tensors: this rank's shards. form: of the buckets' memory."""

    tensors: Sequence[Tensor]
    schedule: Schedule
    device: torch.device
    form: Form
    rank: int = field(default_factory=dist.get_rank)
    _slots: list[AnySlot] = field(default_factory=list)
    _outgoing: Tensor | None = None

    @classmethod
    def begin(
        cls, tensors: Mapping[str, Tensor], device: torch.device, form: Form, schedule: bytes = b""
    ) -> "Exchange":
        """Return the exchange that rank 0 has planned, with its memory.

        schedule: on rank 0, from `schedule.written`. Raises PublishError on all ranks if one of them has no room.
        """
        exchange = cls(shards_of(tensors), read_schedule(spread(schedule, device)), device, form)
        why = ""
        try:
            exchange._allocate()
        except PublishError as error:
            why = f"rank {exchange.rank}: {error}"
        if reasons := [text.decode() for text in gathered(why.encode(), device) if text]:
            exchange.close()
            raise PublishError(reasons[0])
        return exchange

    @property
    def held_bytes(self) -> int:
        """The memory that this rank has besides its shards."""
        outgoing = 0 if self._outgoing is None else self._outgoing.nbytes
        return outgoing + sum(slot.bytes.nbytes for slot in self._slots)

    def fill(self, number: int, shares: Sequence[int] = ()) -> list[Filled]:
        """Fill each rank's bucket of a round, and return what all ranks have filled. Overwrites the bucket of the round
        before the last.

        shares: on rank 0, how many ranks of engines will open the bucket of each rank.
        """
        openings = orjson.loads(spread(orjson.dumps(list(shares)), self.device))[self.rank]
        filling = prepared(self.schedule, number, self.tensors, lambda: self._filling(number))
        slot = self._slots[number % len(self._slots)]
        assert self._outgoing is not None
        filling.pack(self.tensors, self._outgoing)
        received, sent = filling.received, filling.sent
        dist.all_to_all_single(slot.bytes[: sum(received)], self._outgoing[: sum(sent)], received, sent)
        filling.copy_own(self.tensors, slot.bytes)
        samples = filling.checksums(slot.bytes)
        if self.device.type == "cuda":  # engines must not read the bucket before it is written
            torch.cuda.current_stream(self.device).synchronize()
        made = Filled(handle=handle_of(slot, openings), samples=samples, exchanged=filling.exchanged)
        return [Filled.model_validate_json(text) for text in gathered(made.model_dump_json().encode(), self.device)]

    def close(self) -> None:
        """Free the memory. No engine reads it any more."""
        for slot in self._slots:
            slot.close()
        self._slots.clear()
        self._outgoing = None
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]

    def _allocate(self) -> None:
        size, outgoing = self.schedule.slot_bytes(self.rank), self.schedule.outgoing_bytes(self.rank)
        for _ in range(min(2, len(self.schedule.rounds))):
            self._slots.append(new_slot(self.form, max(size, 1), self.device))
        try:
            self._outgoing = torch.empty(outgoing, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise PublishError(
                f"no {outgoing / 2**20:.0f} MiB on {self.device} for what it sends; lower publish.bucket_bytes"
            ) from error

    def _filling(self, number: int) -> Filling:
        return Filling(self.schedule, number, self.rank, self.tensors, self.device)


def spread(text: bytes, device: torch.device) -> bytes:
    """Return rank 0's text on every rank. Collective."""
    length = torch.tensor(len(text), device=device)
    dist.broadcast(length, src=0)
    sent = _as_tensor(text, int(length), device)
    dist.broadcast(sent, src=0)
    return sent.cpu().numpy().tobytes()


def gathered(text: bytes, device: torch.device) -> list[bytes]:
    """Return the text of each rank, on every rank. Collective."""
    lengths = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(lengths, torch.tensor([len(text)], device=device))
    sizes = lengths.tolist()
    most = max(1, *sizes)
    texts = torch.empty(most * len(sizes), dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(texts, _as_tensor(text, most, device))
    found = texts.cpu().numpy().reshape(len(sizes), most)
    return [row[:size].tobytes() for row, size in zip(found, sizes, strict=True)]


def _as_tensor(text: bytes, length: int, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(text.ljust(length, b"\0")), dtype=torch.uint8).to(device)
