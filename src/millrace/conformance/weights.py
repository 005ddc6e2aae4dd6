"""The ways by which the checks bring weights into an engine. Torch is imported where tensors are sent, not before."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.conformance.check import Lacking, Subject
from millrace.errors import EngineError
from millrace.types import Capability, DiskBucket
from millrace.weights.cast import cast, dtypes_of
from millrace.weights.folder import FolderTensors
from millrace.weights.publisher import Publish
from millrace.weights.transports.base import PublishTarget, TransportContext
from millrace.weights.transports.registry import CLASSES, create, needs

if TYPE_CHECKING:
    import torch

LOAD_DEADLINE = 120.0  # seconds; for weights of gigabytes
LARGEST_BUCKET = 256 * 1024 * 1024

# The first of them that an engine has is the one that is used where any will do.
MEMORY = (
    Capability.UPDATE_FROM_SHARED_MEMORY,
    Capability.UPDATE_FROM_CUDA_IPC,
    Capability.UPDATE_FROM_TORCH_STORAGE,
)

Way = Callable[[Subject, Path, int], Awaitable[None]]


def folders(subject: Subject) -> tuple[Path, Path]:
    """The model's folder and the one with other weights."""
    if subject.other is None:
        raise Lacking("no folder with other weights of the same shapes was given")
    return folder(subject), subject.other


def folder(subject: Subject) -> Path:
    if subject.folder is None or not subject.folder.is_dir():
        raise Lacking(f"the model's folder ({subject.folder or subject.info.model_path}) can't be read here")
    return subject.folder


async def next_version(subject: Subject) -> int:
    version = (await subject.engine.info()).weight_version
    return 1 if version is None else version + 1


def ways(subject: Subject) -> dict[str, Way]:
    """Those that this engine has."""
    can = subject.info.capabilities
    there: dict[str, Way] = {}
    if Capability.UPDATE_FROM_DISK in can:
        there["disk"] = by_disk
    if kinds := memory_kinds(subject):
        there["memory"] = partial(by_memory, kinds[0])
    if Capability.UPDATE_FROM_PROCESS_GROUP in can:
        there["process group"] = by_group
    if Capability.UPDATE_FROM_BARE_NCCL in can and "NCCL_HOSTID" in os.environ:
        there["bare NCCL"] = by_bare_nccl
    return there


def memory_kinds(subject: Subject) -> list[Capability]:
    """By which memory of a process on its host it takes tensors."""
    return [capability for capability in MEMORY if capability in subject.info.capabilities]


def one_way(subject: Subject) -> Way:
    """From disk where it can, which needs no torch here."""
    for way in ways(subject).values():
        return way
    raise Lacking("it takes weights neither from disk, nor from memory, nor from a process group")


@asynccontextmanager
async def update(subject: Subject, version: int) -> AsyncIterator[None]:
    """An open transaction. What goes wrong in it is rolled back where that is possible, and raised."""
    await subject.engine.begin_update(version)
    try:
        yield
    except BaseException:
        with suppress(EngineError):
            await subject.engine.rollback()
        raise


async def load_disk(subject: Subject, source: Path) -> None:
    await subject.engine.load(DiskBucket(str(source)), deadline=LOAD_DEADLINE)


async def by_disk(subject: Subject, source: Path, version: int) -> None:
    async with update(subject, version):
        await load_disk(subject, source)
        await subject.engine.commit()


async def by_memory(kind: Capability, subject: Subject, source: Path, version: int) -> None:
    """By the publisher, as a trainer on the engine's host does it, through memory of this kind, in several buckets."""
    if kind is Capability.UPDATE_FROM_CUDA_IPC:
        require_gpu()
    await send(kind, subject, await read_tensors(source), version)


async def by_group(subject: Subject, source: Path, version: int) -> None:
    """By the publisher, broadcast by gloo, which CPUs and GPUs have."""
    await send(Capability.UPDATE_FROM_PROCESS_GROUP, subject, await read_tensors(source), version)


async def by_bare_nccl(subject: Subject, source: Path, version: int) -> None:
    """By the publisher, from a GPU here. It may be the engine's own, which NCCL takes for two only if it is led to
    believe that they are on different hosts."""
    if "NCCL_HOSTID" not in os.environ:
        raise Lacking("NCCL does not take one GPU for two; set NCCL_HOSTID here, and to something else for the engine")
    await send(Capability.UPDATE_FROM_BARE_NCCL, subject, await read_tensors(source), version)


async def send(kind: Capability, subject: Subject, tensors: "Mapping[str, torch.Tensor]", version: int) -> None:
    """By the publisher, in several buckets, by the transport that needs this capability."""
    name = next(name for name in CLASSES if kind in needs(name))
    transport = create(name, TransportContext(capabilities=frozenset({kind})))
    size = sum(tensor.nbytes for tensor in tensors.values())

    try:
        publish = Publish(
            [PublishTarget(subject.engine, subject.info)],
            cast(tensors.items(), await asyncio.to_thread(dtypes_of, subject.info, folder(subject))),
            version,
            transport,
            bucket_bytes=min(size // 3 + 1, LARGEST_BUCKET),
            deadline=LOAD_DEADLINE,
        )
        await publish.run()
    finally:
        await transport.close()


def require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise Lacking("there is no GPU here whose memory could be shared with it")


async def read_tensors(source: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a model's folder, on the CPU."""
    try:
        return await asyncio.to_thread(lambda: dict(FolderTensors(source)))
    except ModuleNotFoundError as error:
        raise Lacking(f"{error.name} is not installed here; pip install 'millrace[train]'") from error


async def restore(subject: Subject) -> None:
    """Brings the folder's weights back, under a new version."""
    await one_way(subject)(subject, folder(subject), await next_version(subject))
