"""The sidecar job that brings versions from a store. Engines read the whole version from the folder that the sidecar
returns, or only what has changed."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from millrace.errors import MillraceError
from millrace.weights.mirror import CheckpointMirror
from millrace.weights.sidecar.answers import Answering
from millrace.weights.sidecar.messages import BringBody, BroughtVersion
from millrace.weights.sidecar.server import Job, body_of

logger = logging.getLogger(__name__)


class Bringing(Job):
    """Brings one version at a time into `mirror`. A version is completed even if its caller has disconnected."""

    def __init__(self, mirror: CheckpointMirror, store: str) -> None:
        self.does = f"brings versions from {store}"
        self._mirror = mirror
        self._thread = ThreadPoolExecutor(1, "sidecar")
        self._answering = Answering()

    def routes(self) -> Sequence[web.RouteDef]:
        return [web.post("/bring", self._bring), *self._answering.routes()]

    async def _bring(self, http: web.Request) -> web.Response:
        body = await body_of(http, BringBody)
        version = body.version
        try:
            path, digest = await asyncio.get_running_loop().run_in_executor(self._thread, self._mirror.bring, version)
        except MillraceError as error:
            logger.error("version %d: %s", version, error)
            return web.Response(text=str(error), status=500)
        logger.info("version %d is in %s", version, path)
        answers = self._answering.paths(body.session, 0, body.ranks)
        changes, base = self._mirror.changes(version)
        found = BroughtVersion(path=str(path), digest=digest, changes=changes, base=base, answers=answers)
        return web.Response(text=found.model_dump_json(), content_type="application/json")
