"""The adapter of the embedded engine: what it does in its own way, beside SGLang's protocol."""

from collections.abc import Mapping
from dataclasses import asdict

from millrace.engines.sglang_protocol import CONTROL_DEADLINE, SGLangProtocol, distributed_body
from millrace.engines.sglang_wire import decode_version
from millrace.errors import EngineError, EngineFailed, EngineRefused, EngineTimeout
from millrace.types import (
    ALL_MEMORY,
    Bucket,
    Capability,
    CudaIpcBucket,
    DiskBucket,
    EngineInfo,
    Health,
    MemoryTag,
    ProcessGroupBucket,
    SharedMemoryBucket,
    TorchStorageBucket,
)


class EmbeddedEngine(SGLangProtocol):
    """The embedded engine at `url`. What would harm the server, the server itself refuses."""

    def __init__(self, name: str, url: str, *, api_key: str | None = None, admin_key: str | None = None) -> None:
        super().__init__(name, url, api_key=api_key, admin_key=admin_key)
        self._update: int | None = None

    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        if (await self._ask("/server_info"))["is_paused"] and (await self.loads()).running_requests:
            raise EngineRefused(
                self.name, "requests are paused in the middle; resume or abort them before the engine sleeps"
            )
        await self._when_idle("/release_memory_occupation", {"tags": sorted(what)}, CONTROL_DEADLINE)

    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        await self._control("/resume_memory_occupation", {"tags": sorted(what)}, repeatable=True)

    async def begin_update(self, version: int) -> None:
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
            case TorchStorageBucket() | CudaIpcBucket():
                raise EngineRefused(self.name, "it takes no tensors by torch's handles; send them by shared memory")

    async def commit(self) -> None:
        if self._update is None:
            raise EngineRefused(self.name, "commit without begin_update")
        await self._control("/end_weight_update", {"weight_version": str(self._update)})
        self._update = None

    async def rollback(self) -> None:
        self._update = None
        await self._control("/abort_weight_update", {})

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
                capabilities=frozenset(Capability(c) for c in server["capabilities"]),
            )
        except KeyError as error:
            raise EngineFailed(self.name, f"{self.url} is no embedded engine: it does not tell its {error}") from error

    async def inject_fault(self, kind: str, **details: object) -> None:
        """Makes the engine go wrong, for tests. Refused unless it was started with `faults`."""
        await self._control("/inject_fault", {"kind": kind, **details})
