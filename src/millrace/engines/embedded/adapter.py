"""The adapter of the embedded engine: the engine contract in the server's own HTTP calls."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict
from typing import Any

from millrace.engines.base import Engine
from millrace.engines.sglang_wire import decode_generate, decode_version, encode_generate, wire_id
from millrace.errors import EngineError, EngineFailed, EngineRefused, EngineTimeout
from millrace.http import HttpClient
from millrace.types import (
    ALL_MEMORY,
    Bucket,
    Capability,
    DiskBucket,
    EngineInfo,
    EngineLoad,
    GenerateRequest,
    Generation,
    Health,
    MemoryTag,
    PauseMode,
    ProcessGroup,
    ProcessGroupBucket,
    SharedMemoryBucket,
)

CONTROL_DEADLINE = 30.0  # seconds; a control call waits for one forward pass at most, which is seconds on a slow CPU
ABORT_DEADLINE = 5.0
PAUSE_MODES = {PauseMode.ABORT: "abort", PauseMode.RETRACT: "retract", PauseMode.KEEP: "in_place"}


class EmbeddedEngine(Engine):
    """The embedded engine at `url`. What would harm the server, the server itself refuses."""

    def __init__(self, name: str, url: str, *, api_key: str | None = None, admin_key: str | None = None) -> None:
        self.name = name
        self.url = url
        self._http = HttpClient(name, url, api_key=api_key, admin_key=admin_key)
        self._update: int | None = None

    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        try:
            body = await self._http.generate("/generate", encode_generate(request), deadline=deadline)
        except (asyncio.CancelledError, EngineTimeout):
            await self._abandon(request.request_id)
            raise
        return self._decode(request.request_id, body)

    async def stream(self, request: GenerateRequest, *, deadline: float) -> AsyncGenerator[Generation, None]:
        finished = False
        try:
            async for body in self._http.events("/generate", encode_generate(request, stream=True), deadline=deadline):
                if "error" in body:
                    raise EngineRefused(self.name, f"/generate was refused: {body['error'].get('message')}")
                finished = body.get("meta_info", {}).get("finish_reason") is not None
                yield self._decode(request.request_id, body)
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
        await self._when_idle("/flush_cache", {}, deadline)

    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        await self._when_idle("/release_memory_occupation", {"tags": sorted(what)}, CONTROL_DEADLINE)

    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        await self._control("/resume_memory_occupation", {"tags": sorted(what)}, repeatable=True)

    async def begin_update(self, version: int) -> None:
        await self._control("/begin_weight_update", {})
        self._update = version

    async def load(self, bucket: Bucket, *, deadline: float) -> None:
        match bucket:
            case SharedMemoryBucket():
                await self._control("/update_weights_from_shared_memory", asdict(bucket), deadline=deadline)
            case ProcessGroupBucket(group_name, tensors):
                body = {
                    "names": [t.name for t in tensors],
                    "dtypes": [t.dtype for t in tensors],
                    "shapes": [t.shape for t in tensors],
                    "group_name": group_name,
                }
                await self._control("/update_weights_from_distributed", body, deadline=deadline)
            case DiskBucket(path):
                await self._control("/update_weights_from_disk", {"model_path": path}, deadline=deadline)

    async def commit(self) -> None:
        if self._update is None:
            raise EngineRefused(self.name, "commit without begin_update")
        await self._control("/end_weight_update", {"weight_version": str(self._update)})
        self._update = None

    async def rollback(self) -> None:
        self._update = None
        await self._control("/abort_weight_update", {})

    async def join_group(self, group: ProcessGroup, *, deadline: float) -> None:
        body = {
            "master_address": group.address,
            "master_port": group.port,
            "rank_offset": group.rank_offset,
            "world_size": group.world_size,
            "group_name": group.name,
            "backend": group.backend,
            "timeout": deadline,
        }
        await self._control("/init_weights_update_group", body, deadline=deadline)

    async def leave_group(self, name: str) -> None:
        await self._control("/destroy_weights_update_group", {"group_name": name})

    async def checksums(self) -> Mapping[str, str]:
        body = await self._control("/weights_checker", {"action": "checksum"}, repeatable=True)
        return {name: value for rank in body["ranks"] for name, value in rank["checksums"].items()}

    async def health(self, *, deadline: float = 5.0) -> Health:
        try:
            await self._http.control("GET", "/health", deadline=deadline)
            state = await self._http.control("GET", "/server_info", deadline=deadline)
        except EngineTimeout:
            return Health.BUSY
        except EngineError:
            return Health.DEAD
        if state["asleep"]:
            return Health.ASLEEP
        return Health.PAUSED if state["is_paused"] else Health.READY

    async def loads(self) -> EngineLoad:
        body = await self._http.control("GET", "/v1/loads", deadline=CONTROL_DEADLINE, repeatable=True)
        ranks = body["loads"]
        return EngineLoad(
            running_requests=sum(r["num_running_reqs"] for r in ranks),
            waiting_requests=sum(r["num_waiting_reqs"] for r in ranks),
            used_tokens=sum(r["num_used_tokens"] for r in ranks),
            max_tokens=sum(r["max_total_num_tokens"] for r in ranks),
            tokens_per_second=sum(r["gen_throughput"] for r in ranks),
        )

    async def info(self) -> EngineInfo:
        model = await self._http.control("GET", "/model_info", deadline=CONTROL_DEADLINE, repeatable=True)
        server = await self._http.control("GET", "/server_info", deadline=CONTROL_DEADLINE, repeatable=True)
        return EngineInfo(
            kind="embedded",
            engine_version=server["version"],
            model_path=model["model_path"],
            weight_version=decode_version(model["weight_version"]),
            vocab_size=model["vocab_size"],
            context_length=model["context_length"],
            capabilities=frozenset(Capability(c) for c in server["capabilities"]),
        )

    async def inject_fault(self, kind: str, **details: object) -> None:
        """Makes the engine go wrong, for tests. Refused unless it was started with `faults`."""
        await self._control("/inject_fault", {"kind": kind, **details})

    async def close(self) -> None:
        await self._http.close()

    async def _control(
        self, path: str, body: object, *, deadline: float = CONTROL_DEADLINE, repeatable: bool = False
    ) -> Any:
        return await self._http.control("POST", path, body, deadline=deadline, repeatable=repeatable)

    async def _when_idle(self, path: str, body: object, deadline: float) -> None:
        """A call that the server refuses while requests run: asked again until they are done or the deadline passes."""
        end = time.monotonic() + deadline
        while True:
            try:
                await self._control(path, body, deadline=end - time.monotonic())
                return
            except EngineRefused as error:
                if time.monotonic() + 0.05 >= end:
                    raise EngineTimeout(
                        self.name, f"{path}: requests still ran after {deadline:.0f} s: {error}"
                    ) from error
            await asyncio.sleep(0.05)

    async def _abandon(self, request_id: str) -> None:
        """Aborts on the server what nobody waits for any more. Where that fails the server sees the closed
        connection."""
        try:
            await self._http.control("POST", "/abort_request", {"rid": wire_id(request_id)}, deadline=ABORT_DEADLINE)
        except EngineError:
            return

    def _decode(self, request_id: str, body: Any) -> Generation:
        try:
            return decode_generate(request_id, body)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineFailed(self.name, f"/generate answered what makes no sense: {error!r}") from error
