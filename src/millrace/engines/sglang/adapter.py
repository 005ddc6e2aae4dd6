"""The adapter of stock SGLang."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

from millrace.engines.sglang.calls import Call, Calls
from millrace.engines.sglang.facts import Facts, read_facts
from millrace.engines.sglang.guards import check_request, check_shapes, check_tensors, check_whole
from millrace.engines.sglang.model import read_model, shapes_of
from millrace.engines.sglang.payload import payloads
from millrace.engines.sglang.pieces import joined
from millrace.engines.sglang.state import ForbiddenError, ServerState
from millrace.engines.sglang_protocol import (
    ABORT_DEADLINE,
    CONTROL_DEADLINE,
    IDLE_POLL_SECONDS,
    PAUSE_MODES,
    SGLangProtocol,
    distributed_body,
)
from millrace.engines.sglang_wire import decode_version, encode_generate
from millrace.errors import DataError, EngineError, EngineFailed, EngineRefused, EngineTimeout
from millrace.launch.ports import listens
from millrace.types import (
    ALL_MEMORY,
    Bucket,
    Capability,
    CudaIpcBucket,
    DiskBucket,
    EngineInfo,
    GenerateRequest,
    Generation,
    Health,
    MemoryTag,
    PauseMode,
    ProcessGroup,
    ProcessGroupBucket,
    SharedMemoryBucket,
    TorchStorageBucket,
)

PAUSE_DEADLINE = 60.0  # seconds; it waits for requests of others to end
DRAIN_DEADLINE = 30.0


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
        self._model_path = model_path
        self._facts_read: Facts | None = None
        self._calls = Calls(name)
        self._controls = asyncio.Lock()  # one control call at a time; abort and the questions pass
        self._stopped = False  # whether the server itself was told to pause
        self._session = False  # whether it has an update session open
        self._loaded: set[str] = set()  # the tensors of the update that is under way

    @property
    def state(self) -> ServerState:
        """What this adapter has brought the server into."""
        return self._calls.state

    async def settle(self) -> None:
        """Once, at the beginning: a server that somebody left paused goes on, and what it made while starting is taken
        out of its garbage collector's sight, which every flush of the cache runs on the CPU (half a second)."""
        await self._control("/continue_generation", {}, repeatable=True)
        await self._control("/freeze_gc", {}, repeatable=True)

    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        end = time.monotonic() + deadline
        async with self._calling(request) as call:
            while await self._calls.go_on(call, end):
                body = await self._http.generate(
                    "/generate", encode_generate(call.rest), deadline=end - time.monotonic()
                )
                call.pieces.append(self._decode(request, body))
            return call.finished

    async def stream(self, request: GenerateRequest, *, deadline: float) -> AsyncGenerator[Generation, None]:
        end = time.monotonic() + deadline
        async with self._calling(request) as call:
            while await self._calls.go_on(call, end):
                body = encode_generate(call.rest, stream=True)
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
            yield call.finished

    async def abort(self, request_id: str | None = None) -> None:
        served = await self._calls.abort(request_id)
        if request_id is None:
            await super().abort()  # those of others too
            return
        for name in served:
            await super().abort(name)

    async def pause(self, mode: PauseMode) -> None:
        async with self._controlling():
            if self.state.paused is None:
                before = self.state
                await self._calls.enter(before.pausing(mode))  # new requests wait here from now on
                if before.generating:
                    await self._stop(mode)

    async def resume(self) -> None:
        async with self._controlling():
            await self._become(self.state.resuming())

    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        async with self._controlling():
            before, after = self.state, self.state.sleeping(what)
            if not (fresh := sorted(what - before.asleep)):
                return
            if Capability.SLEEP not in (await self._facts()).info.capabilities:
                raise EngineRefused(self.name, "it was started without --enable-memory-saver and can release nothing")
            await self._calls.enter(after)
            if not before.asleep:
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
            before = self.state
            await self._calls.enter(before.beginning(version))
            try:
                if not before.asleep:
                    await self._interrupt()
                if Capability.UPDATE_SESSION in (await self._facts()).info.capabilities:
                    await self._control("/begin_weight_update", {})
                    self._session = True
            except BaseException:
                await self._back_to(before)
                raise
            self._loaded.clear()

    async def load(self, bucket: Bucket, *, deadline: float) -> None:
        async with self._controlling():
            after = self.state.loading()
            facts = await self._facts()
            path, body, names = self._loading(bucket, facts)
            await self._calls.enter(after)  # whatever comes back, the server may have changed
            quietly = {"flush_cache": False, "abort_all_requests": False}
            await self._control(path, {**body, **quietly}, deadline=deadline)
            self._loaded |= names

    def _loading(self, bucket: Bucket, facts: Facts) -> tuple[str, Mapping[str, object], set[str]]:
        """The route, the body and the tensors' names. Raises ForbiddenError for what would kill the server."""
        match bucket:
            case CudaIpcBucket(tensors=tensors) | TorchStorageBucket(tensors=tensors):
                path = "/update_weights_from_tensor"
                check_tensors(tensors, facts.model.shapes)
                body: Mapping[str, object] = {
                    "serialized_named_tensors": payloads(bucket, facts.info.ranks),
                    "load_format": "flattened_bucket",
                }
                return path, body, {tensor.name for tensor in tensors}
            case ProcessGroupBucket(tensors=tensors):
                check_tensors(tensors, facts.model.shapes)
                return "/update_weights_from_distributed", distributed_body(bucket), {tensor.name for tensor in tensors}
            case DiskBucket(path=folder):
                names = set(facts.model.shapes or ())
                if Path(folder).is_dir():  # else it is on another host, and a missing one is refused there
                    shapes = shapes_of(Path(folder))
                    check_shapes(shapes.items(), facts.model.shapes)
                    names = set(shapes)
                return "/update_weights_from_disk", {"model_path": folder}, names
            case SharedMemoryBucket():
                raise ForbiddenError("it can't open a memory file; send the tensors by torch's storage")

    async def commit(self) -> None:
        async with self._controlling():
            after, version = self.state.committing(), self.state.updating
            check_whole(self._loaded, (await self._facts()).model.shapes)
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

    async def join_group(self, group: ProcessGroup, *, deadline: float) -> None:
        """Waits for the sender first: a server that can't reach it hangs as a whole."""
        end = time.monotonic() + deadline
        ranks = (await self._facts()).info.ranks
        if group.rank_offset + ranks > group.world_size:
            raise EngineRefused(
                self.name,
                f"its {ranks} ranks from {group.rank_offset} on have no place in a group of {group.world_size}",
            )
        while not await listens(group.address, group.port):
            if time.monotonic() + IDLE_POLL_SECONDS >= end:
                raise EngineTimeout(self.name, f"nobody listens at {group.address}:{group.port} for {group.name}")
            await asyncio.sleep(IDLE_POLL_SECONDS)
        await super().join_group(group, deadline=end - time.monotonic())

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
        return replace(
            facts.info, model_path=model["model_path"], weight_version=decode_version(model["weight_version"])
        )

    async def _facts(self) -> Facts:
        """What does not change while the server runs: read once."""
        if self._facts_read is None:
            self._facts_read = await self._read_facts()
        return self._facts_read

    async def _read_facts(self) -> Facts:
        served, server = await self._ask("/model_info"), await self._ask("/server_info")
        paths = (await self._ask("/openapi.json"))["paths"]
        own = Path(served["model_path"])
        try:
            model = await asyncio.to_thread(read_model, self._model_path or own)
            if (own / "config.json").is_file() and (await asyncio.to_thread(read_model, own)).shapes != model.shapes:
                raise EngineRefused(self.name, f"it serves {own}, a model of other tensors than {self._model_path}")
        except DataError as error:
            raise EngineRefused(self.name, f"{error}; give the model's folder as model_path") from error
        return read_facts(paths, served, server, model)

    @asynccontextmanager
    async def _calling(self, request: GenerateRequest) -> AsyncIterator[Call]:
        """Registers a generation, and aborts it on the server where it is given up."""
        try:
            check_request(request, (await self._facts()).limits)
        except ForbiddenError as error:
            raise EngineRefused(self.name, f"request {request.request_id}: {error}") from error
        with self._calls.register(request) as call:
            try:
                yield call
            except BaseException:
                if call.sent:
                    await self._abandon(call.served_as)
                raise

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
        except (ForbiddenError, DataError) as error:
            raise EngineRefused(self.name, str(error)) from error
        finally:
            self._controls.release()

    async def _become(self, state: ServerState) -> None:
        """Enters `state`, and lets the server go on where it may."""
        if state.generating and self._stopped:
            await self._control("/continue_generation", {}, repeatable=True)
            self._stopped = False
        await self._calls.enter(state)

    async def _back_to(self, state: ServerState) -> None:
        """After a failure that is being raised: what can be undone is."""
        await self._calls.enter(state)
        with suppress(EngineError):
            await self._become(state)

    async def _stop(self, mode: PauseMode) -> None:
        """Pauses the server itself. Its own way of aborting looks once a second whether all have ended, so they are
        ended before."""
        self._stopped = True
        if mode is PauseMode.ABORT:
            await self._end_running()
        await self._control("/pause_generation", {"mode": PAUSE_MODES[mode]}, deadline=PAUSE_DEADLINE, repeatable=True)

    async def _end_running(self) -> None:
        end = time.monotonic() + ABORT_DEADLINE
        while self._calls.any_sent and time.monotonic() < end:
            # Again and again: a request that is on its way to the scheduler is not hit by an abort.
            await self._control("/abort_request", {"abort_all": True}, repeatable=True)
            await asyncio.sleep(IDLE_POLL_SECONDS)

    async def _interrupt(self) -> None:
        """Empties the server before an update. What ran goes on afterwards, from the tokens that it has."""
        if self._stopped:
            await self._control("/continue_generation", {}, repeatable=True)  # a paused server does not abort
        self._calls.interrupt()
        await self._stop(PauseMode.ABORT)
        await self.flush_cache()

    async def _drain(self) -> None:
        """Waits until nothing runs, and pauses the server so that nothing else begins."""
        if self.state.paused is not None and self._calls.any_sent:
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
