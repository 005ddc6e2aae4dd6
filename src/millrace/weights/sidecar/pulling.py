"""The sidecar job that reads buckets from a trainer's memory over UCX, once for all engines of its host. The engines
open its memory in the same way as they open the memory of a local trainer, so stock engines need no support for UCX."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from aiohttp import web

from millrace.errors import MillraceError, PublishError
from millrace.http.replies import reply
from millrace.weights.sidecar.answers import Answering
from millrace.weights.sidecar.handles import AnySlot, handle_of, new_slot
from millrace.weights.sidecar.messages import Form, Handle, PullBody, Pulled, Session, Source
from millrace.weights.sidecar.server import Job, body_of
from millrace.weights.ucx import Endpoint, Region, load

IDLE_SECONDS = 600.0  # the memory of a trainer that sends nothing for this time is freed
LOADING_SECONDS = 60.0  # after a READ that failed, for engines that still load the bucket before

logger = logging.getLogger(__name__)


class Pulling(Job):
    """Reads buckets for one trainer at a time. When another trainer asks, the READ of the earlier trainer is abandoned,
    and its slots are freed.

    device: where the slots are; the same kind of memory as the engines'.

    Raises ConfigError if NIXL is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        load()
        self.does = f"reads weights over UCX, to the {'GPU' if device.type == 'cuda' else 'CPU'} here"
        self._device = device
        self._thread = ThreadPoolExecutor(1, "sidecar")
        self._latest = ""  # the session that asked last
        self._release_timer: asyncio.TimerHandle | None = None
        self._answering = Answering()
        # Used by the thread only:
        self._session: tuple[str, Form] | None = None
        self._endpoint: Endpoint[AnySlot] | None = None
        self._has_bucket = False  # whether it has read one
        self._readable_until = 0.0  # when no other sidecar can be reading the slots any more

    def routes(self) -> Sequence[web.RouteDef]:
        return [
            web.post("/pull", self._pull),
            web.post("/end", self._end),
            web.get("/session", self._report_session),
            *self._answering.routes(),
        ]

    async def _report_session(self, http: web.Request) -> web.Response:  # noqa: ARG002
        return reply({"session": self._session[0] if self._session is not None else ""})

    async def _pull(self, http: web.Request) -> web.Response:
        body = await body_of(http, PullBody)
        if (body.form is Form.CUDA_IPC) != (self._device.type == "cuda"):
            needed = "cuda" if body.form is Form.CUDA_IPC else "cpu"
            return web.Response(
                text=f"its memory is on the {self._device.type}, but the engines here open {body.form.value}: start it "
                f"with --device {needed}",
                status=400,
            )
        loop = asyncio.get_running_loop()
        ends, self._latest = time.monotonic() + body.seconds, body.session
        if self._release_timer is not None:
            self._release_timer.cancel()
        self._release_timer = loop.call_later(body.seconds + IDLE_SECONDS, self._release, body.session)
        try:
            handle, source = await loop.run_in_executor(self._thread, self._serve, loop, body, ends)
        except MillraceError as error:
            logger.error("%s", error)
            return web.Response(text=str(error), status=500)
        answers = self._answering.paths(body.session, body.slot, body.shares)
        pulled = Pulled(handle=handle, source=source, answers=answers)
        return web.Response(text=pulled.model_dump_json(), content_type="application/json")

    async def _end(self, http: web.Request) -> web.Response:
        body = await body_of(http, Session)
        await self._release(body.session, unread=body.unread)
        return reply({"success": True})

    def _release(self, session: str, *, unread: bool = True) -> asyncio.Future[None]:
        """Abandon the session's READ, and free its memory.

        unread: whether it is certain that no other sidecar is reading it.
        """
        if self._latest == session:
            self._latest = ""
            self._answering.close()
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._thread, self._forget, loop, session, unread)

    # The methods below run in the thread.

    def _serve(self, loop: asyncio.AbstractEventLoop, body: PullBody, ends: float) -> tuple[Handle, Source]:
        """Read the bucket. Return a handle for the engines, and where other sidecars can read it.

        Raises PublishError if it can't be read, or if there is no room."""

        def why_not() -> str | None:
            if self._latest != body.session:
                return "the trainer has ended this session, or another trainer has begun one"
            return "it took too long" if time.monotonic() > ends else None

        if (reason := why_not()) is not None:
            raise PublishError(f"the bucket was not read: {reason}")
        if self._session != (body.session, body.form):
            self._retire(loop)
            self._endpoint = Endpoint(lambda size: new_slot(body.form, size, self._device), self._device)
            self._session, self._has_bucket = (body.session, body.form), False
            logger.info("session %s begins", body.session)
        assert self._endpoint is not None
        begun = time.monotonic()
        if body.unread:
            self._readable_until = begun
        slot = self._endpoint.slot(body.slot, body.nbytes, unread=self._readable_until <= begun)
        source = Region(body.source.address, body.nbytes, body.source.gpu)
        reason = self._endpoint.read(body.source.agent, source, body.slot, body.nbytes, why_not)
        if reason is not None:
            if self._has_bucket:
                self._readable_until = max(self._readable_until, time.monotonic() + LOADING_SECONDS)
            self._retire(loop)
            raise PublishError(f"the bucket was not read: {reason}")
        logger.debug("%.1f MB in %.3f s", body.nbytes / 1e6, time.monotonic() - begun)
        self._readable_until, self._has_bucket = max(self._readable_until, begun + body.readable), True
        region = self._endpoint.region(body.slot)
        here = Source(agent=self._endpoint.metadata(), address=region.address, gpu=region.gpu)
        return handle_of(slot, body.shares), here

    def _forget(self, loop: asyncio.AbstractEventLoop, session: str, unread: bool) -> None:
        if self._session is not None and self._session[0] == session:
            if unread:
                self._readable_until = 0.0
            self._retire(loop)

    def _retire(self, loop: asyncio.AbstractEventLoop) -> None:
        """Free the endpoint and its slots when no other sidecar can be reading them any more."""
        endpoint, self._endpoint, self._session = self._endpoint, None, None
        if endpoint is None:
            return
        seconds = self._readable_until - time.monotonic()
        if seconds <= 0:
            self._free(endpoint)
            return

        def free() -> None:
            loop.run_in_executor(self._thread, self._free, endpoint)

        loop.call_soon_threadsafe(loop.call_later, seconds, free)

    def _free(self, endpoint: Endpoint[AnySlot]) -> None:
        endpoint.close(unread=True)
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
