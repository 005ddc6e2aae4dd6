"""The ways in which the checks load weights into an engine. Torch is imported only by functions that send tensors."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.buckets import DiskBucket
from millrace.conformance.check import Lacking, Subject
from millrace.errors import EngineError
from millrace.types import Capability
from millrace.weights.cast import cast, dtypes_of
from millrace.weights.folder import FolderTensors
from millrace.weights.publisher import Publish
from millrace.weights.source import source_of
from millrace.weights.transports.base import PublishTarget, Transport, TransportContext
from millrace.weights.transports.registry import CLASSES, create, needs

if TYPE_CHECKING:
    import torch

LOAD_DEADLINE = 120.0  # seconds; enough for gigabytes of weights
LARGEST_BUCKET = 256 * 1024 * 1024

# In order of preference: checks for which any of them will do use the first that the engine has.
MEMORY = (
    Capability.UPDATE_FROM_SHARED_MEMORY,
    Capability.UPDATE_FROM_CUDA_IPC,
    Capability.UPDATE_FROM_TORCH_STORAGE,
)

Way = Callable[[Subject, Path, int], Awaitable[None]]


def folders(subject: Subject) -> tuple[Path, Path]:
    """Return the model's folder and the folder with other weights. Raises Lacking if one of them is missing."""
    if subject.other is None:
        raise Lacking("no folder with other weights of the same shapes was given")
    return folder(subject), subject.other


def folder(subject: Subject) -> Path:
    """Return the model's folder. Raises Lacking if this process can't read it."""
    if subject.folder is None or not subject.folder.is_dir():
        raise Lacking(f"the model's folder ({subject.folder or subject.info.model_path}) can't be read here")
    return subject.folder


async def next_version(subject: Subject) -> int:
    """Return the version after the one that the engine serves."""
    version = (await subject.engine.info()).weight_version
    return 1 if version is None else version + 1


def ways(subject: Subject) -> dict[str, Way]:
    """Return the ways that this engine supports, by name."""
    can = subject.info.capabilities
    supported: dict[str, Way] = {}
    if Capability.UPDATE_FROM_DISK in can:
        supported["disk"] = by_disk
    if kinds := memory_kinds(subject):
        supported["memory"] = partial(by_memory, kinds[0])
    if Capability.UPDATE_FROM_PROCESS_GROUP in can:
        supported["process group"] = by_group
    if Capability.WHOLE_BROADCASTS in can:
        supported["whole broadcasts"] = by_whole_broadcasts
    if Capability.UPDATE_FROM_BARE_NCCL in can and "NCCL_HOSTID" in os.environ:
        supported["bare NCCL"] = by_bare_nccl
    return supported


def memory_kinds(subject: Subject) -> list[Capability]:
    """Return the kinds of memory, shared with a process on its host, from which the engine can load tensors."""
    return [capability for capability in MEMORY if capability in subject.info.capabilities]


def one_way(subject: Subject) -> Way:
    """Return the first way that the engine supports. It is the disk if possible, which needs no torch here."""
    for way in ways(subject).values():
        return way
    raise Lacking("the engine loads weights neither from disk, nor from memory, nor from a process group")


@asynccontextmanager
async def update(subject: Subject, version: int) -> AsyncIterator[None]:
    """Begin an update. An error in the block is raised after a rollback, if the engine can roll back."""
    await subject.engine.begin_update(version)
    try:
        yield
    except BaseException:
        with suppress(EngineError):
            await subject.engine.rollback()
        raise


async def load_disk(subject: Subject, source: Path) -> None:
    """Load the weights of a folder in the open update."""
    await subject.engine.load(DiskBucket(str(source)), deadline=LOAD_DEADLINE)


def transport_for(kind: Capability) -> Transport:
    """Return a new transport whose buckets an engine with this capability can load."""
    name = next(name for name in CLASSES if kind in needs(name))
    return create(name, TransportContext(capabilities=frozenset({kind})))


