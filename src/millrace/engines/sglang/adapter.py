"""The adapter of stock SGLang."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from millrace.engines.sglang.guards import Limits, check_request
from millrace.engines.sglang.payload import payloads
from millrace.engines.sglang.pieces import cut_off, is_full, joined, rest_of
from millrace.engines.sglang.state import TORN, ForbiddenError, ServerState
from millrace.engines.sglang_protocol import (
    ABORT_DEADLINE,
    CONTROL_DEADLINE,
    IDLE_POLL_SECONDS,
    PAUSE_MODES,
    SGLangProtocol,
    distributed_body,
)
from millrace.engines.sglang_wire import decode_version, encode_generate
from millrace.errors import EngineError, EngineFailed, EngineRefused, EngineTimeout
from millrace.types import (
    ALL_MEMORY,
    Bucket,
    Capability,
    CudaIpcBucket,
    DiskBucket,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Generation,
    Health,
    MemoryTag,
    PauseMode,
    ProcessGroupBucket,
    SharedMemoryBucket,
    TorchStorageBucket,
)

# By the server's own description of its API, so that a fork or a later version tells by itself what it can do.
CAPABILITY_PATHS = {
    Capability.UPDATE_SESSION: "/begin_weight_update",
    Capability.UPDATE_FROM_DISK: "/update_weights_from_disk",
    Capability.UPDATE_FROM_PROCESS_GROUP: "/update_weights_from_distributed",
    Capability.OWN_CHECKSUMS: "/weights_checker",
}
PAUSE_DEADLINE = 60.0  # seconds; it waits for requests of others to end
DRAIN_DEADLINE = 30.0
PAUSE_CAPABILITIES = {Capability.PAUSE_ABORT, Capability.PAUSE_RETRACT, Capability.PAUSE_KEEP}


@dataclass(slots=True)
class _Call:
    """A generation under way; `pieces` are what its earlier calls came back with."""

    request: GenerateRequest
    pieces: list[Generation] = field(default_factory=list)
    sent: bool = False  # the server has it now
    interrupted: bool = False  # by an update, after which it goes on
    aborted: bool = False  # by somebody who wants it to end


class SGLangEngine(SGLangProtocol):
    """The SGLang server at `url`, which no other controls; others may generate.

    model_path: the model's folder, for the size of its vocabulary; None: the one that the server names, which must be
    readable here. `state` is what this adapter has brought the server into.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        model_path: Path | None = None,
    ) -> None:
        super().__init__(name, url, api_key=api_key, admin_key=admin_key)
        self.state = ServerState()
        self._model_path = model_path
        self._info: EngineInfo | None = None
        self._calls: dict[str, _Call] = {}
        self._controls = asyncio.Lock()  # one control call at a time; abort and the questions pass
        self._released = asyncio.Condition()  # tells held requests that the state has changed
        self._stopped = False  # whether the server itself was told to pause
        self._session = False  # whether it has an update session open

    async def settle(self) -> None:
        """Once, at the beginning: a server that somebody left paused goes on, and what it made while starting is taken
        out of its garbage collector's sight, which every flush of the cache runs on the CPU (half a second)."""
        await self._control("/continue_generation", {}, repeatable=True)
        await self._control("/freeze_gc", {}, repeatable=True)

    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        end = time.monotonic() + deadline
        async with self._calling(request) as call:
            while await self._next_call(call, end):
                body = await self._http.generate(
                    "/generate", encode_generate(rest_of(request, call.pieces)), deadline=end - time.monotonic()
                )
                call.pieces.append(self._decode(request, body))
            return self._finished(call)

    async def stream(self, request: GenerateRequest, *, deadline: float) -> AsyncGenerator[Generation, None]:
        end = time.monotonic() + deadline
        async with self._calling(request) as call:
            while await self._next_call(call, end):
                body = encode_generate(rest_of(request, call.pieces), stream=True)
                piece = None
                async for event in self._http.events("/generate", body, deadline=end - time.monotonic()):
                    if "error" in event:
                        raise EngineRefused(self.name, f"/generate was refused: {event['error'].get('message')}")
                    piece = self._decode(request, event)
                    if event["meta_info"]["finish_reason"] is None:
                        yield joined([*call.pieces, piece])
                if piece is None:
                    raise EngineFailed(self.name, "/generate answered with an empty stream")
                call.pieces.append(piece)
            yield self._finished(call)

    async def abort(self, request_id: str | None = None) -> None:
        for name, call in self._calls.items():
            call.aborted = call.aborted or request_id in (None, name)
        await super().abort(request_id)
        await self._wake_waiting()

    async def pause(self, mode: PauseMode) -> None:
        async with self._controlling():
            if self.state.paused is None:
                if self.state.generating:
                    await self._stop(mode)
                self.state = self.state.pausing(mode)

    async def resume(self) -> None:
        async with self._controlling():
            await self._become(self.state.resuming())

    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        async with self._controlling():
            before, after = self.state, self.state.sleeping(what)
            if not (fresh := sorted(what - before.asleep)):
                return
            if Capability.SLEEP not in (await self._facts()).capabilities:
                raise EngineRefused(self.name, "it was started without --enable-memory-saver and can release nothing")
            self.state = after  # new requests are held from here on
            if not before.held:
                try:
                    await self._drain()
                except BaseException:
                    await self._back_to(before)
                    raise
            await self._control("/release_memory_occupation", {"tags": fresh})

    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        async with self._controlling():
            if stale := sorted(what & self.state.asleep):
                # Not repeated where it fails: taking a tag back twice kills the server.
                await self._control("/resume_memory_occupation", {"tags": stale})
                await self._become(self.state.waking(what))

    async def begin_update(self, version: int) -> None:
        async with self._controlling():
            before, self.state = self.state, self.state.beginning(version)
            try:
                if not before.asleep:
                    await self._interrupt()
                if Capability.UPDATE_SESSION in (await self._facts()).capabilities:
                    await self._control("/begin_weight_update", {})
                    self._session = True
            except BaseException:
                await self._back_to(before)
                raise

    async def load(self, bucket: Bucket, *, deadline: float) -> None:
        async with self._controlling():
            self.state = self.state.loading()
            quietly = {"flush_cache": False, "abort_all_requests": False}
            match bucket:
                case CudaIpcBucket() | TorchStorageBucket():
                    ranks = (await self._facts()).ranks
                    body = {
                        "serialized_named_tensors": payloads(bucket, ranks),
                        "load_format": "flattened_bucket",
                        **quietly,
                    }
                    await self._control("/update_weights_from_tensor", body, deadline=deadline)
                case ProcessGroupBucket():
                    body = {**distributed_body(bucket), **quietly}
                    await self._control("/update_weights_from_distributed", body, deadline=deadline)
                case DiskBucket(path):
                    body = {"model_path": path, **quietly}
                    await self._control("/update_weights_from_disk", body, deadline=deadline)
                case SharedMemoryBucket():
                    raise EngineRefused(self.name, "it can't open a memory file; send the tensors by torch's storage")

    async def commit(self) -> None:
        async with self._controlling():
            after, version = self.state.committing(), self.state.updating
            await self._end_session()
            body = {"new_version": str(version), "abort_all_requests": False}
            await self._control("/update_weight_version", body)
            await self._become(after)

    async def rollback(self) -> None:
        async with self._controlling():
            if self.state.updating is None:
                return
            await self._end_session()
            await self._become(self.state.rolling_back())
            if self.state.torn:
                raise EngineRefused(self.name, "its old weights are overwritten; it serves again after a whole version")

    async def checksums(self) -> Mapping[str, str]:
        """Of the tensors as the engine keeps them, fused and sharded, by a digest of its own; names begin with the
        rank."""
        body = await self._control("/weights_checker", {"action": "checksum"}, repeatable=True)
        return {
            f"rank{rank}:{name}": value
            for rank, held in enumerate(body["ranks"])
            for name, value in held["checksums"].items()
        }

    async def load_adapter(self, name: str, path: str) -> None:
        await self._control("/load_lora_adapter", {"lora_name": name, "lora_path": path})

    async def unload_adapter(self, name: str) -> None:
        await self._control("/unload_lora_adapter", {"lora_name": name})

    async def health(self, *, deadline: float = 5.0) -> Health:
        """Its own /health generates a token, and can't while it is paused or asleep."""
        try:
            await self._http.control("GET", "/server_info", deadline=deadline)
        except EngineTimeout:
            return Health.BUSY
        except EngineError:
            return Health.DEAD
        if self.state.asleep:
            return Health.ASLEEP
        return Health.READY if self.state.generating else Health.PAUSED

    async def info(self) -> EngineInfo:
        facts = await self._facts()
        model = await self._ask("/model_info")
        return replace(facts, model_path=model["model_path"], weight_version=decode_version(model["weight_version"]))

    async def _facts(self) -> EngineInfo:
        """What does not change while the server runs: read once."""
        if self._info is None:
            self._info = await self._read_info()
        return self._info

    async def _read_info(self) -> EngineInfo:
        model = await self._ask("/model_info")
        server = await self._ask("/server_info")
        paths = (await self._ask("/openapi.json"))["paths"]
        models = await self._ask("/v1/models")
        capabilities = {capability for capability, path in CAPABILITY_PATHS.items() if path in paths}
        capabilities |= {Capability.VERSION_SPANS, *PAUSE_CAPABILITIES}
        on_cpu = server["device"] == "cpu"
        single = server["dp_size"] == 1 or server["enable_dp_attention"]
        if "/update_weights_from_tensor" in paths and single:
            capabilities.add(Capability.UPDATE_FROM_TORCH_STORAGE if on_cpu else Capability.UPDATE_FROM_CUDA_IPC)
        if on_cpu or server["enable_memory_saver"]:
            capabilities.add(Capability.SLEEP)
        if server["enable_lora"]:
            capabilities.add(Capability.LORA)
        if model["has_image_understanding"]:
            capabilities.add(Capability.IMAGES)
        return EngineInfo(
            kind="sglang",
            engine_version=server["version"],
            model_path=model["model_path"],
            weight_version=None,
            vocab_size=self._vocab_size(model["model_path"]),
            context_length=models["data"][0]["max_model_len"],
            capabilities=frozenset(capabilities),
            ranks=server["tp_size"] * server["pp_size"],
        )

    def _vocab_size(self, served: str) -> int:
        """The server does not tell, and dies of a token beyond it."""
        path = (self._model_path or Path(served)) / "config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise EngineRefused(
                self.name,
                f"the size of its vocabulary stands in {path}, which can't be read here ({error}); give the model's "
                "folder as model_path",
            ) from error
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        if not isinstance(size, int):
            raise EngineRefused(self.name, f"{path} names no vocab_size")
        return size

    @asynccontextmanager
    async def _calling(self, request: GenerateRequest) -> AsyncIterator[_Call]:
        """Registers a generation, and aborts it on the server where it is given up."""
        info = await self._facts()
        try:
            check_request(request, Limits(info.vocab_size, info.context_length))
        except ForbiddenError as error:
            raise EngineRefused(self.name, f"request {request.request_id}: {error}") from error
        if request.request_id in self._calls:
            raise EngineRefused(self.name, f"request {request.request_id} is in flight already")
        call = self._calls[request.request_id] = _Call(request)
        try:
            yield call
        except BaseException:
            if call.sent:
                await self._abandon(request.request_id)
            raise
        finally:
            del self._calls[request.request_id]

    async def _next_call(self, call: _Call, end: float) -> bool:
        """Whether there is (more) to ask of the server. Waits as long as it must not see a request."""
        call.sent = False
        if call.pieces:
            if call.pieces[-1].finish_reason is not FinishReason.ABORT or not call.interrupted:
                return False
            if is_full(call.request, call.pieces):
                call.pieces[-1] = replace(call.pieces[-1], finish_reason=FinishReason.LENGTH)
                return False
            call.interrupted = False
        if self.state.held:
            await self._until_released(call, end)
        if self.state.torn:
            raise EngineRefused(self.name, f"request {call.request.request_id}: {TORN}")
        call.sent = not call.aborted
        return call.sent

    async def _until_released(self, call: _Call, end: float) -> None:
        try:
            async with asyncio.timeout(end - time.monotonic()), self._released:
                await self._released.wait_for(lambda: call.aborted or not self.state.held)
        except TimeoutError:
            raise EngineTimeout(
                self.name, f"request {call.request.request_id} waited until its deadline: {self.state.describe()}"
            ) from None

    def _finished(self, call: _Call) -> Generation:
        return joined(call.pieces) if call.pieces else cut_off(call.request)

    @asynccontextmanager
    async def _controlling(self) -> AsyncIterator[None]:
        """One control call at a time, refused where the state forbids it."""
        try:
            async with asyncio.timeout(CONTROL_DEADLINE):
                await self._controls.acquire()
        except TimeoutError:
            raise EngineTimeout(self.name, "another control call was still under way") from None
        try:
            yield
        except ForbiddenError as error:
            raise EngineRefused(self.name, str(error)) from error
        finally:
            self._controls.release()

    async def _become(self, state: ServerState) -> None:
        """Enters `state`, and lets the server go on where it may."""
        if state.generating and self._stopped:
            await self._control("/continue_generation", {}, repeatable=True)
            self._stopped = False
        self.state = state
        await self._wake_waiting()

    async def _back_to(self, state: ServerState) -> None:
        """After a failure that is being raised: what can be undone is."""
        self.state = state
        with suppress(EngineError):
            await self._become(state)

    async def _wake_waiting(self) -> None:
        async with self._released:
            self._released.notify_all()

    async def _stop(self, mode: PauseMode) -> None:
        """Pauses the server itself. Its own way of aborting looks once a second whether all have ended, so they are
        ended before."""
        self._stopped = True
        if mode is PauseMode.ABORT:
            await self._end_running()
        await self._control("/pause_generation", {"mode": PAUSE_MODES[mode]}, deadline=PAUSE_DEADLINE, repeatable=True)

    async def _end_running(self) -> None:
        end = time.monotonic() + ABORT_DEADLINE
        while any(call.sent for call in self._calls.values()) and time.monotonic() < end:
            # Again and again: a request that is on its way to the scheduler is not hit by an abort.
            await self._control("/abort_request", {"abort_all": True}, repeatable=True)
            await asyncio.sleep(IDLE_POLL_SECONDS)

    async def _interrupt(self) -> None:
        """Empties the server before an update. What ran goes on afterwards, from the tokens that it has."""
        if self._stopped:
            await self._control("/continue_generation", {}, repeatable=True)  # a paused server does not abort
        for call in self._calls.values():
            call.interrupted = call.sent
        await self._stop(PauseMode.ABORT)
        await self.flush_cache()

    async def _drain(self) -> None:
        """Waits until nothing runs, and pauses the server so that nothing else begins."""
        if self.state.paused is not None and any(call.sent for call in self._calls.values()):
            raise ForbiddenError("requests are paused in the middle; resume or abort them before the engine sleeps")
        end = time.monotonic() + DRAIN_DEADLINE
        while True:
            await self.flush_cache(deadline=end - time.monotonic())
            if self._stopped:
                return
            await self._stop(PauseMode.KEEP)
            with suppress(EngineTimeout):  # a request of somebody else slipped in between
                await self.flush_cache(deadline=ABORT_DEADLINE)
                return
            await self._control("/continue_generation", {}, repeatable=True)
            self._stopped = False

    async def _end_session(self) -> None:
        if self._session:
            await self._control("/end_weight_update", {})
            self._session = False
