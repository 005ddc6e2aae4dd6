"""Buckets that come by a process group, each received while the one before is loaded: whole ones that rank 0
broadcasts, or parts that several ranks send. Extensions of engines run this file."""

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from millrace_group import Announcement, connect, join, meet, receive, receive_parts, wait
from millrace_words import first_line

log = logging.getLogger(__name__)

UNTIL_ANNOUNCED = timedelta(days=20)  # a wait on the store that ends by the sender's end


@dataclass(frozen=True, slots=True)
class Group:
    """A process group with this rank's number in it.

    seconds: in which the ranks must meet, and each bucket arrive. senders: how many of the first ranks send this one
    its parts; 0 if rank 0 broadcasts whole buckets.
    """

    name: str
    backend: str
    address: str
    port: int
    rank: int
    world_size: int
    seconds: float
    senders: int = 0

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> "Group":
        """Read a group. Raises what a body in another form makes."""
        place = str(body["address"]), int(body["port"])
        return cls(
            *(str(body["name"]), str(body["backend"]), *place),
            *(int(body["rank"]), int(body["world_size"]), float(body["seconds"])),
            int(body.get("senders", 0)),
        )


class ReceivingGroup:
    """A sender's process group with this rank as a member. Rank 0 is the sender, or leads several senders.

    It writes to its store what each bucket is, under `NAME/bucket/0`, `NAME/bucket/1` and so on, and then the senders
    send the bucket's bytes. An empty text means that none will follow. A thread of this rank waits for the first
    number, joins the group and receives, into two buffers in turn. With several senders it joins at once. A bucket is
    announced only after the one before the last was loaded. The thread ends and the buffers are freed when the sender's
    store is gone.

    Raises RuntimeError if the store can't be reached.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        announced = connect(group.address, group.port, group.world_size, group.seconds)
        self._arrived: queue.Queue[tuple[int, torch.Tensor] | Exception] = queue.Queue()
        self._taken: dict[int, torch.Tensor] = {}  # from the queue, by number; the last two
        self._joined: Any = None
        self._closed = False
        device = torch.device("cuda", torch.cuda.current_device()) if group.backend == "nccl" else torch.device("cpu")
        threading.Thread(target=self._run, args=(announced, device), name="millrace-receive", daemon=True).start()

    def bucket(self, number: int, seconds: float) -> torch.Tensor:
        """Return the bytes of the bucket with this number, [nbytes] uint8 on the CPU (gloo) or this rank's GPU (NCCL).

        Only the last two that have arrived are kept. Raises RuntimeError if it does not arrive in `seconds` or the
        group is broken; the group is then closed.
        """
        ends = time.monotonic() + seconds
        while (bucket := self._taken.get(number)) is None:
            try:
                got = self._arrived.get(timeout=0 if self._closed else max(0.0, ends - time.monotonic()))
            except queue.Empty:
                got = RuntimeError("the group is closed" if self._closed else f"not within {seconds:.0f} s")
            if isinstance(got, Exception):
                self.close()
                raise RuntimeError(f"group {self.group.name}: bucket {number} did not come: {first_line(got)}") from got
            self._taken[got[0]] = got[1]
            if len(self._taken) > 2:
                del self._taken[next(iter(self._taken))]
        return bucket

    def close(self) -> None:
        """Leave the group, in whatever state it is, and free the buffers."""
        if not self._closed:
            self._closed, self._taken = True, {}
            if self._joined is not None:  # in a thread: it waits for a broadcast that is under way
                threading.Thread(target=self._joined.abort, daemon=True).start()

    def _run(self, announced: Any, device: torch.device) -> None:
        ended: Exception = RuntimeError("the sender has closed the group")
        try:
            with on_own_stream(device):
                self._receive(announced, device)
        except Exception as error:  # it is the answer to the next order
            log.warning("process group %s has ended: %s", self.group.name, first_line(error))
            ended = error.with_traceback(None)  # that would keep the buffers
        self._free(device, ended)

    def _free(self, device: torch.device, ended: Exception) -> None:
        """Let go of what this rank keeps of a group that has ended. ended: why, for the next order."""
        left, self._taken, self._joined = self._joined, {}, None
        with contextlib.suppress(queue.Empty):
            while True:
                self._arrived.get_nowait()
        self._arrived.put(ended)
        if left is not None:
            left.abort()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _join(self, announced: Any) -> Any:
        group = self.group
        return join(announced, group.name, group.backend, group.rank, group.world_size, group.seconds)

    def _receive(self, announced: Any, device: torch.device) -> None:
        """Receive one bucket after the other until the sender has no more."""
        group = self.group
        if group.senders:  # they wait for all ranks
            self._joined = self._join(announced)
            meet(self._joined, group.seconds, device)
        buffers: list[torch.Tensor] = []
        for index in itertools.count():
            announced.wait([key := f"{group.name}/bucket/{index}"], UNTIL_ANNOUNCED)
            text = announced.get(key).decode()
            if not text or self._closed:
                return
            sizes: tuple[int, ...] = ()
            if group.senders:
                number, room, sizes = Announcement.read(text, group.rank - group.senders)
                nbytes = sum(sizes)
            else:
                number, nbytes = map(int, text.split())
                room = nbytes
            if index == 0:
                self._joined = self._joined or self._join(announced)
                # Both, so that the first order's answer says it if there is no room.
                buffers = [torch.empty(room, dtype=torch.uint8, device=device) for _ in range(2)]
            elif buffers[index % 2].nbytes < room:
                buffers[index % 2] = torch.empty(0, dtype=torch.uint8)  # the old one goes first
                buffers[index % 2] = torch.empty(room, dtype=torch.uint8, device=device)
            bucket = buffers[index % 2][:nbytes]
            work = receive_parts(self._joined, bucket, sizes) if sizes else receive(self._joined, bucket)
            wait(self._joined, work, group.seconds, partial(announced.check, [key]))  # raises if the store is gone
            self._arrived.put((number, bucket))


@contextlib.contextmanager
def on_own_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a stream of its own, so that a broadcast does not wait for what the model does."""
    if device.type == "cpu":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        yield
