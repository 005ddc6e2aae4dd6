"""Memory that other hosts can read over UCX, by the library NIXL.

A READ is one-sided: the owner of the memory takes no part in it, except for the library's own thread. Only the reader
knows when a READ is over. Over TCP, that thread copies from the memory, so freeing the memory during a READ kills the
process. Freeing the agent during a READ can do that too (a segmentation fault, seen with NIXL 1.5.1 on a busy machine).
Therefore an `Endpoint` that may still be read is kept until the process ends.
"""

import ctypes
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from millrace.errors import ConfigError, PublishError
from millrace.extension.millrace_environment import settings
from millrace.weights.transports.slots import Slot

POLL_SECONDS = 0.0005
# For TCP. With UCX's default of 8 KiB a transfer takes 2.5 times as long. UCX reads these from the environment only.
TCP_SETTINGS = {"UCX_TCP_TX_SEG_SIZE": "256k", "UCX_TCP_RX_SEG_SIZE": "256k"}

S = TypeVar("S", bound=Slot)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Region:
    """Registered memory of an endpoint. `gpu` is the index of its GPU; None if it is on the CPU."""

    address: int
    nbytes: int
    gpu: int | None

    @property
    def kind(self) -> str:
        """NIXL's name of the kind of memory."""
        return "DRAM" if self.gpu is None else "VRAM"

    def part(self, nbytes: int) -> list[tuple[int, int, int]]:
        """The first `nbytes` bytes, as NIXL describes them."""
        return [(self.address, nbytes, self.gpu or 0)]


class Endpoint(Generic[S]):
    """A NIXL agent with two registered slots, which grow to the size of the largest bucket. Not safe for concurrent
    use.

    new_slot: returns a new slot of a size in bytes, on `device`.

    Raises ConfigError if NIXL is not installed, and PublishError if UCX does not start.
    """

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
        """Return the slot, which has at least `size` bytes.

        unread: whether it is certain that no READ of the slot is running. Otherwise, if a larger slot replaces it, its
            memory is kept until the endpoint is closed.

        Raises PublishError if there is no room, or if UCX can't register the memory.
        """
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
        if reason is not None:  # raised outside of the block above, whose traceback would keep the agent open
            del self._slots[index]
            raise PublishError(f"UCX can't register {size / 2**20:.0f} MiB of memory for a bucket ({reason})")
        return slot

    def region(self, index: int) -> Region:
        memory = self._slots[index].bytes
        return Region(memory.data_ptr(), memory.nbytes, memory.device.index)

    def metadata(self) -> bytes:
        """Return what other endpoints need to reach this one and its slots, in NIXL's format."""
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def read(
        self, metadata: bytes, source: Region, index: int, nbytes: int, why_not: Callable[[], str | None]
    ) -> str | None:
        """Read `nbytes` of another endpoint's memory into a slot. Blocks. Return None, or why it failed.

        metadata: the other endpoint's `metadata`.
        source: the other endpoint's memory.
        why_not: called while the READ runs; if it returns a reason, the READ is abandoned.

        After a failure, close this endpoint: UCX may write to the slot until then. The reason is returned and not
        raised, because an exception's traceback would keep the agent open.
        """
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
        if reason is not None and "NIXL_ERR_BACKEND" in reason:
            reason = f"{reason}; with UCX_LOG_LEVEL=info, UCX writes to the sidecar's standard output why"
        return reason

    def close(self, *, unread: bool) -> None:
        """Free the agent and the slots.

        unread: whether it is certain that no READ of the slots is running. Otherwise both are kept until this process
            ends, and a running READ is completed.
        """
        slots = [*self._slots.values(), *self._retired]
        if unread:
            self._registered.clear()
            del self._agent
            for slot in slots:
                slot.close()
        else:
            logger.warning(
                "%.0f MiB of memory for buckets are kept until this process ends, because a sidecar that has not "
                "answered may still read them", sum(slot.bytes.nbytes for slot in slots) / 2**20,
            )  # fmt: skip
            _keep((self._agent, slots))
            del self._agent
        self._slots.clear()
        self._retired.clear()

    def _make_current(self) -> None:
        """Make the device's GPU current in this thread, because NIXL and UCX use the current GPU."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            torch.cuda.synchronize(self._device)


def _keep(value: object) -> None:
    """Never free a value, not even when the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def load() -> Any:
    """Return NIXL's module. Raises ConfigError if it is not installed."""
    try:
        import nixl_cu12
    except ImportError as error:
        raise ConfigError(
            f"UCX needs NIXL, which can't be imported here ({error}); install it for the trainer and for the sidecars: "
            "pip install 'millrace[ucx]'"
        ) from error
    if "NIXL_LOG_LEVEL" not in os.environ:
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it logs every agent to standard output
    return nixl_cu12
