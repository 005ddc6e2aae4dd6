"""The adapter for stock SGLang."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from urllib.parse import urlsplit

from millrace.buckets import (
    Bucket,
    CudaIpcBucket,
    DiskBucket,
    ProcessGroup,
    ProcessGroupBucket,
    TensorSpec,
    TorchStorageBucket,
)
from millrace.engines.audit import HeldLayer, WeightSample
from millrace.engines.http_engine import ABORT_DEADLINE, IDLE_POLL_SECONDS, MEMORY_DEADLINE
from millrace.engines.sglang.facts import SGLangFacts, kept_after_flush, read_facts
from millrace.engines.sglang.guards import check_request
from millrace.engines.sglang.loading import LOADER, MISSING_LOADER
from millrace.engines.sglang.payload import payloads
from millrace.engines.sglang.weight_loader import WeightLoader
from millrace.engines.sglang_wire import (
    PAUSE_MODES,
    decode_generate,
    decode_loads,
    distributed_body,
    encode_generate,
    group_body,
    wire_id,
)
from millrace.engines.stock.engine import StockEngine
from millrace.engines.stock.images import data_url
from millrace.engines.stock.parts import NeededParts
from millrace.engines.stock.state import InvalidStateError, ServerState
from millrace.engines.stock.tensors import checksums_by_rank
from millrace.engines.versions import decode_version
from millrace.errors import EngineFailed, EngineRefused, EngineTimeout, EngineUnreachable
from millrace.http import HttpClient
from millrace.http.hosts import is_loopback
from millrace.types import Capability, EngineInfo, EngineLoad, GenerateRequest, Generation, MemoryTag, PauseMode

IDLE_DEADLINE = 10.0  # seconds in which a rank without requests is idle
PAUSE_DEADLINE = 60.0  # seconds; it waits for the requests of other clients to end
logger = logging.getLogger(__name__)

WITHOUT_FLUSH = {"flush_cache": False, "abort_all_requests": False}  # the adapter did both before


def encode(request: GenerateRequest, *, stream: bool = False, experts: bool = False) -> Mapping[str, object]:
    """Return the body of POST /generate, with the request's images. experts: whether to ask for the routed experts."""
    body = encode_generate(request, stream=stream, experts=experts)
    if not request.images:
        return body
    return {**body, "image_data": [data_url(image) for image in request.images], "return_prompt_token_ids": True}


