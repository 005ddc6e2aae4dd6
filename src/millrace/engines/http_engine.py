"""The HTTP code that all adapters share."""

import asyncio
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from millrace.engines.base import Engine
from millrace.errors import EngineFailed, EngineRefused, EngineTimeout, NonFiniteLogprobs
from millrace.http import HttpClient
from millrace.types import GenerateRequest, Generation

CONTROL_DEADLINE = 30.0  # seconds; a control call waits for at most one forward pass: seconds on a slow CPU
MEMORY_DEADLINE = 600.0  # seconds; vLLM copies the weights to the host at a gigabyte a second or less
ABORT_DEADLINE = 5.0
IDLE_POLL_SECONDS = 0.02

T = TypeVar("T")


class HttpEngine(Engine):
    """An engine with an HTTP API.

    api_key: for data calls. admin_key: for control calls. model_path: the folder of its model on this host; None for
    the folder that the server names.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        model_path: Path | None = None,
    ) -> None:
        self.name = name
        self.url = url
        self.api_key, self.admin_key = api_key, admin_key
        self._model_path = model_path
        self._http = HttpClient(name, url, api_key=api_key, admin_key=admin_key)
        self._attached = False  # whether another process started the server
        self._left_at: int | None = None  # the version that an attached server had after the last call that changed it

    async def initialize(self, version: int | None = None) -> None:
        """Prepare the server. Must be the first call.

        version: of the weights with which this process started the server. None for a server that another process
        started, which may be paused or have an update open.
        """

    async def close(self) -> None:
        await self._http.close()

    @abstractmethod
    async def generate_by(
        self, router: HttpClient, request: GenerateRequest, *, headers: Mapping[str, str], deadline: float
    ) -> Generation:
        """Like `generate`, but through a router that sends the request to this server or to one like it.

        A request that this server would refuse is refused. An update ends the request early. The caller must call
        `abort_by_router` if it stops waiting.
        """

    @abstractmethod
    async def abort_by_router(self, request_id: str) -> None:
        """Abort a request that a router may have sent to this server. An unknown request has no effect."""

    async def _remember_version(self) -> None:
        """Note that another process started the server, and which version it reports."""
        self._left_at = (await self.info()).weight_version
        self._attached = True

    async def _require_only_owner(self) -> None:
        """Raises EngineRefused if another process has published to an attached server since this one did."""
        if not self._attached:  # only this process has the control key
            return
        reported = (await self.info()).weight_version
        if reported != self._left_at:
            raise EngineRefused(
                self.name,
                f"another process publishes to it too: it reports weight version {reported}, and this process left it "
                f"at {self._left_at}; let one process own the engine, and the others follow its fleet (Fleet.share)",
            )

    async def _ask(self, path: str, *, deadline: float = CONTROL_DEADLINE) -> Any:
        return await self._http.control("GET", path, deadline=deadline, repeatable=True)

    async def _control(
        self, path: str, body: object, *, deadline: float = CONTROL_DEADLINE, repeatable: bool = False
    ) -> Any:
        return await self._http.control("POST", path, body, deadline=deadline, repeatable=repeatable)

    async def _retry_until_idle(self, path: str, body: object, deadline: float) -> None:
        """Call a route that the server refuses while requests run. Retry until they end or the deadline passes."""
        end = time.monotonic() + deadline
        while True:
            try:
                await self._control(path, body, deadline=end - time.monotonic())
                return
            except EngineRefused as error:
                if time.monotonic() + IDLE_POLL_SECONDS >= end:
                    raise EngineTimeout(
                        self.name, f"{path}: requests still ran after {deadline:.0f} s: {error}"
                    ) from error
            await asyncio.sleep(IDLE_POLL_SECONDS)

    async def _events(self, path: str, body: object, deadline: float) -> AsyncIterator[Any]:
        """Yield the events of a stream. Raises EngineRefused for an error event."""
        async for event in self._http.events(path, body, deadline=deadline):
            if "error" in event:
                raise EngineRefused(self.name, f"{path} was refused: {event['error'].get('message')}")
            yield event

    def _decode_generation(self, path: str, decode: Callable[[], Generation]) -> Generation:
        """Return the result of `decode`, which decodes an answer.

        Raises NonFiniteLogprobs if a logprob is NaN or infinite, and EngineFailed if the answer is malformed.
        """
        made = self._decode(path, decode)
        finite = np.isfinite(made.logprobs)
        if not finite.all():
            place = int(np.argmin(finite))
            version = next((s.version for s in made.version_spans if s.start <= place < s.end), None)
            self._blame_weights(version, f"token {place} of request {made.request_id}", made.logprobs[place])
        if made.prompt_logprobs is not None and not (finite := np.isfinite(made.prompt_logprobs[1:])).all():
            place = int(np.argmin(finite)) + 1
            version = made.version_spans[0].version if made.version_spans else None
            token = f"token {place} of the prompt of request {made.request_id}"
            self._blame_weights(version, token, made.prompt_logprobs[place])
        return made

    def _blame_weights(self, version: int | None, token: str, logprob: float) -> NoReturn:
        """Raise NonFiniteLogprobs."""
        weights = "the initial weights" if version is None else f"the weights of version {version}"
        raise NonFiniteLogprobs(
            self.name,
            f"{weights} gave {token} the logprob {logprob}. The engine is healthy: check the weights. They contain NaN "
            "or infinite values, or activations overflow in the engine's dtype",
        )

    def _decode(self, path: str, decode: Callable[[], T]) -> T:
        """Return the result of `decode`, which decodes an answer. Raises EngineFailed if the answer is malformed."""
        try:
            return decode()
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineFailed(self.name, f"{path}: the answer is malformed: {error!r}") from error
