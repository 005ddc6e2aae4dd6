"""The routes for weights and memory. They run one at a time."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from aiohttp import web

from millrace.buckets import TensorSpec
from millrace.checksum import checksum
from millrace.engines.embedded.core import Refused
from millrace.engines.embedded.faults import HttpFaults
from millrace.engines.embedded.groups import UpdateGroup
from millrace.engines.embedded.peers import TICKET_SECONDS, Tickets, chunks_of, header_of, load_from_peer
from millrace.engines.embedded.protocol import (
    CheckBody,
    DiskBody,
    DistributedBody,
    EmptyBody,
    GroupBody,
    GroupNameBody,
    LoadLoraBody,
    OfferBody,
    PeerBody,
    RenameBody,
    SharedMemoryBody,
    TagsBody,
    UnloadLoraBody,
    VersionBody,
    parse,
)
from millrace.engines.embedded.replies import done, refusal
from millrace.engines.embedded.thread import ModelThread
from millrace.engines.embedded.weights import UpdateRefused, WeightStore
from millrace.http.replies import reply

log = logging.getLogger("millrace.embedded")

T = TypeVar("T")
TURN_DEADLINE = 120.0  # seconds that an operation waits for the previous one, at worst a load of many gigabytes
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Updates:
    """The operations on weights and memory.

    Loads run in the loader thread, so generation and the event loop do not wait for them. Operations that change the
    served weights or free memory run in the model thread, between two steps.
    """

    def __init__(self, thread: ModelThread, faults: HttpFaults) -> None:
        self._thread, self._faults = thread, faults
        self._turn = asyncio.Lock()
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._group: UpdateGroup | None = None
        self._tickets = Tickets()

    def routes(self) -> dict[str, Handler]:
        return {
            "/begin_weight_update": self._begin,
            "/update_weights_from_shared_memory": self._load_shared_memory,
            "/update_weights_from_distributed": self._load_broadcast,
            "/update_weights_from_disk": self._load_disk,
            "/update_weights_from_peer": self._load_peer,
            "/offer_weights": self._offer,
            "/end_weight_update": self._end,
            "/abort_weight_update": self._abort,
            "/init_weights_update_group": self._join,
            "/destroy_weights_update_group": self._leave,
            "/update_weight_version": self._rename,
            "/weights_checker": self._check,
            "/load_lora_adapter": self._load_lora,
            "/unload_lora_adapter": self._unload_lora,
            "/release_memory_occupation": self._release,
            "/resume_memory_occupation": self._resume,
        }

    @asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[WeightStore]:
        try:
            await asyncio.wait_for(self._turn.acquire(), TURN_DEADLINE)
        except TimeoutError:
            raise Refused(f"another weight operation has not ended within {TURN_DEADLINE:.0f} s", status=503) from None
        try:
            yield self._thread.ready.result().weights
        finally:
            self._turn.release()

    async def _run_in_loader(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loader, work)

    async def _begin(self, http: web.Request) -> web.Response:
        parse(EmptyBody, await http.read())
        async with self._exclusive() as weights:
            await self._run_in_loader(weights.begin)
            self._faults.begin_session()
        return _done("the update is open")

    async def _load_shared_memory(self, http: web.Request) -> web.Response:
        body = parse(SharedMemoryBody, await http.read())
        async with self._exclusive() as weights:
            await self._load(body.specs(), lambda specs: weights.load_shared_memory(body.path, specs))
        return done(f"{len(body.tensors)} tensors are staged")

    async def _load_broadcast(self, http: web.Request) -> web.Response:
        body = parse(DistributedBody, await http.read())
        async with self._exclusive() as weights:
            group = self._group
            if group is None or group.name != body.group_name:
                raise UpdateRefused(
                    f"no group {body.group_name} has been joined; call /init_weights_update_group first"
                )
            await self._load(body.specs(), lambda specs: weights.load_broadcast(specs, group.receive))
        return done(f"{len(body.names)} tensors are staged")

    async def _load(self, specs: list[TensorSpec], load: Callable[[list[TensorSpec]], None]) -> None:
        fails = self._faults.refuses_load()
        await self._run_in_loader(lambda: load(specs[: len(specs) // 2] if fails else specs))
        if fails:
            raise Refused("injected fault: this load failed half-way", status=500)

    async def _load_disk(self, http: web.Request) -> web.Response:
        """Load a folder: as one load of the open update, or else as a whole update, all or nothing."""
        body = parse(DiskBody, await http.read())
        async with self._exclusive() as weights:
            folder = Path(body.model_path)
            if await self._run_in_loader(lambda: weights.in_session):
                if body.weight_version is not None:
                    raise UpdateRefused("an update is open: set weight_version at its end, not in this call")
                if self._faults.refuses_load():
                    raise Refused("injected fault: this load failed", status=500)
                await self._run_in_loader(lambda: weights.load_folder(folder))
                return done(f"{folder} is staged")
            version = body.weight_version or self._thread.current().version
            committed = False
            try:
                await self._run_in_loader(weights.begin)
                await self._run_in_loader(lambda: weights.load_folder(folder))
                await self._run_in_loader(weights.check_complete)
                await self._thread.call(lambda core: core.commit(version))
                committed = True
            finally:
                if not committed:  # dropped before the next operation, also if this caller has left
                    await asyncio.shield(self._run_in_loader(weights.abort))
        return _done(f"{folder} is served as version {version}")

    async def _load_peer(self, http: web.Request) -> web.Response:
        body = parse(PeerBody, await http.read())
        async with self._exclusive() as weights:
            if self._faults.refuses_load():
                raise Refused("injected fault: this load failed", status=500)
            count = await self._run_in_loader(lambda: load_from_peer(weights, body))
        return done(f"{count} tensors are staged")

    async def _offer(self, http: web.Request) -> web.Response:
        """Return a ticket with which another engine can read served tensors once."""
        names = parse(OfferBody, await http.read()).names
        return reply({"ticket": self._tickets.new(names), "weight_version": self._thread.current().version})

    async def give(self, http: web.Request) -> web.StreamResponse:
        """Send the tensors that were offered. If they change meanwhile, the receiver's checksums are wrong, and it
        drops them."""
        names = self._tickets.take(http.headers.get("Authorization"))
        if names is None:
            return refusal("this route needs a ticket of /offer_weights, as in: Authorization: Bearer TICKET", 401)
        weights = self._thread.ready.result().weights
        tensors = await self._run_in_loader(lambda: weights.served(names))
        response = web.StreamResponse()
        async with asyncio.timeout(TICKET_SECONDS):  # for a receiver that has stopped reading
            await response.prepare(http)
            await response.write(header_of(tensors))
            for tensor in tensors.values():
                for chunk in await self._run_in_loader(partial(chunks_of, tensor)):
                    await response.write(chunk)
            await response.write_eof()
        return response

    async def _end(self, http: web.Request) -> web.Response:
        body = parse(VersionBody, await http.read())
        async with self._exclusive() as weights:
            await self._run_in_loader(weights.check_complete)
            await self._thread.call(lambda core: core.commit(body.weight_version))
        return _done(f"version {body.weight_version} is served")

    async def _abort(self, http: web.Request) -> web.Response:
        parse(EmptyBody, await http.read())
        async with self._exclusive() as weights:
            await self._run_in_loader(weights.abort)
        return _done("no update is open; the served weights are as they were")

    async def _join(self, http: web.Request) -> web.Response:
        body = parse(GroupBody, await http.read())
        async with self._exclusive():
            if self._group is not None:  # its trainer could not say that it has ended, or is gone
                left, self._group = self._group, None
                await self._run_in_loader(left.close)
            self._group = await self._run_in_loader(
                lambda: UpdateGroup(
                    body.master_address,
                    body.master_port,
                    rank=body.rank_offset,
                    world_size=body.world_size,
                    name=body.group_name,
                    backend=body.backend,
                    timeout=body.timeout,
                )
            )
        return _done(f"group {body.group_name} is joined")

    async def _leave(self, http: web.Request) -> web.Response:
        body = parse(GroupNameBody, await http.read())
        async with self._exclusive():
            if self._group is None or self._group.name != body.group_name:
                raise UpdateRefused(f"no group {body.group_name} has been joined")
            group, self._group = self._group, None
            await self._run_in_loader(group.close)
        return _done(f"group {body.group_name} is left")

    async def _rename(self, http: web.Request) -> web.Response:
        body = parse(RenameBody, await http.read())
        async with self._exclusive():
            if body.abort_all_requests:
                await self._thread.call(lambda core: core.abort(lambda _: True, "the weight version was renamed"))
            await self._thread.call(lambda core: core.rename(body.new_version))
        return reply({"success": True, "message": "the weight version is renamed", "new_version": body.new_version})

    async def _check(self, http: web.Request) -> web.Response:
        lora = parse(CheckBody, await http.read()).lora_name
        async with self._exclusive() as weights:
            if lora is None:
                sums = await self._run_in_loader(weights.checksums)
            else:
                sums = await self._thread.call(lambda core: core.lora_checksums(lora))
        one_rank = {
            "checksums": sums,
            "per_gpu_checksum": checksum(memoryview("".join(sums[name] for name in sorted(sums)).encode())),
            "parallelism_info": [
                {
                    "role": "target",
                    **dict.fromkeys(("tp_rank", "dp_rank", "pp_rank", "rank"), 0),
                    **dict.fromkeys(("tp_size", "dp_size", "pp_size", "size"), 1),
                }
            ],
        }
        return reply({"success": True, "message": f"{len(sums)} tensors", "ranks": [one_rank]})

    async def _load_lora(self, http: web.Request) -> web.Response:
        body = parse(LoadLoraBody, await http.read())
        async with self._exclusive():
            self._faults.begin_session()
            if self._faults.refuses_load():
                raise Refused("injected fault: this adapter was refused")
            linears = self._thread.ready.result().linears
            lora = await self._run_in_loader(lambda: linears.read(Path(body.lora_path)))
            await self._thread.call(lambda core: core.load_lora(body.lora_name, lora))
        return _done(f"adapter {body.lora_name} is loaded")

    async def _unload_lora(self, http: web.Request) -> web.Response:
        name = parse(UnloadLoraBody, await http.read()).lora_name
        async with self._exclusive():
            await self._thread.call(lambda core: core.unload_lora(name))
        return _done(f"adapter {name} is unloaded")

    async def _release(self, http: web.Request) -> web.Response:
        tags = parse(TagsBody, await http.read()).memory()
        async with self._exclusive():
            await self._thread.call(lambda core: core.sleep(tags))
        return _done("released: " + ", ".join(sorted(tags)))

    async def _resume(self, http: web.Request) -> web.Response:
        tags = parse(TagsBody, await http.read()).memory()
        async with self._exclusive():
            await self._thread.call(lambda core: core.wake(tags))
        return _done("resumed: " + ", ".join(sorted(tags)))


def _done(event: str) -> web.Response:
    """Return a success answer, and log it."""
    log.info(event)
    return done(event)
