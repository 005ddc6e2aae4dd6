"""The adapter for the embedded engine, whose protocol is SGLang's with some additions."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial

from millrace.buckets import (
    Bucket,
    CudaIpcBucket,
    DiskBucket,
    PeerBucket,
    ProcessGroup,
    ProcessGroupBucket,
    SharedMemoryBucket,
    TorchStorageBucket,
)
from millrace.engines.http_engine import ABORT_DEADLINE, CONTROL_DEADLINE, HttpEngine
from millrace.engines.sglang.guards import OWN_FIELDS, OWN_SAMPLING
from millrace.engines.sglang_wire import (
    PAUSE_MODES,
    decode_generate,
    decode_loads,
    distributed_body,
    encode_generate,
    group_body,
    wire_id,
)
from millrace.engines.stock.state import InvalidStateError, require
from millrace.engines.stock.tokens import check_values
from millrace.engines.versions import decode_version
from millrace.errors import EngineError, EngineFailed, EngineRefused, EngineTimeout, LocalError
from millrace.http import HttpClient
from millrace.types import (
    ALL_MEMORY,
    Capability,
    EngineInfo,
    EngineLoad,
    GenerateRequest,
    Generation,
    Health,
    MemoryTag,
    PauseMode,
)


class EmbeddedEngine(HttpEngine):
    """One embedded engine. Its server refuses harmful calls itself, so the adapter keeps almost no state."""

    _update: int | None = None  # the version of the open update

    async def initialize(self, version: int | None = None) -> None:
        if version is None:
            await self.rollback()
            await self.resume()
            await self.wake()
            await self._remember_version()

    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        try:
            body = await self._http.generate("/generate", self._encode(request), deadline=deadline)
        except (asyncio.CancelledError, EngineTimeout):
            await self._abandon(request.request_id)
            raise
        return self._decode_generation("/generate", lambda: decode_generate(request, body))

    async def generate_by(
        self, router: HttpClient, request: GenerateRequest, *, headers: Mapping[str, str], deadline: float
    ) -> Generation:
        body = await router.generate("/generate", self._encode(request), deadline=deadline, headers=headers)
        return self._decode_generation("/generate", lambda: decode_generate(request, body))

    async def abort_by_router(self, request_id: str) -> None:
        await self._control("/abort_request", {"rid": wire_id(request_id)}, deadline=ABORT_DEADLINE, repeatable=True)

    async def stream(self, request: GenerateRequest, *, deadline: float) -> AsyncGenerator[Generation, None]:
        finished = False
        try:
            async for body in self._events("/generate", self._encode(request, stream=True), deadline):
                made = self._decode_generation("/generate", partial(decode_generate, request, body))
                finished = body["meta_info"]["finish_reason"] is not None
                yield made
        finally:
            if not finished:
                await self._abandon(request.request_id)

    async def abort(self, request_id: str | None = None) -> None:
        body = {"abort_all": True} if request_id is None else {"rid": wire_id(request_id)}
        await self._control("/abort_request", body, repeatable=True)

    async def pause(self, mode: PauseMode) -> None:
        await self._control("/pause_generation", {"mode": PAUSE_MODES[mode]}, repeatable=True)

    async def resume(self) -> None:
        await self._control("/continue_generation", {}, repeatable=True)

    async def flush_cache(self, *, deadline: float = 30.0) -> None:
        await self._retry_until_idle("/flush_cache", {}, deadline)

    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        if (await self._ask("/server_info"))["is_paused"] and (await self.loads()).running_requests:
            raise EngineRefused(
                self.name, "requests are paused half-way; resume or abort them before the engine sleeps"
            )
        await self._retry_until_idle("/release_memory_occupation", {"tags": sorted(what)}, CONTROL_DEADLINE)

    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        await self._control("/resume_memory_occupation", {"tags": sorted(what)}, repeatable=True)

    async def begin_update(self, version: int) -> None:
        await self._require_only_owner()
        await self._control("/begin_weight_update", {})
        self._update = version

    async def load(self, bucket: Bucket, *, deadline: float) -> None:
        if self._update is None:
            raise EngineRefused(self.name, "load without begin_update")
        match bucket:
            case SharedMemoryBucket():
                await self._control("/update_weights_from_shared_memory", asdict(bucket), deadline=deadline)
            case ProcessGroupBucket():
                await self._control("/update_weights_from_distributed", distributed_body(bucket), deadline=deadline)
            case DiskBucket(path):
                await self._control("/update_weights_from_disk", {"model_path": path}, deadline=deadline)
            case PeerBucket(url, ticket):
                body = {"url": url, "ticket": ticket, "timeout": deadline}
                await self._control("/update_weights_from_peer", body, deadline=deadline)
            case TorchStorageBucket() | CudaIpcBucket():
                raise EngineRefused(self.name, "it can't open torch storage or CUDA IPC; send tensors by shared memory")

    async def offer_weights(self, names: Sequence[str]) -> PeerBucket:
        body = await self._control("/offer_weights", {"names": list(names)})
        return PeerBucket(self.url, body["ticket"], decode_version(body["weight_version"]))

    async def commit(self) -> None:
        if self._update is None:
            raise EngineRefused(self.name, "commit without begin_update")
        await self._require_only_owner()
        await self._control("/end_weight_update", {"weight_version": str(self._update)})
        self._left_at, self._update = self._update, None

    async def rollback(self) -> None:
        self._update = None
        await self._control("/abort_weight_update", {})

    async def checksums(self) -> Mapping[str, str]:
        body = await self._control("/weights_checker", {"action": "checksum"}, repeatable=True)
        return {name: value for rank in body["ranks"] for name, value in rank["checksums"].items()}

    async def load_lora(self, name: str, path: str, *, deadline: float = CONTROL_DEADLINE) -> None:
        await self._control("/load_lora_adapter", {"lora_name": name, "lora_path": path}, deadline=deadline)

    async def unload_lora(self, name: str, *, deadline: float = CONTROL_DEADLINE) -> None:
        await self._control("/unload_lora_adapter", {"lora_name": name}, deadline=deadline)

    async def lora_checksums(self, name: str) -> Mapping[str, str]:
        body = await self._control("/weights_checker", {"action": "checksum", "lora_name": name}, repeatable=True)
        return dict(body["ranks"][0]["checksums"])

    async def health(self, *, deadline: float = 5.0) -> Health:
        try:
            await self._http.control("GET", "/health", deadline=deadline)
            state = await self._http.control("GET", "/server_info", deadline=deadline)
        except EngineTimeout:
            return Health.BUSY
        except LocalError:
            return Health.UNKNOWN
        except EngineError:
            return Health.DEAD
        if state["asleep"]:
            return Health.ASLEEP
        return Health.PAUSED if state["is_paused"] else Health.READY

    async def info(self) -> EngineInfo:
        model, server = await self._ask("/model_info"), await self._ask("/server_info")
        try:
            return EngineInfo(
                kind="embedded",
                engine_version=server["version"],
                model_path=model["model_path"],
                weight_version=decode_version(model["weight_version"]),
                vocab_size=model["vocab_size"],
                context_length=model["context_length"],
                dtype=model["dtype"],
                unusual_dtypes=model["unusual_dtypes"],
                capabilities=frozenset(Capability(c) for c in server["capabilities"]),
                max_running=server["max_running_requests"],
                cache_tokens=server["max_running_requests"] * model["context_length"],
            )
        except KeyError as error:
            raise EngineFailed(self.name, f"{self.url} is not an embedded engine: its answer has no {error}") from error

    async def join_group(self, group: ProcessGroup, *, deadline: float) -> None:
        await self._control("/init_weights_update_group", group_body(group, deadline), deadline=deadline)

    async def leave_group(self, name: str) -> None:
        await self._control("/destroy_weights_update_group", {"group_name": name})

    async def loads(self) -> EngineLoad:
        return decode_loads(await self._ask("/v1/loads"))

    async def inject_fault(self, kind: str, **details: object) -> None:
        """Cause a fault, for tests. Raises EngineRefused unless the engine was started with `faults`."""
        await self._control("/inject_fault", {"kind": kind, **details})

    async def _abandon(self, request_id: str) -> None:
        """Abort a request whose caller has left. If this fails, the server still sees the closed connection."""
        with suppress(EngineError):
            await self._control("/abort_request", {"rid": wire_id(request_id)}, deadline=ABORT_DEADLINE)

    def _encode(self, request: GenerateRequest, *, stream: bool = False) -> Mapping[str, object]:
        """Return the body of POST /generate. Raises EngineRefused if `extra` sets what the request itself sets."""
        try:
            check_values(request)
            require(not request.images, "the embedded engine takes no images; use SGLang or vLLM")
            no_schema = request.sampling.json_schema is None
            require(no_schema, "the embedded engine follows no json_schema; use SGLang or vLLM")
        except InvalidStateError as error:
            raise EngineRefused(self.name, f"request {request.request_id}: {error}") from error
        sampling = request.extra.get("sampling_params", {})
        if not isinstance(sampling, Mapping):
            raise EngineRefused(self.name, f"request {request.request_id}: extra.sampling_params must be a mapping")
        for taken in (OWN_FIELDS & request.extra.keys(), OWN_SAMPLING & sampling.keys()):
            if taken:
                raise EngineRefused(self.name, f"request {request.request_id}: Millrace sets {min(taken)}, not extra")
        body = encode_generate(request, stream=stream)
        return {**body, "continued_tokens": request.continued_tokens} if request.continued_tokens else body
