"""A transport for a trainer and engines on the GPUs of one host: the engines open its memory by CUDA IPC and copy from
it.

A tensor is copied into the bucket on the trainer's GPU, and out of the bucket on the engine's. The engines' weights are
in memory that other GPUs may not access (torch_memory_saver, vLLM's sleep mode), so each GPU with a rank of an engine
has a bucket: a copy of the trainer's, from GPU to GPU. Torch counts how often a share (`_share_cuda_`) is opened, so
every rank of every engine gets its own share, for one use. The trainer does not wait until its own bucket is full: a
share contains a CUDA event, which the process that opens it waits for.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import torch

from millrace.buckets import CudaIpcBucket, CudaIpcShare, TensorSpec
from millrace.errors import EngineError, EngineRefused, PublishError
from millrace.types import Capability
from millrace.weights.transports.base import NamedTensors, PublishTarget, StagedBucket, TransportContext
from millrace.weights.transports.gpus import VisibleGpus, why_unseen
from millrace.weights.transports.layouts import BucketLayout
from millrace.weights.transports.slots import MemoryTransport


class DeviceSlot:
    """One allocation on a GPU. Raises PublishError if there is no room."""

    def __init__(self, size: int, device: torch.device) -> None:
        try:
            self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise PublishError(
                f"no {size / 2**20:.0f} MiB on {device} for a bucket; lower publish.bucket_bytes"
            ) from error

    def share(self) -> CudaIpcShare:
        """Return a handle of the memory, for one process to open once."""
        storage = self.bytes.untyped_storage()
        _, handle, nbytes, offset, counter, counter_offset, event, sync = storage._share_cuda_()  # type: ignore[no-untyped-call]
        uuid = str(torch.cuda.get_device_properties(self.bytes.device).uuid)
        return CudaIpcShare(uuid, handle, nbytes, offset, counter, counter_offset, event, sync)

    def close(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)


class CopiedSlot:
    """Memory on the trainer's GPU (`bytes`), and copies of it on other GPUs. Raises PublishError if there is no
    room."""

    def __init__(self, size: int, home: torch.device) -> None:
        own = DeviceSlot(size, home)
        self.bytes = own.bytes
        self._on = {home: own}
        self._filled: torch.cuda.Event | None = None  # after the last copy into `bytes`

    def copy_to(self, gpus: Iterable[torch.device], nbytes: int) -> None:
        """Copy the first `nbytes` bytes to each of these GPUs, after what the current stream does before, and wait for
        the copies to other GPUs.

        Raises PublishError if there is no room.
        """
        others = [gpu for gpu in gpus if gpu != self.bytes.device]
        for gpu in others:
            if gpu not in self._on:
                self._on[gpu] = DeviceSlot(self.bytes.nbytes, gpu)
            self._on[gpu].bytes[:nbytes].copy_(self.bytes[:nbytes], non_blocking=True)
        for gpu in others:
            torch.cuda.current_stream(gpu).synchronize()  # it waits for the copy, which the source's stream makes
        self._filled = torch.cuda.current_stream(self.bytes.device).record_event()

    def share(self, gpu: torch.device) -> CudaIpcShare:
        """Return a handle of the memory on this GPU, for one process to open once, after `copy_to`."""
        if gpu == self.bytes.device and self._filled is not None:
            # Another thread has filled it. The share's own event, in this thread's stream, comes after that.
            torch.cuda.current_stream(gpu).wait_event(self._filled)
        return self._on[gpu].share()

    def close(self) -> None:
        for slot in self._on.values():
            slot.close()
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._on.clear()


class CudaIpcTransport(MemoryTransport[CopiedSlot]):
    """A transport whose buckets are in GPU memory, which engines open by CUDA IPC.

    device: where the buckets are filled, unless the first of them has tensors on another GPU. `create` may run in
    another thread than the trainer's, whose current device is another one.
    """

    needs = frozenset({Capability.UPDATE_FROM_CUDA_IPC})

    @classmethod
    def create(cls, context: TransportContext) -> Self:  # noqa: ARG003
        return cls(torch.device("cuda", torch.cuda.current_device()))

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._home = device
        self._gpus: dict[str, tuple[torch.device, ...]] = {}  # of each rank, by the engine's name; empty: unknown

    async def open(
        self,
        targets: Sequence[PublishTarget],
        version: int,  # noqa: ARG002
        *,
        deadline: float,  # noqa: ARG002
    ) -> Mapping[str, EngineError]:
        """Find the GPU of each rank. Return an error for each engine on a GPU that this process does not see."""
        visible, unreached = VisibleGpus.here(), dict[str, EngineError]()
        self._gpus = {}
        for target in targets:
            name, gpus = target.engine.name, target.info.gpus
            if unseen := visible.unseen(gpus):
                unreached[name] = EngineRefused(name, why_unseen("it", unseen))
            else:
                self._gpus[name] = tuple(torch.device("cuda", index) for index in visible.indices(gpus))
        return unreached

    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:
        if not self._slots:
            self._home = next((tensor.device for _, tensor in tensors if tensor.is_cuda), self._home)
        staged = super().stage(tensors, slot)
        self._slots[slot].copy_to({gpu for gpus in self._gpus.values() for gpu in gpus}, staged.nbytes)
        return staged

    def _new_slot(self, size: int) -> CopiedSlot:
        return CopiedSlot(size, self._home)

    def _copy(self, tensors: NamedTensors, layout: BucketLayout, target: torch.Tensor) -> dict[str, str]:
        layout.pack_on_gpu(tensors, target)
        return {}

    def _bucket(
        self, slot: CopiedSlot, specs: tuple[TensorSpec, ...], nbytes: int, target: PublishTarget
    ) -> CudaIpcBucket:
        gpus = self._gpus.get(target.engine.name) or (self._home,) * target.info.ranks
        return CudaIpcBucket(tuple(slot.share(gpu) for gpu in gpus), nbytes, specs)

    async def close(self) -> None:
        await super().close()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
