"""What adapters of stock engines do alike: an engine that keeps no state of its own gets one here, and is sent nothing
that would harm it in that state. A subclass says how its server is asked."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from millrace.engines.base import PUBLISHED_LORA
from millrace.engines.http_engine import ABORT_DEADLINE, CONTROL_DEADLINE, IDLE_POLL_SECONDS
from millrace.engines.stock.calls import Call, Calls
from millrace.engines.stock.facts import Facts, check_takes
from millrace.engines.stock.lora import LoadedLoras
from millrace.engines.stock.model import Model, names_in, read_model
from millrace.engines.stock.server import StockServer
from millrace.engines.stock.state import InvalidStateError, ServerState
from millrace.engines.stock.tensors import check_shapes, check_whole
from millrace.errors import DataError, EngineError, EngineFailed, EngineRefused, EngineTimeout, LocalError
from millrace.http import HttpClient
from millrace.launch.ports import listens
from millrace.types import (
    ALL_MEMORY,
    Bucket,
    Capability,
    GenerateRequest,
    Generation,
    Health,
    MemoryTag,
    PauseMode,
    ProcessGroup,
)

DRAIN_DEADLINE = 30.0


class StockEngine(StockServer):
    """The server at `url`, which no other controls; others may generate.

    model_path: the model's folder, for the size of its vocabulary; None: the one that the server names, which must be
    readable here.
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
        self._facts_read: Facts | None = None
        self._calls = Calls(name)
        self._loras = LoadedLoras()
        self._controls = asyncio.Lock()  # one control call at a time; abort and the questions pass
        self._stopped = False  # whether the server itself was told to pause
        self._dangling = False  # whether the server may still have an update open that was given up here
        self._sent: set[str] = set()  # the tensors of the update that is under way
        self._loaded: set[str] = set()  # those of them that the server has

    @property
    def state(self) -> ServerState:
        """What this adapter has brought the server into."""
        return self._calls.state

    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        end = time.monotonic() + deadline
        async with self._calling(request) as call:
            while await self._calls.go_on(call, end):
                made = await self._generate(self._http, call.rest, end - time.monotonic())
                call.continuation.add(made)
            return call.continuation.result

    async def generate_by(
        self, router: HttpClient, request: GenerateRequest, *, headers: Mapping[str, str], deadline: float
    ) -> Generation:
        try:
            self._check(request, await self._facts())
        except InvalidStateError as error:
            raise EngineRefused(self.name, f"request {request.request_id}: {error}") from error
        return await self._generate(router, request, deadline, headers)

    async def abort_by_router(self, request_id: str) -> None:
        await self._abort([request_id])

    async def stream(self, request: GenerateRequest, *, deadline: float) -> AsyncGenerator[Generation, None]:
        end = time.monotonic() + deadline
        async with self._calling(request) as call:
            while await self._calls.go_on(call, end):
                part = None
                async for made, finished in self._follow(call.rest, end - time.monotonic()):
                    part = made
                    if not finished:
                        yield call.continuation.with_part(part)
                if part is None:
                    raise EngineFailed(self.name, "generate answered with an empty stream")
                call.continuation.add(part)
            yield call.continuation.result

    async def abort(self, request_id: str | None = None) -> None:
        served = await self._calls.abort(request_id)
        if request_id is not None:
            await self._until_ended(served, self._abort)
            return
        await self._abort_all(served)
        await self._until_ended(served, self._abort_all)

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
            if after.asleep == before.asleep:
                return
            if Capability.SLEEP not in (await self._facts()).info.capabilities:
                raise EngineRefused(self.name, self._why_no_sleep())
            await self._calls.enter(after)
            if not before.asleep:
                try:
                    await self._drain()
                except BaseException:
                    await self._back_to(before)
                    raise
            await self._release(before, after)

    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        async with self._controlling():
            if stale := what & self.state.asleep:
                await self._take_back(stale)
                await self._become(self.state.waking(what))

    async def check_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        known = (await self._facts()).model.shapes
        try:
            check_shapes(shapes.items(), known)
            check_whole(shapes, known)
        except InvalidStateError as error:
            raise EngineRefused(self.name, str(error)) from error

    async def begin_update(self, version: int) -> None:
        async with self._controlling():
            before = self.state
            await self._calls.enter(before.beginning(version))
            try:
                if not before.asleep:
                    await self._interrupt()
                if self._dangling:
                    await self._give_up()
                    self._dangling = False
                self._dangling = True
                await self._open_update()
                self._dangling = False
            except BaseException:
                await self._back_to(before)
                raise
            self._sent.clear()
            self._loaded.clear()

    async def load(self, bucket: Bucket, *, deadline: float) -> None:
        async with self._controlling():
            after = self.state.loading()
            facts = await self._facts()
            check_takes(bucket, facts.info)
            names = names_in(bucket, facts.model)
            if twice := self._sent & names:
                raise InvalidStateError(f"{min(twice)} was sent in this update already; roll it back and begin again")
            send = self._loader(bucket, facts)
            self._sent |= names
            await self._calls.enter(after)  # whatever comes back, the server may have changed
            await send(deadline)
            self._loaded |= names

    async def commit(self) -> None:
        async with self._controlling():
            after, version = self.state.committing(), self.state.updating
            assert version is not None
            check_whole(self._loaded, (await self._facts()).model.shapes)
            await self._commit(version)
            self._loras.detach_all()
            self._calls.rewrite(self._loras.served)
            await self._become(after)

    async def rollback(self) -> None:
        async with self._controlling():
            if self.state.updating is None:
                return
            after = self.state.rolling_back()
            try:
                await self._give_up()
            except BaseException:
                self._dangling = True
                await self._calls.enter(after)
                raise
            await self._become(after)
            if after.torn:
                raise EngineRefused(self.name, "its old weights are overwritten; it serves again after a whole version")

    async def load_lora(self, name: str, path: str, *, deadline: float = CONTROL_DEADLINE) -> None:
        async with self._controlling():
            if Capability.LORA not in (await self._facts()).info.capabilities:
                raise EngineRefused(self.name, "it takes no adapters; start it with engine_args: {enable_lora: true}")
            self.state.adapting()
            self._loras.book(name, await self._load_lora(name, path, deadline))

    async def unload_lora(self, name: str, *, deadline: float = CONTROL_DEADLINE) -> None:
        async with self._controlling():
            await self._unload_lora(name, self._loras.unbook(name), deadline)

    async def _clear_up(self) -> None:
        """Of a server that somebody else started: the adapters that a trainer left who died."""
        if Capability.LORA in (await self._facts()).info.capabilities:
            for model in (await self._ask("/v1/models"))["data"]:
                if model["id"].startswith(PUBLISHED_LORA):
                    await self._unload_lora(model["id"], None, CONTROL_DEADLINE)

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

    async def _facts(self) -> Facts:
        """What does not change while the server runs: read once."""
        if self._facts_read is None:
            self._facts_read = await self._read_facts()
        return self._facts_read

    async def _read_model(self, served: Path) -> Model:
        """The model in the folder `served`, which the server names. Raises EngineRefused where it can't be read here,
        or is not the one in `model_path`."""
        try:
            model = await asyncio.to_thread(read_model, self._model_path or served)
            if (served / "config.json").is_file():
                own = await asyncio.to_thread(read_model, served)
                if own.shapes != model.shapes:
                    raise EngineRefused(
                        self.name, f"it serves {served}, a model of other tensors than {self._model_path}"
                    )
        except DataError as error:
            raise EngineRefused(self.name, f"{error}; give the model's folder as model_path") from error
        return model

    @asynccontextmanager
    async def _calling(self, request: GenerateRequest) -> AsyncIterator[Call]:
        """Registers a generation, and aborts it on the server where it is given up."""
        try:
            self._check(request, await self._facts())
            request = self._loras.served(request)
        except InvalidStateError as error:
            raise EngineRefused(self.name, f"request {request.request_id}: {error}") from error
        with self._calls.register(request) as call:
            try:
                yield call
            except BaseException:
                if call.sent:
                    # Nobody waits for it any more. Where this fails the server sees the closed connection.
                    with suppress(EngineError):
                        await self._abort([call.served_as])
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
        except (InvalidStateError, DataError) as error:
            raise EngineRefused(self.name, str(error)) from error
        finally:
            self._controls.release()

    async def _until_ended(self, served: Sequence[str], abort: Callable[[Sequence[str]], Awaitable[None]]) -> None:
        """Aborts again and again until they have come back, since one that is on its way to the scheduler is not hit;
        up to a deadline, since a stream comes back only as fast as it is read."""
        end, awaited = time.monotonic() + ABORT_DEADLINE, set(served)
        while (left := [name for name in self._calls.sent if name in awaited]) and time.monotonic() < end:
            await abort(left)
            await asyncio.sleep(IDLE_POLL_SECONDS)

    async def _become(self, state: ServerState) -> None:
        """Enters `state`, and lets the server go on where it may."""
        if state.generating and self._stopped:
            await self._go_on()
            self._stopped = False
        await self._calls.enter(state)

    async def _back_to(self, state: ServerState) -> None:
        """After a failure that is being raised: what can be undone is."""
        await self._calls.enter(state)
        with suppress(EngineError):
            await self._become(state)

    async def _stop(self, mode: PauseMode) -> None:
        self._stopped = True
        await self._halt(mode)

    async def _interrupt(self) -> None:
        """Empties the server before an update. What ran goes on afterwards, from the tokens that it has."""
        if self._stopped:
            await self._go_on()  # a paused server does not abort
        self._calls.interrupt()
        await self._stop(PauseMode.ABORT)
        await self._forget()

    async def _forget(self) -> None:
        """Drops every cached prefix. The server has just been paused with ABORT."""
        await self.flush_cache()

    async def _drain(self) -> None:
        """Waits until nothing runs, and pauses the server so that nothing else begins."""
        if self.state.paused is not None and self._calls.sent:
            raise InvalidStateError("requests are paused in the middle; resume or abort them before the engine sleeps")
        end = time.monotonic() + DRAIN_DEADLINE
        while True:
            await self.flush_cache(deadline=end - time.monotonic())
            if self._stopped:
                return
            await self._stop(PauseMode.KEEP)
            with suppress(EngineTimeout):  # a request of somebody else slipped in between
                await self.flush_cache(deadline=ABORT_DEADLINE)
                return
            await self._go_on()
            self._stopped = False
