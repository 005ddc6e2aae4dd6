"""Rank 0 of a process group of torch.distributed, which sends tensors to the other ranks."""

import asyncio
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from millrace.extension.millrace_environment import settings

POLL_SECONDS = 0.0005
# Without these, torch's watchdog ends this process when an engine dies or is slow.
NCCL_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}

T = TypeVar("T")


class SendingGroup:
    """Rank 0 of a process group, in this process. The engines are the other ranks.

    name: the group's name.
    device: where the tensors to send are; a GPU for NCCL, the CPU for gloo.
    address: the address of this host that the ranks meet at. The port is `port`.
    receivers: the number of the engines' ranks. All must join, and load, at the same time.
    deadline: the seconds that joining may take. With gloo, sending one tensor may take no longer either; torch raises
        RuntimeError when it does.
    """

    def __init__(self, name: str, device: torch.device, address: str, *, receivers: int, deadline: float) -> None:
        self.name, self.backend, self._world = name, backend_of(device), 1 + receivers
        self._device = device
        self.broken: str | None = None  # why nothing more can be sent
        self.seconds = deadline
        self._address = address
        self._group: Any = None
        self._announced = 0  # buckets
        self._store, self.port = hosted_store(address, self._world, deadline)

    async def join(self) -> None:
        """Wait until all ranks have joined. NCCL's ranks join during the first broadcast. Raises RuntimeError if they
        do not join in time, or if `abort` is called."""
        self._group = await self._in_thread(self._join)

    def _join(self) -> Any:
        return new_group(self._store, self.name, self._device, self._address, 0, self._world, self.seconds)

    async def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Send the tensors to all ranks. Each must be contiguous and on the group's device. Raises RuntimeError if the
        broadcast fails, or if `abort` is called. It has no deadline of its own."""
        await self._send(lambda: [self._begin(tensor) for tensor in tensors])

    async def broadcast_bucket(self, number: int, bucket: torch.Tensor) -> None:
        """Announce a bucket in the store under this number, and send its bytes: [nbytes] uint8 on the group's device.

        The ranks join when they have read the first announcement. The bucket before the last must have been loaded.
        Raises RuntimeError as `broadcast` does.
        """
        key, old = (f"{self.name}/bucket/{self._announced - back}" for back in (0, 2))
        self._announced += 1

        def announce() -> None:
            self._store.set(key, f"{number} {bucket.nbytes}")
            self._store.delete_key(old)  # all ranks have read it

        def announce_and_begin() -> list[Any]:
            announce()
            return [self._begin(bucket)]

        if self._group is None:
            await self._in_thread(announce)
            await self.join()
        await self._send(announce_and_begin)

    def _begin(self, tensor: torch.Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._group.broadcast([tensor], options)

    async def _send(self, begin: Callable[[], Sequence[Any]]) -> None:
        # In a thread: NCCL's first broadcast waits until the engines have joined, by calls of this event loop.
        for work in await self._in_thread(begin):
            await self._until(work.is_completed)  # NCCL's wait() ends when work is queued; gloo's can't be interrupted
            work.wait()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread, and return its result. If the group is aborted before, the thread is abandoned: NCCL
        waits for a rank that never joins, and can't be interrupted."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        await self._until(done.done)
        return done.result()

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            if self.broken is not None:
                raise RuntimeError(self.broken)
            await asyncio.sleep(POLL_SECONDS)

    def abort(self, reason: str) -> None:
        """End the broadcast that is running. The group can't be used after that."""
        if self.broken is None:
            self.broken = reason
            if self._group is not None:
                threading.Thread(target=self._group.abort, daemon=True).start()  # NCCL's abort is slow

    def close(self) -> None:
        """Leave the group, and free it."""
        if self._announced and self.broken is None and self._store is not None:
            self._store.set(f"{self.name}/bucket/{self._announced}", "")  # ranks that wait for a bucket leave too
        group, self._group, self._store = self._group, None, None
        if group is not None and self.broken is not None:
            # In a thread: gloo's shutdown waits for the broadcast that was aborted.
            threading.Thread(target=group.shutdown, daemon=True).start()
        elif group is not None:
            group.shutdown()


def hosted_store(address: str, world_size: int, seconds: float) -> tuple[Any, int]:
    """Return a store of this process that the ranks of a group meet at, and its port. Each wait in it ends after
    `seconds`. Raises OSError or RuntimeError if it can't listen at `address`."""
    # The listener that torch creates listens on all of the host's addresses.
    listener = socket.create_server((address, 0))
    port: int = listener.getsockname()[1]
    store = dist.TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def new_group(
    store: Any, name: str, device: torch.device, address: str, rank: int, world_size: int, seconds: float
) -> Any:
    """Join a group with the store keys that torch uses for a group of this name.

    address: of this host, for gloo. With gloo, waits at most `seconds` for the other ranks; with NCCL, they meet in the
    first collective. Raises RuntimeError if they do not.
    """
    for prefix in (name, f"{name}/", f"{device.type}/"):
        store = dist.PrefixStore(prefix, store)
    options: Any
    if backend_of(device) == "gloo":
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=seconds)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        return dist.ProcessGroupGloo(store, rank, world_size, options)
    return nccl_group(store, rank, world_size, seconds)


def nccl_group(store: Any, rank: int, world_size: int, seconds: float) -> Any:
    """Return a group of NCCL over a store of its own. Its users need more than `seconds` for nothing."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=2 * seconds + 60)
    with settings(NCCL_SETTINGS):
        return dist.ProcessGroupNCCL(store, rank, world_size, options)


def backend_of(device: torch.device) -> str:
    """Return torch's name of the backend for tensors on `device`."""
    return "nccl" if device.type == "cuda" else "gloo"
