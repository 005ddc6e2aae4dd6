"""The interface of external routers.

Only data calls pass through a router. Control calls go straight to the engines. An adapter registers the engines with
the router and sends requests through it. A request with parts that the router would silently drop is refused.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from typing import Any

from millrace.engines.http_engine import HttpEngine
from millrace.errors import EngineError, LocalError
from millrace.http import HttpClient
from millrace.types import ANYWHERE, GenerateRequest, Generation, RoutingContext

ASK_DEADLINE = 5.0  # seconds for a query that a router answers from memory


class RouterClient(ABC):
    """A client of the router at `url`. Error messages call the router `name`.

    Calls other than `up` raise EngineUnreachable if no server answers at `url`.
    """

    kind: str
    affinity_header: str

    def __init__(self, name: str, url: str, *, key: str | None = None) -> None:
        """Create a client. `key` is the router's API key.

        A router that does not store a key for each engine passes this key on to the engines.
        """
        self.name, self.url, self.key = name, url, key
        self._http = HttpClient(name, url, api_key=key)

    async def up(self) -> bool:
        """Return whether the router answers. Raises LocalError if this process could not send the query."""
        try:
            await self._http.control("GET", "/liveness", deadline=ASK_DEADLINE)
        except LocalError:
            raise
        except EngineError:
            return False
        return True

    @abstractmethod
    async def register(self, engine: HttpEngine, *, deadline: float) -> None:
        """Add an engine to the router's list, and wait until the router sends requests to it.

        Raises EngineError after `deadline` seconds. The engine is then removed from the list.
        """

    @abstractmethod
    async def deregister(self, url: str) -> None:
        """Remove the engine at `url` from the router's list. Does nothing if it is not in the list.

        New requests go to other engines. Running requests finish on this engine.
        """

    @abstractmethod
    async def workers(self) -> Mapping[str, bool]:
        """Return the engines in the router's list, by URL, and whether the router sends requests to them."""

    @abstractmethod
    def dropped(self, request: GenerateRequest) -> Set[str]:
        """Return the names of the parts of the request that would not reach the engine, such as extra.priority."""

    async def generate(
        self, engine: HttpEngine, request: GenerateRequest, routing: RoutingContext = ANYWHERE, *, deadline: float
    ) -> Generation:
        """Send a request to the engine that the router chooses, and return the generation.

        `engine` is any registered engine; its protocol is used. If the router's policy has session affinity, requests
        of one session go to the same engine, and so do requests of one group without a session. The deadline is in
        seconds. Raises the same errors as `Engine.generate`.
        """
        affinity = routing.session or routing.group
        headers = {self.affinity_header: affinity} if affinity is not None else {}
        return await engine.generate_by(self._http, request, headers=headers, deadline=deadline)

    async def close(self) -> None:
        """Close the connections to the router."""
        await self._http.close()


def sampling_of(request: GenerateRequest) -> Mapping[str, Any]:
    """Return the request's sampling parameters that are not fields of SamplingParams."""
    extra: Any = request.extra.get("sampling_params", {})
    return extra if isinstance(extra, Mapping) else {}
