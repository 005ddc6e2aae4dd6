"""The shared part of the SGLang and vLLM adapters.

A stock server does not check whether a call is safe in its current state. This adapter keeps the state and refuses
unsafe calls. A subclass makes the HTTP calls.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from millrace.buckets import Bucket, DiskBucket, ProcessGroup
from millrace.engines.base import PUBLISHED_LORA
from millrace.engines.http_engine import ABORT_DEADLINE, CONTROL_DEADLINE, IDLE_POLL_SECONDS
from millrace.engines.stock.calls import Call, Calls
from millrace.engines.stock.facts import AnyFacts, check_takes
from millrace.engines.stock.lora import LoadedLoras
from millrace.engines.stock.model import Model, names_in, read_model
from millrace.engines.stock.server import StockServer
from millrace.engines.stock.state import InvalidStateError, ServerState, require
from millrace.engines.stock.tensors import check_shapes, check_whole
from millrace.errors import DataError, EngineError, EngineFailed, EngineRefused, EngineTimeout, LocalError
from millrace.http import HttpClient
from millrace.launch.ports import listens
from millrace.types import ALL_MEMORY, Capability, GenerateRequest, Generation, Health, MemoryTag, PauseMode

DRAIN_DEADLINE = 30.0


class StockEngine(StockServer[AnyFacts]):
    """A stock server. Nothing else may control it, but other clients may generate.

    model_path: the model's folder, which has the vocabulary size and the tensors' shapes. None: the folder that the
    server names, which must be readable on this host.
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
        super().__init__(name, url, api_key=api_key, admin_key=admin_key, model_path=model_path)
        self._calls = Calls(name)
        self._loras = LoadedLoras()
        self._controls = asyncio.Lock()  # one control call at a time; `abort` and reads need no lock
        self._loads: set[asyncio.Future[None]] = set()  # the loads that run; control calls wait for them
        self._stopped = False  # whether the server itself is paused
        self._dangling = False  # whether the server may have an update open that this adapter does not know of
        self._sent: set[str] = set()  # the tensors of the open update that were sent
        self._loaded: set[str] = set()  # those of them that the server confirmed
        self._holds = ""  # the digest of the served version, if it came as a folder and is whole
        self._arrived = ""  # that of the folder that the open update has loaded

    async def _attach(self) -> None:
        """Prepare for a server that another process started, and whose last trainer may have died in an update."""
        self._dangling = True
        await self._remember_version()
        await self._unload_leftover_loras()

    @property
    def state(self) -> ServerState:
        """The state of the server, as this adapter's calls left it."""
        return self._calls.state

    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        end = time.monotonic() + deadline
        async with self._registered(request) as call:
            while await self._calls.may_send(call, end):
                call.continuation.add(await self._call(self._http, call.rest, end - time.monotonic()))
            return await self._completed(request, call.continuation.result, end)

    async def generate_by(
        self, router: HttpClient, request: GenerateRequest, *, headers: Mapping[str, str], deadline: float
    ) -> Generation:
        facts = await self._facts()
        with self._refusing(request):
            self._check(request, facts)
            require(not request.images, "requests with images can't go through a router")
        end = time.monotonic() + deadline
        return await self._completed(request, await self._call(router, request, deadline, headers), end)

    async def abort_by_router(self, request_id: str) -> None:
        await self._abort([request_id])

    async def stream(self, request: GenerateRequest, *, deadline: float) -> AsyncGenerator[Generation, None]:
        end = time.monotonic() + deadline
        async with self._registered(request) as call:
            while await self._calls.may_send(call, end):
                part = None
                async for made, finished in self._stream_call(call.rest, end - time.monotonic()):
                    part = made
                    if not finished:
                        yield replace(call.continuation.with_part(part), text=None)
                if part is None:
                    raise EngineFailed(self.name, "generate answered with an empty stream")
                call.continuation.add(part)
            yield await self._completed(request, call.continuation.result, end)

    async def abort(self, request_id: str | None = None) -> None:
        served = await self._calls.abort(request_id)
        if request_id is not None:
            await self._abort_until_ended(served, self._abort)
            return
        await self._abort_all(served)
        await self._abort_until_ended(served, self._abort_all)

    async def pause(self, mode: PauseMode) -> None:
        async with self._control_call():
            if self.state.paused is None:
                before = self.state
                await self._calls.enter(before.pausing(mode))  # new requests wait in the adapter from now on
                if before.generating:
                    await self._stop(mode)

    async def resume(self) -> None:
        async with self._control_call():
            await self._enter(self.state.resuming())

    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        async with self._control_call():
            before, after = self.state, self.state.sleeping(what)
            if after.asleep == before.asleep:
                return
            if Capability.SLEEP not in (await self._facts()).info.capabilities:
                raise EngineRefused(self.name, self._why_no_sleep())
            await self._calls.enter(after)
            self._holds = self._holds if MemoryTag.WEIGHTS not in what else ""
            if not before.asleep:
                try:
                    await self._drain()
                except BaseException:
                    await self._restore(before)
                    raise
            await self._release(before, after)

    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        async with self._control_call():
            if stale := what & self.state.asleep:
                await self._reallocate(stale)
                await self._enter(self.state.waking(what))

    async def check_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        known = (await self._facts()).model.shapes
        try:
            check_shapes(shapes.items(), known)
            check_whole(shapes, known)
        except InvalidStateError as error:
            raise EngineRefused(self.name, str(error)) from error

    async def begin_update(self, version: int) -> None:
        async with self._control_call():
            before = self.state
            after = before.beginning(version)
            await self._require_only_owner()
            await self._calls.enter(after)
            try:
                if not before.asleep:
                    await self._interrupt()
                if self._dangling:
                    await self._abort_update()
                    self._dangling = False
                self._dangling = True
                await self._open_update()
                self._dangling = False
            except BaseException:
                await self._restore(before)
                raise
            self._sent.clear()
            self._loaded.clear()
            self._arrived = ""

    async def load(self, bucket: Bucket, *, deadline: float) -> None:
        async with self._control_call(beside_loads=True):
            after = self.state.loading()
            facts = await self._facts()
            check_takes(bucket, facts.info)
            names = names_in(bucket, facts.model)
            if twice := self._sent & names:
                raise InvalidStateError(
                    f"{min(twice)} was already sent in this update; roll the update back and begin again"
                )
            send = self._loader(bucket, facts)
            self._sent |= names
            await self._calls.enter(after)  # before the call: even if it fails, the weights may have changed
            self._holds = ""
            self._loads.add(ended := asyncio.get_running_loop().create_future())
        try:
            with self._as_refusal():
                await send(deadline)
        finally:
            self._loads.discard(ended)
            ended.set_result(None)
        self._loaded |= names
        self._arrived = bucket.digest if isinstance(bucket, DiskBucket) and names == self._sent else ""

    async def commit(self) -> None:
        async with self._control_call():
            after, version = self.state.committing(), self.state.updating
            assert version is not None
            check_whole(self._loaded, (await self._facts()).model.shapes)
            await self._require_only_owner()
            await self._commit(version)
            self._holds, self._left_at = self._arrived, version
            self._loras.detach_all()
            self._calls.rewrite(self._loras.served)
            await self._enter(after)

    async def rollback(self) -> None:
        async with self._control_call():
            if self.state.updating is None:
                return
            after = self.state.rolling_back()
            try:
                await self._abort_update()
            except BaseException:
                self._dangling = True
                await self._calls.enter(after)
                raise
            await self._enter(after)
            if after.torn:
                raise EngineRefused(
                    self.name, "its old weights are overwritten; publish a whole version before it can serve again"
                )

    async def load_lora(self, name: str, path: str, *, deadline: float = CONTROL_DEADLINE) -> None:
        async with self._control_call():
            if Capability.LORA not in (await self._facts()).info.capabilities:
                raise EngineRefused(
                    self.name, "it takes no LoRA adapters; start it with engine_args: {enable_lora: true}"
                )
            self.state.adapting()
            self._loras.book(name, await self._load_lora(name, path, deadline))

    async def unload_lora(self, name: str, *, deadline: float = CONTROL_DEADLINE) -> None:
        async with self._control_call():
            await self._unload_lora(name, self._loras.unbook(name), deadline)

    async def _unload_leftover_loras(self) -> None:
        """Unload the published LoRA adapters that an earlier trainer left on a server that is attached to."""
        if Capability.LORA in (await self._facts()).info.capabilities:
            for model in (await self._ask("/v1/models"))["data"]:
                if model["id"].startswith(PUBLISHED_LORA):
                    await self._unload_lora(model["id"], None, CONTROL_DEADLINE)

    async def join_group(self, group: ProcessGroup, *, deadline: float) -> None:
        end = time.monotonic() + deadline
        ranks = (await self._facts()).info.ranks
        if group.rank_offset + ranks > group.world_size:
            raise EngineRefused(
                self.name,
                f"its {ranks} ranks, from rank {group.rank_offset} on, do not fit into a group of {group.world_size}",
            )
        # Wait for the sender first: a server that can't reach it hangs completely.
        while not await listens(group.address, group.port):
            if time.monotonic() + IDLE_POLL_SECONDS >= end:
                raise EngineTimeout(self.name, f"group {group.name}: nothing listens at {group.address}:{group.port}")
            await asyncio.sleep(IDLE_POLL_SECONDS)
        await self._join(group, end - time.monotonic())

    async def health(self, *, deadline: float = 5.0) -> Health:
        try:
            await self._probe(deadline)
        except EngineTimeout:
            return Health.BUSY
        except LocalError:
            return Health.UNKNOWN
        except EngineError:
            return Health.DEAD
        if self.state.asleep:
            return Health.ASLEEP
        return Health.READY if self.state.generating else Health.PAUSED

    async def _read_model(self, served: Path) -> Model:
        """Read the model's folder: `model_path`, or `served`, which the server names.

        Raises EngineRefused if it can't be read on this host, or if the two folders hold different models.
        """
        try:
            model = await asyncio.to_thread(read_model, self._model_path or served)
            if (served / "config.json").is_file():
                own = await asyncio.to_thread(read_model, served)
                if own.shapes != model.shapes:
                    raise EngineRefused(
                        self.name, f"it serves {served}, whose tensors differ from those of {self._model_path}"
                    )
        except DataError as error:
            raise EngineRefused(self.name, f"{error}; give the model's folder as model_path") from error
        return model

    @asynccontextmanager
    async def _registered(self, request: GenerateRequest) -> AsyncIterator[Call]:
        """Track a generation, and abort it on the server if the block raises or is cancelled."""
        facts = await self._facts()
        with self._refusing(request):
            self._check(request, facts)
            request = self._loras.served(request)
        with self._calls.register(request) as call:
            try:
                yield call
            except BaseException:
                if call.sent:
                    # If this fails, the server still sees the closed connection.
                    with suppress(EngineError):
                        await self._abandon(call.served_as)
                raise

    @asynccontextmanager
    async def _control_call(self, *, beside_loads: bool = False) -> AsyncIterator[None]:
        """Hold the control lock. An InvalidStateError or DataError in the block becomes EngineRefused.

        beside_loads: do not wait for loads that run.
        """
        try:
            async with asyncio.timeout(CONTROL_DEADLINE):
                await self._controls.acquire()
                try:
                    while self._loads and not beside_loads:
                        await asyncio.wait(self._loads)
                except BaseException:
                    self._controls.release()
                    raise
        except TimeoutError:
            raise EngineTimeout(self.name, "another control call is still running") from None
        try:
            with self._as_refusal():
                yield
        finally:
            self._controls.release()

    @contextmanager
    def _as_refusal(self) -> Iterator[None]:
        """Raise EngineRefused instead of InvalidStateError or DataError."""
        try:
            yield
        except (InvalidStateError, DataError) as error:
            raise EngineRefused(self.name, str(error)) from error

    async def _abort_until_ended(
        self, served: Sequence[str], abort: Callable[[Sequence[str]], Awaitable[None]]
    ) -> None:
        """Abort requests repeatedly until they have returned, or ABORT_DEADLINE passes.

        One abort is not enough: it misses a request that has not reached the scheduler yet. The deadline is needed
        because a stream ends only as fast as its reader reads it.
        """
        end, awaited = time.monotonic() + ABORT_DEADLINE, set(served)
        while (left := [name for name in self._calls.sent if name in awaited]) and time.monotonic() < end:
            await abort(left)
            await self._calls.until_returned(left, IDLE_POLL_SECONDS)

    async def _enter(self, state: ServerState) -> None:
        """Enter `state`. Resume the server if the new state allows it."""
        if state.generating and self._stopped:
            await self._resume_server()
            self._stopped = False
        await self._calls.enter(state)

    async def _restore(self, state: ServerState) -> None:
        """Return to `state` after a failed call, as far as possible. Does not raise EngineError."""
        await self._calls.enter(state)
        with suppress(EngineError):
            await self._enter(state)

    async def _stop(self, mode: PauseMode) -> None:
        self._stopped = True
        await self._pause_server(mode)

    async def _interrupt(self) -> None:
        """End every request on the server before an update. This adapter's requests continue afterwards."""
        if self._stopped:
            await self._resume_server()  # a paused server does not abort
        self._calls.interrupt()
        await self._stop(PauseMode.ABORT)
        await self._drop_cache()

    async def _drop_cache(self) -> None:
        """Drop every cached prefix. The server has just been paused with PauseMode.ABORT."""
        await self.flush_cache()

    async def _drain(self) -> None:
        """Wait until no request runs, and pause the server so that none begins."""
        if self.state.paused is not None and self._calls.sent:
            raise InvalidStateError("requests are paused half-way; resume or abort them before the engine sleeps")
        end = time.monotonic() + DRAIN_DEADLINE
        while True:
            await self.flush_cache(deadline=end - time.monotonic())
            if self._stopped:
                return
            await self._stop(PauseMode.KEEP)
            with suppress(EngineTimeout):  # another client's request came in between
                await self.flush_cache(deadline=ABORT_DEADLINE)
                return
            await self._resume_server()
            self._stopped = False