async def load_memory(subject: Subject, tensors: "Mapping[str, torch.Tensor]") -> None:
    """Load tensors in the open update, in one bucket in memory. Raises Lacking if the engine can't load from memory."""
    kinds = memory_kinds(subject)
    if not kinds:
        raise Lacking("the engine can't load tensors from memory")
    if kinds[0] is Capability.UPDATE_FROM_CUDA_IPC:
        require_gpu()
    transport, target = transport_for(kinds[0]), PublishTarget(subject.engine, subject.info)
    try:
        await transport.open([target], 0, deadline=LOAD_DEADLINE)
        for staged in transport.staged(iter([list(tensors.items())])):
            await subject.engine.load(staged.bucket_for(target), deadline=LOAD_DEADLINE)
    finally:
        await transport.close()


async def by_disk(subject: Subject, source: Path, version: int) -> None:
    """Update the engine to the weights of a folder, which it loads from disk."""
    async with update(subject, version):
        await load_disk(subject, source)
        await subject.engine.commit()


async def by_memory(kind: Capability, subject: Subject, source: Path, version: int) -> None:
    """Publish the weights in several buckets through memory of this kind, like a trainer on the engine's host."""
    if kind is Capability.UPDATE_FROM_CUDA_IPC:
        require_gpu()
    await send(kind, subject, await read_tensors(source), version)


async def by_group(subject: Subject, source: Path, version: int) -> None:
    """Publish the weights by gloo broadcasts of single tensors, which work on CPUs and GPUs."""
    await send(Capability.UPDATE_FROM_PROCESS_GROUP, subject, await read_tensors(source), version)


async def by_whole_broadcasts(subject: Subject, source: Path, version: int) -> None:
    """Publish the weights by gloo broadcasts of whole buckets."""
    await send(Capability.WHOLE_BROADCASTS, subject, await read_tensors(source), version)


async def by_bare_nccl(subject: Subject, source: Path, version: int) -> None:
    """Publish the weights from a GPU of this process by an NCCL broadcast.

    It may be the engine's own GPU. NCCL accepts one GPU twice only if NCCL_HOSTID makes the two processes look like
    different hosts.
    """
    if "NCCL_HOSTID" not in os.environ:
        raise Lacking("NCCL does not use one GPU twice; set NCCL_HOSTID here, and to another value for the engine")
    await send(Capability.UPDATE_FROM_BARE_NCCL, subject, await read_tensors(source), version)


async def send(kind: Capability, subject: Subject, tensors: "Mapping[str, torch.Tensor]", version: int) -> None:
    """Publish tensors in several buckets, with the transport that needs this capability."""
    transport = transport_for(kind)
    size = sum(tensor.nbytes for tensor in tensors.values())

    try:
        publish = Publish(
            [PublishTarget(subject.engine, subject.info)],
            cast(source_of(tensors.items()), await asyncio.to_thread(dtypes_of, subject.info, folder(subject))),
            version,
            transport,
            bucket_bytes=min(size // 3 + 1, LARGEST_BUCKET),
            deadline=LOAD_DEADLINE,
        )
        await publish.run()
    finally:
        await transport.close()


def require_gpu() -> None:
    """Raise Lacking if torch has no GPU in this process."""
    import torch

    if not torch.cuda.is_available():
        raise Lacking("this process has no GPU whose memory it could share with the engine")


async def read_tensors(source: Path) -> "dict[str, torch.Tensor]":
    """Return the tensors of a model's folder, on the CPU. Raises Lacking if torch is not installed."""
    try:
        return await asyncio.to_thread(lambda: dict(FolderTensors(source)))
    except ModuleNotFoundError as error:
        raise Lacking(f"{error.name} is not installed here; pip install 'millrace[train]'") from error


async def restore(subject: Subject) -> None:
    """Load the model's folder again, as a new version."""
    await one_way(subject)(subject, folder(subject), await next_version(subject))
