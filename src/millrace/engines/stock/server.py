"""The HTTP calls of one kind of stock server.

`StockEngine` makes them, and only in a state that each one allows. They do not check the state themselves.
"""

from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Generic

from millrace.engines.http_engine import HttpEngine
from millrace.engines.stock.facts import AnyFacts
from millrace.engines.stock.state import ServerState
from millrace.http import HttpClient
from millrace.types import Bucket, GenerateRequest, Generation, MemoryTag, PauseMode, ProcessGroup


class StockServer(HttpEngine, Generic[AnyFacts]):
    """The methods that the SGLang and vLLM adapters implement. `StockEngine` has the shared ones."""

    @abstractmethod
    async def _generate(
        self, by: HttpClient, request: GenerateRequest, deadline: float, headers: Mapping[str, str] | None = None
    ) -> Generation:
        """Send one request to the server, or to the router that `by` connects to."""

    @abstractmethod
    def _stream(self, request: GenerateRequest, deadline: float) -> AsyncIterator[tuple[Generation, bool]]:
        """Stream one request. Yields the cumulative output, and whether it is final."""

    @abstractmethod
    async def _abort(self, names: Sequence[str]) -> None:
        """Abort requests by their ids on the server. Unknown ids have no effect."""

    @abstractmethod
    async def _abort_all(self, names: Sequence[str]) -> None:
        """Abort every request on the server, also those of other clients. `names`: the ids of this client's."""

    @abstractmethod
    async def _pause_server(self, mode: PauseMode) -> None:
        """Pause the server, which is running."""

    @abstractmethod
    async def _resume_server(self) -> None:
        """End the pause. The server may be running already."""

    @abstractmethod
    async def _release(self, before: ServerState, after: ServerState) -> None:
        """Release memory of the server, which is paused and idle, or partly asleep."""

    @abstractmethod
    async def _reallocate(self, what: frozenset[MemoryTag]) -> None:
        """Allocate memory that is released."""

    @abstractmethod
    async def _open_update(self) -> None:
        """Prepare the server for an update. It is paused and has no requests, or is asleep."""

    @abstractmethod
    def _loader(self, bucket: Bucket, facts: AnyFacts) -> Callable[[float], Awaitable[None]]:
        """Return a function that sends the bucket within a deadline in seconds.

        Raises InvalidStateError if the server can't load the bucket.
        """

    @abstractmethod
    async def _commit(self, version: int) -> None:
        """Make the loaded weights the served ones."""

    @abstractmethod
    async def _abort_update(self) -> None:
        """Abort the update on the server. No update need be open."""

    @abstractmethod
    async def _load_lora(self, name: str, path: str, deadline: float) -> int | None:
        """Load a LoRA adapter. Return the workers' own id of it, if `_unload_lora` needs it."""

    @abstractmethod
    async def _unload_lora(self, name: str, worker_id: int | None, deadline: float) -> None:
        """Unload a LoRA adapter. worker_id: the result of `_load_lora`."""

    @abstractmethod
    async def _join(self, group: ProcessGroup, deadline: float) -> None:
        """Join a process group whose store is reachable."""

    @abstractmethod
    async def _probe(self, deadline: float) -> None:
        """Call a route that the server answers in every state, without generating."""

    @abstractmethod
    async def _read_facts(self) -> AnyFacts:
        """Ask the server what it is and can do."""

    @abstractmethod
    def _check(self, request: GenerateRequest, facts: AnyFacts) -> None:
        """Raise InvalidStateError for a request that would harm the server, or that it would not honour."""

    @abstractmethod
    def _why_no_sleep(self) -> str:
        """Say why the server can't release memory."""
