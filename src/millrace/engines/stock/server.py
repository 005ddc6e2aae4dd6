"""The HTTP calls of one kind of stock server.

`StockEngine` makes them, and only in a state that each one allows. They do not check the state themselves.
"""

import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Generic

from millrace.buckets import Bucket, ProcessGroup
from millrace.engines.http_engine import HttpEngine
from millrace.engines.stock.carried import with_carried_penalties, with_text
from millrace.engines.stock.facts import AnyFacts
from millrace.engines.stock.images import check_images, check_prompt, without_runs
from millrace.engines.stock.state import InvalidStateError, ServerState
from millrace.engines.stop_texts import first_stop
from millrace.errors import EngineRefused
from millrace.http import HttpClient
from millrace.types import Capability, GenerateRequest, Generation, MemoryTag, PauseMode


class StockServer(HttpEngine, Generic[AnyFacts]):
    """The methods that the SGLang and vLLM adapters implement, and the calls that need nothing else."""

    _facts_read: AnyFacts | None = None

    async def _facts(self) -> AnyFacts:
        """Return what the server is and can do. It is read once."""
        if self._facts_read is None:
            self._facts_read = await self._read_facts()
        return self._facts_read

    async def _call(
        self, by: HttpClient, request: GenerateRequest, deadline: float, headers: Mapping[str, str] | None = None
    ) -> Generation:
        """Send one request to the server, or to the router that `by` connects to."""
        sent, exact = await self._as_sent(request)
        made = await self._generate(by, sent, deadline, headers)
        await self._check_prompt(request, made)
        return _of_call(request, made, exact)

    async def _stream_call(self, request: GenerateRequest, deadline: float) -> AsyncIterator[tuple[Generation, bool]]:
        """Stream one request. Yields the cumulative output, and whether it is final."""
        sent, exact = await self._as_sent(request)
        async for made, finished in self._stream(sent, deadline):
            if finished:
                await self._check_prompt(request, made)
            yield _of_call(request, made, exact), finished

    async def _as_sent(self, request: GenerateRequest) -> tuple[GenerateRequest, bool]:
        """Return the request for the server, and whether its penalties count the continued tokens.

        Raises EngineRefused if the continued tokens have a placeholder of images: the server would take it for one.
        """
        facts = await self._facts()
        with self._refusing(request):
            check_images(request, facts.limits)
        counts_prompt = Capability.PROMPT_PENALTY in facts.info.capabilities
        sent, exact = with_carried_penalties(request, counts_prompt=counts_prompt)
        return without_runs(sent, facts.limits), exact

    async def _check_prompt(self, request: GenerateRequest, made: Generation) -> None:
        """Raise EngineRefused if the prompt does not fit its images, and EngineFailed if the server read another."""
        if not request.images:
            return
        limits = (await self._facts()).limits
        with self._refusing(request):
            self._decode("generate", lambda: check_prompt(request, made, limits))

    @contextmanager
    def _refusing(self, request: GenerateRequest) -> Iterator[None]:
        """Raise EngineRefused for an InvalidStateError in the block."""
        try:
            yield
        except InvalidStateError as error:
            raise EngineRefused(self.name, f"request {request.request_id}: {error}") from error

    async def _completed(self, request: GenerateRequest, made: Generation, end: float) -> Generation:
        """Return the result of a request, made by one or more calls, with its text if the request has stop texts.

        end: the deadline (time.monotonic). SGLang may overlook a stop text that came in more tokens than its tokenizer
        would make of it.
        """
        stop = request.sampling.stop
        if not stop or (made.text is not None and first_stop(made.text, stop) is None):
            return made
        return await with_text(request, made, lambda tokens: self._detokenize(tokens, end - time.monotonic()))

    @abstractmethod
    async def _generate(
        self, by: HttpClient, request: GenerateRequest, deadline: float, headers: Mapping[str, str] | None = None
    ) -> Generation:
        """Send one request to the server, or to the router that `by` connects to. Penalties are those of one call."""

    @abstractmethod
    def _stream(self, request: GenerateRequest, deadline: float) -> AsyncIterator[tuple[Generation, bool]]:
        """Stream one request. Yields the cumulative output, and whether it is final."""

    @abstractmethod
    async def _detokenize(self, tokens: Sequence[int], deadline: float) -> str:
        """Return the text of the tokens, special tokens included. There is at least one."""

    @abstractmethod
    async def _abort(self, names: Sequence[str]) -> None:
        """Abort requests by their ids on the server. Unknown ids have no effect."""

    async def _abandon(self, name: str) -> None:
        """Abort a request whose connection this process has closed."""
        await self._abort([name])

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


def _of_call(request: GenerateRequest, made: Generation, exact: bool) -> Generation:
    """Return the answer to one call. It has no text if the request continues tokens: the server's lacks their text."""
    if request.continued_tokens and made.text is not None:
        made = replace(made, text=None)
    return made if exact else replace(made, penalty_restarts=(0,))
