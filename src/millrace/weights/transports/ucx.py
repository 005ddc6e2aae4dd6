"""A transport for a trainer and engines on different hosts, over UCX (RDMA or TCP). It needs no process group.

The trainer keeps a bucket in memory that other hosts can read. A sidecar on each host of engines reads the bucket once,
from the trainer or from another sidecar that has it (`fan_out`). The engines of that host open the sidecar's memory in
the same way as they open the memory of a local trainer.

Memory is never overwritten or freed while it is read:

- The trainer fills a slot again after every sidecar has answered for the slot's earlier bucket. A sidecar that fails is
  left out of the rest of the publish, and its engines load nothing more from it.
- If a failed sidecar may still be reading, the trainer keeps all memory until it closes the endpoint, which ends all
  READs. It does so before the next publish, which creates a new endpoint.
- A sidecar has two slots too. It fills a slot again when the bucket after the next one is delivered. By then its
  engines have loaded the slot's earlier bucket, or have failed, and other sidecars have read it. If one of them may
  still be reading, memory is freed only when the time for that is over.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import torch

from millrace.buckets import Bucket, CudaIpcBucket, RankAnswers, TensorSpec, TorchStorageBucket
from millrace.errors import EngineError, EngineFailed, EngineTimeout, PublishError
from millrace.http.client import HttpClient
from millrace.types import Capability
from millrace.weights.sidecar.asking import ask
from millrace.weights.sidecar.messages import FORMS, Answers, AnswersBody, Form, PullBody, Pulled, Session, Source
from millrace.weights.step import StepResult
from millrace.weights.transports.base import (
    BucketTransport,
    NamedTensors,
    PublishTarget,
    StagedBucket,
    TransportContext,
)
from millrace.weights.transports.cuda_ipc import DeviceSlot
from millrace.weights.transports.fan_out import LEAST_PATIENCE, FanOut, patience_after
from millrace.weights.transports.layouts import layout_of
from millrace.weights.transports.shared_memory import MemoryFile
from millrace.weights.transports.sidecars import EngineSidecars, reason_of
from millrace.weights.transports.slots import fill
from millrace.weights.ucx import Endpoint, load

READ_SHARE = 0.9  # of a call's deadline, so that a sidecar that gives up can still answer
SHORT_DEADLINE = 5.0  # seconds, for calls that do no work

logger = logging.getLogger(__name__)


class UcxSidecar:
    """A client of the `millrace sidecar` at `url`. Its errors name the sidecar."""

    def __init__(self, url: str, key: str | None) -> None:
        self.name = f"sidecar {url}"
        self._http = HttpClient(self.name, url, api_key=key)

    async def pull(self, body: PullBody, *, deadline: float) -> Pulled:
        """Have the sidecar read a bucket, and return handles of the sidecar's copy. Raises EngineError if it fails."""
        return await ask(self._http, "/pull", body, Pulled, deadline)

    async def answers(self, body: AnswersBody, *, deadline: float) -> Sequence[bytes]:
        """Return what the ranks of an engine have written about a bucket. Raises EngineError if it can't be read."""
        return (await ask(self._http, "/answers", body, Answers, deadline)).texts

    async def holds(self, session: str) -> bool:
        """Return whether the sidecar still has the buckets of this session."""
        try:
            answer = await self._http.control("GET", "/session", deadline=SHORT_DEADLINE)
        except EngineError:
            return False
        return bool(answer == {"session": session})

    async def close(self, session: str | None, *, unread: bool) -> bool:
        """Have the sidecar free the buckets of this session. A dead sidecar has nothing to free.

        unread: whether it is certain that no other sidecar is reading them.

        Returns whether it is certain that the sidecar reads no bucket any more.
        """
        certain = True
        if session is not None:
            try:
                body = Session(session=session, unread=unread).model_dump(mode="json")
                await self._http.control("POST", "/end", body, deadline=SHORT_DEADLINE)
            except EngineError as error:
                certain = not isinstance(error, EngineTimeout)
        await self._http.close()
        return certain


