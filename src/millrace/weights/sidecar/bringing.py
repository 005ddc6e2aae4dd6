"""The sidecar job that brings versions from a store. Stock engines can't apply a delta; they read the whole version
from the folder that the sidecar returns."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from millrace.errors import MillraceError
from millrace.http.replies import reply
from millrace.weights.mirror import CheckpointMirror
from millrace.weights.sidecar.server import Job, body_of

logger = logging.getLogger(__name__)


class BringBody(BaseModel):
    """The body of `POST /bring`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: NonNegativeInt


class Bringing(Job):
    """Brings one version at a time into `mirror`. A version is completed even if its caller has disconnected."""

    def __init__(self, mirror: CheckpointMirror, store: str) -> None:
        self.does = f"brings versions from {store}"
        self._mirror = mirror
        self._thread = ThreadPoolExecutor(1, "sidecar")

    def routes(self) -> Sequence[web.RouteDef]:
        return [web.post("/bring", self._bring)]

    async def _bring(self, http: web.Request) -> web.Response:
        version = (await body_of(http, BringBody)).version
        try:
            path, digest = await asyncio.get_running_loop().run_in_executor(self._thread, self._mirror.bring, version)
        except MillraceError as error:
            logger.error("version %d: %s", version, error)
            return web.Response(text=str(error), status=500)
        logger.info("version %d is in %s", version, path)
        return reply({"path": str(path), "digest": digest})
