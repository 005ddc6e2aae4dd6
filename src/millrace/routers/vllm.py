"""The adapter of vllm-router."""

from collections.abc import Mapping, Set
from urllib.parse import quote

from millrace.engines.http_engine import HttpEngine
from millrace.errors import EngineRefused
from millrace.routers.base import ASK_DEADLINE, RouterClient
from millrace.types import GenerateRequest


class VLLMRouter(RouterClient):
    """The client of vllm-router.

    The router forwards unknown routes to a single worker, so a control call through it would reach only one engine.
    It sends the caller's key to all engines.
    """

    kind = "vllm"
    affinity_header = "X-Session-ID"

    async def register(self, engine: HttpEngine, *, deadline: float) -> None:
        """Add an engine. The router answers once the engine is healthy, and never if it is not."""
        try:
            await self._http.control("POST", "/workers", {"url": engine.url}, deadline=deadline)
        except EngineRefused:
            if engine.url not in await self.workers():
                raise
        except BaseException:
            await self.deregister(engine.url)
            raise

    async def deregister(self, url: str) -> None:
        await self._http.control("POST", f"/remove_worker?url={quote(url, safe='')}", deadline=ASK_DEADLINE)

    async def workers(self) -> Mapping[str, bool]:
        listed = await self._http.control("GET", "/workers", deadline=ASK_DEADLINE, repeatable=True)
        return {worker["url"]: worker["is_healthy"] for worker in listed["workers"]}

    def dropped(self, request: GenerateRequest) -> Set[str]:  # noqa: ARG002
        """Return an empty set: the router passes vLLM's requests on unchanged."""
        return frozenset()