class SGLangEngine(StockEngine[SGLangFacts]):
    """One SGLang server."""

    _has_ordered = False  # whether the weight loader has done anything
    _session: bool | None = None  # whether the server has an update session open; None: unknown

    async def initialize(self, version: int | None = None) -> None:
        # /freeze_gc excludes the objects made at startup from garbage collection. On the CPU every cache flush runs the
        # collector, which takes half a second without it.
        await self._resume_server()
        await self._control("/freeze_gc", {}, repeatable=True)
        if version is None:
            await self._attach()

    async def flush_cache(self, *, deadline: float = 30.0) -> None:
        end, path = time.monotonic() + deadline, "/flush_cache"
        if (await self._facts()).caches > 1:
            # SGLang returns the answer of only one data-parallel rank. So no rank may have a request before, and each
            # waits until its last step has ended.
            while (load := await self.loads()).running_requests + load.waiting_requests:
                if time.monotonic() + IDLE_POLL_SECONDS >= end:
                    raise EngineTimeout(self.name, f"{path}: requests still ran after {deadline:.0f} s")
                await asyncio.sleep(IDLE_POLL_SECONDS)
            path += f"?timeout={IDLE_DEADLINE:.0f}"
        await self._retry_until_idle(path, {}, end - time.monotonic())

    async def leave_group(self, name: str) -> None:
        if not self._weight_loader.leave(name):
            await self._control("/destroy_weights_update_group", {"group_name": name})

    async def checksums(self) -> Mapping[str, str]:
        """Return SGLang's own digests of the tensors as each rank holds them, fused and sharded.

        Names begin with the rank.
        """
        async with self._control_call():
            body = await self._control("/weights_checker", {"action": "checksum"}, repeatable=True)
        return checksums_by_rank(body["ranks"])

    async def sampled_checksums(self) -> Mapping[str, str]:
        if Capability.SAMPLED_CHECKSUMS not in (await self._facts()).info.capabilities:
            raise EngineRefused(self.name, "it does not have Millrace's weight loader, which makes the checksums")
        if self.state.updating is None:
            raise EngineRefused(self.name, "no update is open; sampled checksums are of an update's tensors")
        return self._weight_loader.samples

    async def needed_parts(
        self, tensors: Sequence[TensorSpec], *, deadline: float, group: str | None = None
    ) -> NeededParts:
        info = (await self._facts()).info
        if Capability.UPDATE_FROM_PARTS not in info.capabilities:
            raise EngineRefused(self.name, "it does not have Millrace's weight loader, which takes parts of tensors")
        known = self._weight_loader.known_needs(tensors, group)
        if known is None:
            torn = self.state.torn
            await self.begin_update(0)  # the server takes no order outside of an update
            try:
                async with self._control_call():
                    known = await self._weight_loader.ask_needs(tensors, info.ranks, group, deadline)
            finally:
                try:
                    await self.rollback()
                except EngineRefused:
                    if not torn:  # otherwise the weights are as they were: not whole
                        raise
        return known

    async def audit(
        self, samples: Sequence[WeightSample], *, deadline: float
    ) -> tuple[Sequence[HeldLayer], Sequence[int]] | None:
        if not self._here:
            return None
        async with self._control_call():
            return await self._weight_loader.audit(samples, (await self._facts()).info.ranks, deadline)

    async def close(self) -> None:
        self._weight_loader.close()
        await super().close()

    async def loads(self) -> EngineLoad:
        body = await self._ask("/v1/loads")
        return self._decode("/v1/loads", lambda: decode_loads(body))

    async def info(self) -> EngineInfo:
        facts = await self._facts()
        model = await self._ask("/model_info")
        return replace(
            facts.info, model_path=model["model_path"], weight_version=decode_version(model["weight_version"])
        )

    async def _generate(
        self, by: HttpClient, request: GenerateRequest, deadline: float, headers: Mapping[str, str] | None = None
    ) -> Generation:
        experts = (await self._facts()).experts if by is self._http else None  # a router drops what asks for them
        sent = encode(request, experts=experts is not None)
        body = await by.generate("/generate", sent, deadline=deadline, headers=headers)
        return self._decode_generation("/generate", lambda: decode_generate(request, body, experts))

    async def _stream(self, request: GenerateRequest, deadline: float) -> AsyncIterator[tuple[Generation, bool]]:
        experts = (await self._facts()).experts
        sent = encode(request, stream=True, experts=experts is not None)
        async for event in self._events("/generate", sent, deadline):
            made = self._decode_generation("/generate", partial(decode_generate, request, event, experts))
            yield made, event["meta_info"]["finish_reason"] is not None

    async def _detokenize(self, tokens: Sequence[int], deadline: float) -> str:
        body = {"tokens": tokens, "skip_special_tokens": False}
        answer = await self._http.generate("/v1/detokenize", body, deadline=deadline)
        return self._decode("/v1/detokenize", lambda: str(answer["text"]))

    async def _abort(self, names: Sequence[str]) -> None:
        for name in names:
            await self._control("/abort_request", {"rid": wire_id(name)}, deadline=ABORT_DEADLINE, repeatable=True)
        await self._until_aborted()

    async def _abort_all(self, names: Sequence[str]) -> None:  # noqa: ARG002
        await self._control("/abort_request", {"abort_all": True}, repeatable=True)
        await self._until_aborted()

    async def _until_aborted(self) -> None:
        """Wait until the scheduler of each data-parallel rank has handled the aborts sent so far.

        With `enable_dp_attention`, a scheduler reads between two steps what has arrived, and handles requests for
        tokens before aborts. So an abort would also end a request that came after it. Schedulers answer /server_info,
        in turn with aborts.
        """
        if (await self._facts()).caches > 1:
            await self._ask("/server_info")

    async def _pause_server(self, mode: PauseMode) -> None:
        if mode is PauseMode.ABORT:
            # Abort first: SGLang's own pause checks only once a second whether all requests have ended.
            await self._abort_until_ended(self._calls.sent, self._abort_all)
        await self._control("/pause_generation", {"mode": PAUSE_MODES[mode]}, deadline=PAUSE_DEADLINE, repeatable=True)

    async def _resume_server(self) -> None:
        await self._control("/continue_generation", {}, repeatable=True)

    async def _release(self, before: ServerState, after: ServerState) -> None:
        tags = sorted(after.asleep - before.asleep)
        await self._control("/release_memory_occupation", {"tags": tags}, deadline=MEMORY_DEADLINE)

    async def _reallocate(self, what: frozenset[MemoryTag]) -> None:
        # Not repeatable: allocating a tag twice kills the server.
        await self._control("/resume_memory_occupation", {"tags": sorted(what)}, deadline=MEMORY_DEADLINE)

    async def _open_update(self) -> None:
        self._weight_loader.begin()
        if Capability.UPDATE_SESSION in (await self._facts()).info.capabilities:
            self._session = None  # unknown until the answer arrives
            await self._control("/begin_weight_update", {})
            self._session = True

    def _loader(self, bucket: Bucket, facts: SGLangFacts) -> Callable[[float], Awaitable[None]]:
        has_loader = Capability.SAMPLED_CHECKSUMS in facts.info.capabilities
        if has_loader and (load := self._weight_loader.loading(bucket, facts.info.ranks)) is not None:
            return load
        body: Mapping[str, object]
        match bucket:
            case CudaIpcBucket() | TorchStorageBucket():
                path = "/update_weights_from_tensor"
                shares = payloads(bucket, facts.info.ranks)
                body = {"serialized_named_tensors": shares, "load_format": "flattened_bucket"}
            case ProcessGroupBucket():
                path, body = "/update_weights_from_distributed", distributed_body(bucket)
            case DiskBucket():
                return partial(
                    self._load_folder, bucket.for_holder_of(self._holds), facts.info.ranks if has_loader else 0
                )
            case _:
                raise InvalidStateError(f"it can't open a {type(bucket).__name__}; send the tensors by torch storage")

        async def send(deadline: float) -> None:
            await self._control(path, {**body, **WITHOUT_FLUSH}, deadline=deadline)

        return send

    async def _load_folder(self, bucket: DiskBucket, ranks: int, deadline: float) -> None:
        """Have the server read a folder, or its weight loader write only what has changed, if it holds the version
        before. The loader then compares the parameters with the folder. ranks: with the loader."""
        ends, changes = time.monotonic() + deadline, self._weight_loader.changes(bucket)
        if changes is None:
            body = {"model_path": bucket.path, **WITHOUT_FLUSH}
            await self._control("/update_weights_from_disk", body, deadline=deadline)
        if ranks:
            await self._weight_loader.compare_folder(bucket, changes, ranks, ends - time.monotonic())

    @asynccontextmanager
    async def _control_call(self, *, beside_loads: bool = False) -> AsyncIterator[None]:
        async with super()._control_call(beside_loads=beside_loads):
            if not beside_loads:
                self._weight_loader.orders.release()
            yield

    @cached_property
    def _weight_loader(self) -> WeightLoader:
        return WeightLoader(self.name, self._order, here=self._here)

    @property
    def _here(self) -> bool:
        """Whether the server runs on this host."""
        return is_loopback(str(urlsplit(self.url).hostname))

    async def _order(self, shares: Sequence[str], deadline: float) -> None:
        """Send an order to the weight loader of each rank by HTTP."""
        body = {"serialized_named_tensors": shares, "load_format": LOADER, **WITHOUT_FLUSH}
        try:
            await self._control("/update_weights_from_tensor", body, deadline=deadline)
        except EngineUnreachable as error:
            if not self._attached or self._has_ordered:
                raise
            raise EngineUnreachable(self.name, MISSING_LOADER, sent=error.sent) from error
        self._has_ordered = True

    async def _commit(self, version: int) -> None:
        if missing := self._weight_loader.missing:
            raise InvalidStateError(missing)
        ending = asyncio.create_task(self._weight_loader.orders.end())
        try:
            await self._end_session()
            body = {"new_version": str(version), "abort_all_requests": False}
            await self._control("/update_weight_version", body)
        finally:
            await ending

    async def _abort_update(self) -> None:
        await self._weight_loader.orders.end()
        try:
            await self._end_session()
        except EngineRefused:  # another client has ended the session
            self._session = False

    async def _end_session(self) -> None:
        """End the update session. Raises EngineRefused if it is known to be open, and the server has none."""
        if self._session is False:
            return
        try:
            await self._control("/end_weight_update", {})
        except EngineRefused:
            if self._session is not None:
                raise  # otherwise no session was open
        self._session = False

    async def _load_lora(self, name: str, path: str, deadline: float) -> None:
        body = await self._control("/load_lora_adapter", {"lora_name": name, "lora_path": path}, deadline=deadline)
        if (body["loaded_adapters"] or {}).get(name) != path:
            raise EngineFailed(
                self.name, f"it did not load the LoRA adapter {name} from {path}; loaded: {body['loaded_adapters']}"
            )

    async def _unload_lora(self, name: str, worker_id: int | None, deadline: float) -> None:  # noqa: ARG002
        """Unload a LoRA adapter. SGLang waits until no request uses it."""
        await self._control("/unload_lora_adapter", {"lora_name": name}, deadline=deadline)

    async def _join(self, group: ProcessGroup, deadline: float) -> None:
        if group.by_bucket:
            await self._weight_loader.join(group, (await self._facts()).info.ranks, deadline)
            return
        await self._control("/init_weights_update_group", group_body(group, deadline), deadline=deadline)

    async def _probe(self, deadline: float) -> None:
        # Not /health: it generates a token, which fails while the server is paused or asleep.
        await self._http.control("GET", "/server_info", deadline=deadline)

    async def _read_facts(self) -> SGLangFacts:
        served, server = await self._ask("/model_info"), await self._ask("/server_info")
        if option := kept_after_flush(server):
            raise EngineRefused(self.name, f"{option} keeps prefixes of old weights after a publish; start it without")
        paths = (await self._ask("/openapi.json"))["paths"]
        model = await self._read_model(Path(served["model_path"]))
        return read_facts(paths, served, server, model)

    def _check(self, request: GenerateRequest, facts: SGLangFacts) -> None:
        check_request(request, facts.limits)

    def _why_no_sleep(self) -> str:
        return "it was started without --enable-memory-saver, so it can't release memory"
