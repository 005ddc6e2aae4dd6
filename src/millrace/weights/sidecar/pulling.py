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
from millrace.weights.sidecar.messages import Form, Handle, PullBody, Pulled, Session
from millrace.weights.sidecar.server import Job, body_of
from millrace.weights.ucx import Endpoint, Region, load

IDLE_SECONDS = 600.0  # the memory of a trainer that sends nothing for this time is freed

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
            handle = await loop.run_in_executor(self._thread, self._serve, body, ends)
        except MillraceError as error:
            logger.error("%s", error)
            return web.Response(text=str(error), status=500)
        pulled = Pulled(handle=handle, answers=self._answering.paths(body.session, body.slot, body.shares))
        return web.Response(text=pulled.model_dump_json(), content_type="application/json")

    async def _end(self, http: web.Request) -> web.Response:
        await self._release((await body_of(http, Session)).session)
        return reply({"success": True})

    def _release(self, session: str) -> asyncio.Future[None]:
        """Abandon the session's READ, and free its memory."""
        if self._latest == session:
            self._latest = ""
            self._answering.close()
        return asyncio.get_running_loop().run_in_executor(self._thread, self._forget, session)

    # The methods below run in the thread.

    def _serve(self, body: PullBody, ends: float) -> Handle:
        """Read the bucket, and return a handle for the engines. Raises PublishError if it can't be read, or if there is
        no room."""

        def why_not() -> str | None:
            if self._latest != body.session:
                return "the trainer has ended this session, or another trainer has begun one"
            return "it took too long" if time.monotonic() > ends else None

        if (reason := why_not()) is not None:
            raise PublishError(f"the bucket was not read: {reason}")
        if self._session != (body.session, body.form):
            self._close()
            self._endpoint = Endpoint(lambda size: new_slot(body.form, size, self._device), self._device)
            self._session = (body.session, body.form)
            logger.info("session %s begins", body.session)
        assert self._endpoint is not None
        slot = self._endpoint.slot(body.slot, body.nbytes, unread=True)
        begun = time.monotonic()
        source = Region(body.address, body.nbytes, body.gpu)
        reason = self._endpoint.read(body.agent, source, body.slot, body.nbytes, why_not)
        if reason is not None:
            self._close()
            raise PublishError(f"the bucket was not read: {reason}")
        logger.debug("%.1f MB in %.3f s", body.nbytes / 1e6, time.monotonic() - begun)
        return handle_of(slot, body.shares)

    def _forget(self, session: str) -> None:
        if self._session is not None and self._session[0] == session:
            self._close()

    def _close(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close(unread=True)  # other endpoints never read a sidecar's slots
        self._endpoint, self._session = None, None
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
