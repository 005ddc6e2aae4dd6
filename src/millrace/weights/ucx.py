"""Memory that another host reads over UCX, by NIXL.

A READ is one-sided: whose memory it is does nothing for it but to let the library's own thread run. So nobody but the
reader knows when it is over, and memory that is freed under one that goes on kills the process over TCP, where that
thread copies from it. Therefore an `Endpoint` is closed as a whole: first the agent, with which every READ ends and
every address becomes void, and only then the memory.
"""

import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from millrace.errors import ConfigError, PublishError
from millrace.weights.environment import settings
from millrace.weights.transports.slots import Slot

POLL_SECONDS = 0.0005
# Without RDMA. UCX's own 8 KiB take two and a half times as long, and only the environment tells it otherwise.
TCP_SETTINGS = {"UCX_TCP_TX_SEG_SIZE": "256k", "UCX_TCP_RX_SEG_SIZE": "256k"}

S = TypeVar("S", bound=Slot)


@dataclass(frozen=True, slots=True)
class Region:
    """Registered memory of an endpoint. `gpu` is the index of the GPU that it lies on, None on the CPU."""

    address: int
    nbytes: int
    gpu: int | None

    @property
    def kind(self) -> str:
        """NIXL's word for where it lies."""
        return "DRAM" if self.gpu is None else "VRAM"

    def part(self, nbytes: int) -> list[tuple[int, int, int]]:
        """Its first bytes, as NIXL takes them."""
        return [(self.address, nbytes, self.gpu or 0)]


class Endpoint(Generic[S]):
    """An agent of NIXL with two slots that it has registered, each grown to the largest bucket seen and kept. For one
    thread at a time. `new_slot` takes a size in bytes; slots lie on `device`. Raises ConfigError without NIXL, and
    PublishError where UCX does not start."""

    def __init__(self, new_slot: Callable[[int], S], device: torch.device) -> None:
        nixl = load()
        self.name = f"millrace-{secrets.token_hex(8)}"
        self._new_slot, self._device = new_slot, device
        self._errors: tuple[type[Exception], ...] = tuple(
            value for value in vars(nixl._bindings).values() if isinstance(value, type) and issubclass(value, Exception)
        )
        self._slots: dict[int, S] = {}
        self._registered: dict[int, Any] = {}
        self._retired: list[S] = []
        self._make_current()
        try:
            with settings({name: value for name, value in TCP_SETTINGS.items() if name not in os.environ}):
                self._agent = nixl.nixl_agent(self.name, nixl.nixl_agent_config(backends=["UCX"]))
        except self._errors as error:
            raise PublishError(f"UCX can't be used here: {error}") from error

    def slot(self, index: int, size: int, *, unread: bool) -> S:
        """The slot, of at least `size` bytes. `unread`: nobody can be reading what it was until now; otherwise that is
        kept until the endpoint is closed. Raises PublishError where there is no room, or UCX does not take it."""
        slot = self._slots.get(index)
        if slot is not None and slot.bytes.nbytes >= size:
            return slot
        if slot is not None:
            del self._slots[index]
            if unread:
                self._agent.deregister_memory(self._registered.pop(index))
                slot.close()
            else:
                self._retired.append(slot)
        slot = self._slots[index] = self._new_slot(size)
        self._make_current()
        reason = None
        try:
            self._registered[index] = self._agent.register_memory(slot.bytes)
        except self._errors as error:
            reason = str(error)
        if reason is not None:  # not in the block above: its traceback would keep the agent from being closed
            del self._slots[index]
            raise PublishError(f"UCX takes no {size / 2**20:.0f} MiB of memory for a bucket ({reason})")
        return slot

    def region(self, index: int) -> Region:
        memory = self._slots[index].bytes
        return Region(memory.data_ptr(), memory.nbytes, memory.device.index)

    def metadata(self) -> bytes:
        """How others reach this endpoint and its slots, in NIXL's own form."""
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def read(
        self, metadata: bytes, source: Region, index: int, nbytes: int, why_not: Callable[[], str | None]
    ) -> str | None:
        """Fills a slot from another endpoint's memory. Returns why that failed, or what `why_not` gave as a reason to
        go no further; the slot may then still be written to until this endpoint is closed, which is what to do.

        An answer rather than an exception: its traceback would keep the agent from being closed."""
        self._make_current()
        target = self.region(index)
        transfer, reason = None, None
        try:
            peer = self._agent.add_remote_agent(metadata)
            here = self._agent.get_xfer_descs(target.part(nbytes), target.kind)
            there = self._agent.get_xfer_descs(source.part(nbytes), source.kind)
            transfer = self._agent.initialize_xfer("READ", here, there, peer)
            state = self._agent.transfer(transfer)
            while state == "PROC" and (reason := why_not()) is None:
                time.sleep(POLL_SECONDS)
                state = self._agent.check_xfer_state(transfer)
            if state == "ERR":
                reason = "UCX failed"
        except self._errors as error:
            reason = str(error)
        try:
            if transfer is not None:
                transfer.release()
        except self._errors as error:
            reason = reason or str(error)
        return reason

    def close(self) -> None:
        """Ends what is still being read, from here and by this endpoint, and frees the slots."""
        self._registered.clear()
        del self._agent
        for slot in [*self._slots.values(), *self._retired]:
            slot.close()
        self._slots.clear()
        self._retired.clear()

    def _make_current(self) -> None:
        """NIXL and UCX take the GPU that is current in the calling thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            torch.cuda.synchronize(self._device)


def load() -> Any:
    """NIXL's module. Raises ConfigError where it is not installed."""
    try:
        import nixl_cu12
    except ImportError as error:
        raise ConfigError(
            f"weights go over UCX by NIXL, which can't be imported here ({error}); install it where the trainer runs "
            "and where sidecars do: pip install 'millrace[ucx]'"
        ) from error
    if "NIXL_LOG_LEVEL" not in os.environ:
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it tells of every agent, on standard output
    return nixl_cu12
