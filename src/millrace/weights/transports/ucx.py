"""Trainer and engines on different hosts, without a process group: the trainer keeps a bucket where others can read it,
and a sidecar on each host of engines reads it over UCX (RDMA, or TCP), once for all engines there, which open the
sidecar's memory as they would a local trainer's.

Nothing is overwritten or freed under a reader. A slot here is filled again when every sidecar has answered for what it
held, or is out of this publish: its engines load nothing more of what it reads. After a sidecar of which nobody knows
whether it reads still, no memory is freed before the endpoint is closed, which ends all READs; that happens before the
next publish, which begins with another. A slot of a sidecar's is filled again when the next but one bucket is
delivered, and its engines have loaded what it held by then, or have failed.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import orjson
import torch
from pydantic import ValidationError

from millrace.engines.base import Engine
from millrace.errors import EngineError, EngineFailed, PublishError
from millrace.http.client import HttpClient
from millrace.types import Bucket, Capability, TensorSpec
from millrace.weights.plan import padded
from millrace.weights.sidecar.messages import FORMS, Form, PullBody, Pulled, Session
from millrace.weights.transports.base import (
    BucketTransport,
    NamedTensors,
    PublishTarget,
    StagedBucket,
    TransportContext,
    specs_of,
)
from millrace.weights.transports.cuda_ipc import DeviceSlot, copy_on_gpu
from millrace.weights.transports.shared_memory import MemoryFile
from millrace.weights.transports.sidecars import reason_of
from millrace.weights.transports.slots import copy_to_host
from millrace.weights.ucx import Endpoint, load

READ_SHARE = 0.9  # of a call's deadline: a sidecar that gives up in time can still say so
WORD_DEADLINE = 5.0  # seconds, for what takes no time


class UcxSidecar:
    """`millrace sidecar` at `url`. Errors name it."""

    def __init__(self, url: str, key: str | None) -> None:
        self.name = f"sidecar {url}"
        self._http = HttpClient(self.name, url, api_key=key)

    async def pull(self, body: PullBody, *, deadline: float) -> Pulled:
        """Raises EngineError where the bucket did not come."""
        answer = await self._http.control("POST", "/pull", body.model_dump(mode="json"), deadline=deadline)
        try:
            return Pulled.model_validate_json(orjson.dumps(answer))
        except ValidationError as error:
            raise EngineFailed(self.name, f"it answered {answer!r}") from error

    async def holds(self, session: str) -> bool:
        """Whether it still has what it has read for it."""
        try:
            answer = await self._http.control("GET", "/session", deadline=WORD_DEADLINE)
        except EngineError:
            return False
        return bool(answer == {"session": session})

    async def close(self, session: str | None) -> None:
        """Has the sidecar free what it has of the session. One that is dead has nothing to free."""
        if session is not None:
            with suppress(EngineError):
                body = Session(session=session).model_dump(mode="json")
                await self._http.control("POST", "/end", body, deadline=WORD_DEADLINE)
        await self._http.close()


@dataclass(slots=True)
class _Cargo:
    """A bucket in the trainer's slot, and what has come of it on the engines' hosts: for each engine, what its sidecar
    answered, and which of the answer's shares is the engine's first."""

    slot: int
    nbytes: int
    specs: tuple[TensorSpec, ...]
    arrived: dict[str, tuple[Pulled, int]] = field(default_factory=dict)

    def bucket_for(self, target: PublishTarget) -> Bucket:
        pulled, start = self.arrived[target.engine.name]
        return pulled.handle.bucket(self.specs, self.nbytes, start, target.info.ranks)


class UcxTransport(BucketTransport):
    """A sidecar on each host of engines reads buckets from `device` over UCX. `sidecars`: the URL of each engine's, by
    the engine's name. Raises ConfigError without NIXL."""

    needs = frozenset({
        Capability.UPDATE_FROM_SHARED_MEMORY,
        Capability.UPDATE_FROM_TORCH_STORAGE,
        Capability.UPDATE_FROM_CUDA_IPC,
    })  # fmt: skip

    @classmethod
    def create(cls, context: TransportContext) -> Self:
        sidecars = context.sidecars or {}
        urls = {engine: url for engine, url in sidecars.items() if url is not None}
        if not sidecars or len(urls) < len(sidecars):
            lacking = ", ".join(sorted(sidecars.keys() - urls.keys()))
            raise PublishError(f"publish.sidecars names none on the host of {lacking or 'any engine'}, which ucx takes")
        # Checksums of all bytes are made on the CPU, so the bytes must be there for engines that are compared by them.
        on_gpu = torch.cuda.is_available() and Capability.CHECKSUMS not in context.capabilities
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return cls(urls, device, key=context.sidecar_key)

    def __init__(self, sidecars: Mapping[str, str], device: torch.device, *, key: str | None) -> None:
        load()
        self._sidecars = {url: UcxSidecar(url, key) for url in set(sidecars.values())}
        self._sidecar_of = {engine: self._sidecars[url] for engine, url in sidecars.items()}
        self._device = device
        self._endpoint: Endpoint[MemoryFile | DeviceSlot] | None = None
        self._unread = True  # no sidecar can be reading what it was asked to read before
        self._cargo: _Cargo | None = None  # what was staged last

    async def open(
        self,
        targets: Sequence[PublishTarget],  # noqa: ARG002 (asked when there is something to pull)
        version: int,  # noqa: ARG002
        *,
        deadline: float,  # noqa: ARG002
    ) -> Mapping[str, EngineError]:
        """Ends what an earlier publish may have left half read."""
        if self._endpoint is not None and not self._unread:
            await asyncio.to_thread(self._endpoint.close)
            self._endpoint = None
        self._unread = True
        return {}

    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:
        if self._endpoint is None:
            self._endpoint = Endpoint(self._new_slot, self._device)
        specs = specs_of(tensors)
        nbytes = specs[-1].offset + padded(specs[-1].nbytes)
        memory = self._endpoint.slot(slot, nbytes, unread=self._unread).bytes
        checksums: dict[str, str] = {}
        if self._device.type == "cpu":
            checksums = copy_to_host(tensors, specs, memory)
        else:
            copy_on_gpu(tensors, specs, memory)
        cargo = self._cargo = _Cargo(slot, nbytes, specs)
        return StagedBucket(cargo.bucket_for, checksums, tuple(spec.name for spec in specs), nbytes)

    async def deliver(self, targets: Sequence[PublishTarget], *, deadline: float) -> Mapping[str, EngineError]:
        """By all sidecars at once. What one of them can't do fails the engines of its host."""
        assert self._cargo is not None
        cargo = self._cargo
        at: dict[UcxSidecar, list[PublishTarget]] = {}
        for target in targets:
            at.setdefault(self._sidecar_of[target.engine.name], []).append(target)
        unreached: dict[str, EngineError] = {}

        async def pull(sidecar: UcxSidecar, here: Sequence[PublishTarget]) -> bool:
            try:
                pulled = await sidecar.pull(self._body(cargo, here, deadline * READ_SHARE), deadline=deadline)
            except EngineError as error:
                for target in here:
                    name = target.engine.name
                    unreached[name] = EngineFailed(name, f"{sidecar.name} did not bring a bucket: {reason_of(error)}")
                return False
            start = 0
            for target in here:
                cargo.arrived[target.engine.name] = pulled, start
                start += target.info.ranks
            return True

        before, self._unread = self._unread, False  # as it stays where this is cancelled
        answered = await asyncio.gather(*(pull(sidecar, here) for sidecar, here in at.items()))
        self._unread = before and all(answered)
        return unreached

    async def send(self, staged: StagedBucket) -> None:  # noqa: ARG002 (the sidecars have it)
        return

    async def collateral(self, failed: Sequence[Engine]) -> set[str]:
        """Those that could not open what their sidecar had read, since it has died meanwhile."""
        if self._endpoint is None:
            return set()
        sidecars = list({self._sidecar_of[engine.name] for engine in failed})
        holding = await asyncio.gather(*(sidecar.holds(self._endpoint.name) for sidecar in sidecars))
        lost = {sidecar for sidecar, holds in zip(sidecars, holding, strict=True) if not holds}
        return {engine.name for engine in failed if self._sidecar_of[engine.name] in lost}

    async def close(self) -> None:
        session = self._endpoint.name if self._endpoint is not None else None
        await asyncio.gather(*(sidecar.close(session) for sidecar in self._sidecars.values()))
        if self._endpoint is not None:
            await asyncio.to_thread(self._endpoint.close)
            self._endpoint = None

    def _body(self, cargo: _Cargo, here: Sequence[PublishTarget], seconds: float) -> PullBody:
        assert self._endpoint is not None
        region = self._endpoint.region(cargo.slot)
        return PullBody(
            session=self._endpoint.name,
            agent=self._endpoint.metadata(),
            slot=cargo.slot,
            address=region.address,
            nbytes=cargo.nbytes,
            gpu=region.gpu,
            form=_form(here),
            shares=sum(target.info.ranks for target in here),
            seconds=max(seconds, 0.001),
        )

    def _new_slot(self, size: int) -> MemoryFile | DeviceSlot:
        # A memory file, since its memory is taken at once, or not at all.
        return DeviceSlot(size, self._device) if self._device.type == "cuda" else MemoryFile(size)


def _form(engines: Sequence[PublishTarget]) -> Form:
    """What all of one host's engines open. Raises PublishError where there is nothing."""
    for capability, form in FORMS.items():
        if all(engine.can(capability) for engine in engines):
            return form
    names = ", ".join(engine.engine.name for engine in engines)
    raise PublishError(f"{names} have one sidecar, and open no memory in a form common to all of them")
