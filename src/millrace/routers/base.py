"""The port to a router: what Millrace asks of it, whoever made it.

It stands before the data calls alone. An adapter tells it which engines there are and gives it requests; control calls
never pass it. What it would drop of a request without a word is refused.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from typing import Any

from millrace.engines.http_engine import HttpEngine
from millrace.errors import EngineError, LocalError
from millrace.http import HttpClient
from millrace.types import ANYWHERE, GenerateRequest, Generation, RoutingContext

ASK_DEADLINE = 5.0  # seconds, of a question that a router answers from memory


class RouterClient(ABC):
    """A router at `url`; errors call it `name`. Its calls raise EngineUnreachable where nobody answers there."""

    kind: str
    affinity_header: str

    def __init__(self, name: str, url: str, *, key: str | None = None) -> None:
        """`key` is what opens the router, and what it passes on where it knows no key of an engine's own."""
        self.name, self.url, self.key = name, url, key
        self._http = HttpClient(name, url, api_key=key)

    async def up(self) -> bool:
        """Whether it answers. Raises LocalError where this process could not ask."""
        try:
            await self._http.control("GET", "/liveness", deadline=ASK_DEADLINE)
        except LocalError:
            raise
        except EngineError:
            return False
        return True

    @abstractmethod
    async def register(self, engine: HttpEngine, *, deadline: float) -> None:
        """Puts the engine into its list, and returns when requests may reach it there. Raises EngineError, and leaves
        it out, where the deadline passes before."""

    @abstractmethod
    async def deregister(self, url: str) -> None:
        """Takes it off the list: what comes from now on goes elsewhere, and what it has ends there. Taking off what
        does not stand there changes nothing."""

    @abstractmethod
    async def workers(self) -> Mapping[str, bool]:
        """By URL: who stands in its list, and whether it sends them requests."""

    @abstractmethod
    def dropped(self, request: GenerateRequest) -> Set[str]:
        """What of `request.extra` would not reach the engine."""

    async def generate(
        self, engine: HttpEngine, request: GenerateRequest, routing: RoutingContext = ANYWHERE, *, deadline: float
    ) -> Generation:
        """Sends it to the engine that the router chooses; `engine` is one of them, whose protocol is spoken. Requests
        of one session go to one engine, and so do those of one group without sessions, where the router's policy is one
        that sticks."""
        affinity = routing.session or routing.group
        headers = {self.affinity_header: affinity} if affinity is not None else {}
        return await engine.generate_by(self._http, request, headers=headers, deadline=deadline)

    async def close(self) -> None:
        await self._http.close()


def sampling_of(request: GenerateRequest) -> Mapping[str, Any]:
    """The sampling parameters that Millrace has no name for."""
    further: Any = request.extra.get("sampling_params", {})
    return further if isinstance(further, Mapping) else {}
