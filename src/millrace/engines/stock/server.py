"""How the server of one kind of stock engine is asked. None of this looks at the adapter's state; what is said of it
holds."""

from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from millrace.engines.http_engine import HttpEngine
from millrace.engines.stock.facts import Facts
from millrace.engines.stock.state import ServerState
from millrace.http import HttpClient
from millrace.types import Bucket, GenerateRequest, Generation, MemoryTag, PauseMode, ProcessGroup


class StockServer(HttpEngine):
    """What an adapter of SGLang or vLLM fills in; `StockEngine` is the rest."""

    @abstractmethod
    async def _generate(
        self, by: HttpClient, request: GenerateRequest, deadline: float, headers: Mapping[str, str] | None = None
    ) -> Generation:
        """One request to the server, or `by` a router before it, under the name that it has here."""

    @abstractmethod
    def _follow(self, request: GenerateRequest, deadline: float) -> AsyncIterator[tuple[Generation, bool]]:
        """The same as a stream: what there is so far, and whether that is all."""

    @abstractmethod
    async def _abort(self, names: Sequence[str]) -> None: ...

    @abstractmethod
    async def _abort_all(self, names: Sequence[str]) -> None:
        """Those of others too; `names` are ours."""

    @abstractmethod
    async def _halt(self, mode: PauseMode) -> None:
        """Pauses the server, which runs."""

    @abstractmethod
    async def _go_on(self) -> None:
        """Ends the pause."""

    @abstractmethod
    async def _release(self, before: ServerState, after: ServerState) -> None:
        """Releases memory of the server, which is paused and idle, or asleep in part."""

    @abstractmethod
    async def _take_back(self, what: frozenset[MemoryTag]) -> None:
        """Takes back what is released."""

    @abstractmethod
    async def _open_update(self) -> None:
        """The server is paused and empty, or asleep."""

    @abstractmethod
    def _loader(self, bucket: Bucket, facts: Facts) -> Callable[[float], Awaitable[None]]:
        """What sends the bucket, within so many seconds. Raises InvalidStateError for what the server can't take."""

    @abstractmethod
    async def _commit(self, version: int) -> None: ...

    @abstractmethod
    async def _give_up(self) -> None:
        """Ends the server's side of an update that is not committed."""

    @abstractmethod
    async def _load_lora(self, name: str, path: str, deadline: float) -> int | None:
        """Returns what the server's workers call it, where that is something else."""

    @abstractmethod
    async def _unload_lora(self, name: str, worker_id: int | None, deadline: float) -> None: ...

    @abstractmethod
    async def _join(self, group: ProcessGroup, deadline: float) -> None: ...

    @abstractmethod
    async def _probe(self, deadline: float) -> None:
        """Asks what the server answers in every state, without generating."""

    @abstractmethod
    async def _read_facts(self) -> Facts: ...

    @abstractmethod
    def _check(self, request: GenerateRequest, facts: Facts) -> None:
        """Raises InvalidStateError for a request that would harm the server, or be answered differently."""

    @abstractmethod
    def _why_no_sleep(self) -> str:
        """Why it can release nothing."""
