"""Files on the engines' host for the answers of their ranks, which the trainer reads through the sidecar."""

from collections.abc import Sequence

from aiohttp import web

from millrace.engines.answers import AnswerFiles
from millrace.weights.sidecar.messages import Answers, AnswersBody
from millrace.weights.sidecar.server import body_of


class Answering:
    """Files for answers about the buckets of one session, and the route that reads them."""

    def __init__(self) -> None:
        self._session = ""
        self._files: dict[int, AnswerFiles] = {}  # by slot

    def routes(self) -> Sequence[web.RouteDef]:
        return [web.post("/answers", self._read)]

    def paths(self, session: str, slot: int, ranks: int) -> tuple[str, ...]:
        """Return the path of a file for each rank, and forget the answers about the slot's earlier bucket."""
        if session != self._session:
            self.close()
            self._session = session
        if slot in self._files and len(self._files[slot]) < ranks:
            self._files.pop(slot).close()
        if slot not in self._files:
            self._files[slot] = AnswerFiles(ranks)
        return self._files[slot].paths()[:ranks]

    def close(self) -> None:
        """Free the memory."""
        for files in self._files.values():
            files.close()
        self._files.clear()
        self._session = ""

    async def _read(self, http: web.Request) -> web.Response:
        body = await body_of(http, AnswersBody)
        if body.session != self._session or body.slot not in self._files:
            return web.Response(text="another trainer has begun a session, or this one has ended", status=409)
        texts = self._files[body.slot].read()[body.start : body.start + body.ranks]
        return web.Response(text=Answers(texts=tuple(texts)).model_dump_json(), content_type="application/json")