@dataclass(slots=True)
class _InFlightBucket:
    """A bucket in one of the trainer's slots, and its copies on the engines' hosts.

    pulled: for each engine, its sidecar, the sidecar's answer, and the index of the engine's first share in the answer.
    """

    session: str
    slot: int
    nbytes: int
    specs: tuple[TensorSpec, ...]
    pulled: dict[str, tuple[UcxSidecar, Pulled, int]] = field(default_factory=dict)

    def bucket_for(self, target: PublishTarget) -> Bucket:
        sidecar, pulled, start = self.pulled[target.engine.name]
        ranks = target.info.ranks
        bucket = pulled.handle.bucket(self.specs, self.nbytes, start, ranks)
        if not isinstance(bucket, TorchStorageBucket | CudaIpcBucket):  # its engines answer by themselves
            return bucket
        body = AnswersBody(session=self.session, slot=self.slot, start=start, ranks=ranks)

        async def read(deadline: float) -> Sequence[bytes]:
            return await sidecar.answers(body, deadline=deadline)

        return replace(bucket, answers=RankAnswers(pulled.answers[start : start + ranks], read))


class UcxTransport(BucketTransport):
    """A transport whose buckets are read over UCX by a sidecar on each host of engines.

    sidecars: the URL of each engine's sidecar, by the engine's name.
    device: where the buckets are.
    key: the API key of the sidecars.

    Raises ConfigError if NIXL is not installed.
    """

    needs = frozenset({
        Capability.UPDATE_FROM_SHARED_MEMORY,
        Capability.UPDATE_FROM_TORCH_STORAGE,
        Capability.UPDATE_FROM_CUDA_IPC,
    })  # fmt: skip
    samples_buckets = loads_ahead = True

    @classmethod
    def create(cls, context: TransportContext) -> Self:
        sidecars = context.sidecars or {}
        urls = {engine: url for engine, url in sidecars.items() if url is not None}
        if not sidecars or len(urls) < len(sidecars):
            lacking = ", ".join(sorted(sidecars.keys() - urls.keys()))
            raise PublishError(
                f"publish.sidecars has no sidecar on the host of {lacking or 'any engine'}, and ucx needs one"
            )
        # Full checksums are computed on the CPU. If the engines are compared by them, the buckets must be there.
        on_gpu = torch.cuda.is_available() and Capability.CHECKSUMS not in context.capabilities
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return cls(urls, device, key=context.sidecar_key, spare=context.spare_sidecars)

    def __init__(
        self, sidecars: Mapping[str, str], device: torch.device, *, key: str | None, spare: Sequence[str] = ()
    ) -> None:
        load()
        self._sidecars = {url: UcxSidecar(url, key) for url in {*sidecars.values(), *spare}}
        self._sidecar_of = EngineSidecars(
            {name: self._sidecars[url] for name, url in sidecars.items()}, dict(self._sidecars.items())
        )
        self._device = device
        self._endpoint: Endpoint[MemoryFile | DeviceSlot] | None = None
        self._unread = True  # whether no sidecar can still be reading an earlier bucket
        self._staged: _InFlightBucket | None = None  # the bucket that was staged last
        self._patience = LEAST_PATIENCE  # seconds for which a sidecar waits for someone to read from
        self._direct: set[UcxSidecar] = set()  # sidecars that could not read from another one

    async def open(
        self,
        targets: Sequence[PublishTarget],
        version: int,  # noqa: ARG002
        *,
        deadline: float,  # noqa: ARG002
    ) -> Mapping[str, EngineError]:
        """Find the sidecars of engines that have joined, and take a new endpoint if a sidecar may still be reading a
        bucket of an earlier publish."""
        if self._endpoint is not None and not self._unread:
            self._endpoint.close(unread=False)
            self._endpoint = None
        self._unread = True
        return await self._sidecar_of.place(targets)

    def stage(self, tensors: NamedTensors, slot: int) -> StagedBucket:
        if self._endpoint is None:
            self._endpoint = Endpoint(self._new_slot, self._device)
        layout = layout_of(tensors)
        memory = self._endpoint.slot(slot, layout.nbytes, unread=self._unread).bytes
        checksums = fill(memory, layout, tensors)
        bucket = self._staged = _InFlightBucket(self._endpoint.name, slot, layout.nbytes, layout.specs)
        samples = partial(layout.samples_in, memory)
        return StagedBucket(bucket.bucket_for, checksums, layout.names, layout.nbytes, samples=samples)

    async def deliver(self, targets: Sequence[PublishTarget], *, deadline: float) -> Mapping[str, EngineError]:
        """Have all sidecars read the bucket. If a sidecar fails, the engines of its host fail."""
        assert self._staged is not None
        bucket, ends = self._staged, time.monotonic() + deadline
        unread, self._unread = self._unread, False  # stays False if this task is cancelled
        fan_out = FanOut(self._source(bucket), self._patience)
        at: dict[UcxSidecar, list[PublishTarget]] = {}
        for target in targets:
            at.setdefault(self._sidecar_of[target.engine.name], []).append(target)
        unreached: dict[str, EngineError] = {}

        async def pull(sidecar: UcxSidecar, here: Sequence[PublishTarget]) -> bool:
            body = partial(self._body, bucket, here, ends=ends, unread=unread)
            try:
                pulled = await self._pull(sidecar, body, fan_out, ends)
            except EngineError as error:
                for target in here:
                    name = target.engine.name
                    unreached[name] = EngineFailed(name, f"{sidecar.name} did not bring a bucket: {reason_of(error)}")
                return not isinstance(error, EngineTimeout)  # one that has answered, or is dead, reads no more
            fan_out.add(pulled.source)
            start = 0
            for target in here:
                bucket.pulled[target.engine.name] = sidecar, pulled, start
                start += target.info.ranks
            return True

        answered = await asyncio.gather(*(pull(sidecar, here) for sidecar, here in at.items()))
        self._unread = unread and all(answered)
        self._patience = patience_after(fan_out.slowest)
        return unreached

    async def _pull(
        self, sidecar: UcxSidecar, body: Callable[[Source, float], PullBody], fan_out: FanOut[Source], ends: float
    ) -> Pulled:
        """Have a sidecar read the bucket: from another one, or if that fails, from the trainer."""
        if sidecar not in self._direct:
            try:
                async with fan_out.source() as source:
                    left = ends - time.monotonic()
                    # A source may die. Then there must be time for the trainer.
                    deadline = left if source is fan_out.trainer else left / 2
                    return await sidecar.pull(body(source, deadline * READ_SHARE), deadline=deadline)
            except EngineError as error:
                if source is fan_out.trainer or not isinstance(error, EngineFailed):
                    raise
                logger.warning("%s reads from the trainer from now on: %s", sidecar.name, reason_of(error))
                self._direct.add(sidecar)
        left = ends - time.monotonic()
        return await sidecar.pull(body(fan_out.trainer, left * READ_SHARE), deadline=left)

    async def load(
        self, targets: Sequence[PublishTarget], staged: StagedBucket, *, deadline: float
    ) -> Mapping[str, StepResult]:
        """See `Transport.load`. An engine is blameless if its sidecar has died, so that it could not open the
        bucket."""
        results = await super().load(targets, staged, deadline=deadline)
        assert self._endpoint is not None
        sidecars = list({self._sidecar_of[name] for name, result in results.items() if result.error is not None})
        holding = await asyncio.gather(*(sidecar.holds(self._endpoint.name) for sidecar in sidecars))
        lost = {sidecar for sidecar, holds in zip(sidecars, holding, strict=True) if not holds}
        return {
            name: replace(result, blameless=result.error is not None and self._sidecar_of[name] in lost)
            for name, result in results.items()
        }

    async def close(self) -> None:
        session = self._endpoint.name if self._endpoint is not None else None
        ended = await asyncio.gather(
            *(sidecar.close(session, unread=self._unread) for sidecar in self._sidecars.values())
        )
        if self._endpoint is not None:
            await asyncio.to_thread(self._endpoint.close, unread=all(ended))
            self._endpoint = None

    def _source(self, bucket: _InFlightBucket) -> Source:
        assert self._endpoint is not None
        region = self._endpoint.region(bucket.slot)
        return Source(agent=self._endpoint.metadata(), address=region.address, gpu=region.gpu)

    def _body(
        self,
        bucket: _InFlightBucket,
        here: Sequence[PublishTarget],
        source: Source,
        seconds: float,
        *,
        ends: float,
        unread: bool,
    ) -> PullBody:
        return PullBody(
            session=bucket.session,
            source=source,
            slot=bucket.slot,
            nbytes=bucket.nbytes,
            form=_form(here),
            shares=sum(target.info.ranks for target in here),
            seconds=max(seconds, 0.001),
            readable=max(ends - time.monotonic(), 0.001),
            unread=unread,
        )

    def _new_slot(self, size: int) -> MemoryFile | DeviceSlot:
        # A memory file allocates its memory at once, or fails at once.
        return DeviceSlot(size, self._device) if self._device.type == "cuda" else MemoryFile(size)


def _form(engines: Sequence[PublishTarget]) -> Form:
    """Return a form of memory that all of these engines can open. Raises PublishError if there is none."""
    for capability, form in FORMS.items():
        if all(engine.can(capability) for engine in engines):
            return form
    names = ", ".join(engine.engine.name for engine in engines)
    raise PublishError(f"{names} share one sidecar, and there is no form of memory that all of them can open")
