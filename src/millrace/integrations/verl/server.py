"""What verl calls a replica's server: a Ray actor that follows the fleet and sends a worker's requests to it."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any

from verl.workers.rollout.replica import TokenOutput

from millrace import Follower, follow_fleet
from millrace.continuation import Continuation
from millrace.errors import EngineError, NoEngineError
from millrace.fleet.attempts import Attempts, generate_whole
from millrace.integrations.verl.tokens import Limits, output_of, request_of
from millrace.types import GenerateRequest, Generation

ABORT_DEADLINE = 10.0  # seconds for aborted requests to return their tokens; then they are cancelled, without tokens
ABORT_AGAIN = 1.0  # seconds after which a request that was not yet on an engine is aborted again

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Serving:
    """How a server generates. `prompt` and `response` are the lengths of a sample, and `context` that of a call, in
    tokens; None leaves it to the engines. `timeout` is for one call, in seconds."""

    prompt: int
    response: int
    context: int | None
    ignore_eos: bool
    seed: int | None
    retries: int
    timeout: float


class MillraceServer:
    """Generates for verl's agent loops. All methods but the constructor are called through Ray, in one event loop."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._stack = AsyncExitStack()
        self._fleet: Follower | None = None
        self._follows = asyncio.Event()
        self._admits = asyncio.Event()
        self._admits.set()
        self._rejects = False
        self._numbers = count()
        self._running: dict[asyncio.Task[Generation], Attempts] = {}

    async def follow(self, url: str, key: str) -> None:
        """Follow the fleet at `url`, instead of the one before."""
        await self._stack.aclose()
        self._fleet = await self._stack.enter_async_context(follow_fleet(url, key))
        self._follows.set()

    async def close(self) -> None:
        """Stop following the fleet."""
        await self._stack.aclose()

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: Sequence[Any] | None = None,
        video_data: Sequence[Any] | None = None,
        audio_data: Sequence[Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,  # noqa: ARG002  # verl passes it by name
        **_: Any,
    ) -> TokenOutput:
        """Generate one completion, and return its tokens, their logprobs and the trainer's steps that made them.

        A failure of an engine costs a retry, and the tokens so far are kept. A call that is aborted returns the tokens
        so far. While requests are not admitted, a call waits, as in verl's own servers.

        Raises ValueError for images, videos and sound, and if the prompt leaves no room for output; and Millrace's
        errors if no engine completes the request.
        """
        if image_data or video_data or audio_data:
            raise ValueError("rollout.name=millrace takes text only, and the prompt has images, video or sound")
        end = time.monotonic() + self._serving.timeout
        fleet = await self._followed()
        length = self._serving.context
        context = fleet.context_length if length is None else min(length, fleet.context_length)
        limits = Limits(self._serving.prompt, self._serving.response, context)
        params = dict(sampling_params)
        if self._serving.seed is not None:
            params.setdefault("seed", self._serving.seed)
        # verl may pass one id twice (full_determinism), which engines must not see.
        name = f"{request_id}-{next(self._numbers)}"
        request = request_of(name, prompt_ids, params, limits, ignore_eos=self._serving.ignore_eos)
        if not self._admits.is_set():
            if self._rejects:
                made = Continuation(request).result
                return TokenOutput(**output_of(made, fleet.labels, logprobs=False))
            await self._admits.wait()
            end = time.monotonic() + self._serving.timeout
        made = await self._complete(fleet, request, end)
        return TokenOutput(**output_of(made, fleet.labels, logprobs=bool(params.get("logprobs"))))

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Abort all requests, and admit none until `resume_generation`.

        reject_request: return requests that come meanwhile, as aborted, instead of letting them wait.
        """
        self._rejects = reject_request
        self._admits.clear()
        for attempts in self._running.values():
            attempts.left = 0  # so that an aborted request is returned, and not continued
        end = time.monotonic() + ABORT_DEADLINE
        while self._running and self._fleet is not None and time.monotonic() < end:
            await asyncio.gather(*(_abort(engine) for engine in self._fleet.engines.values()))
            if self._running:
                await asyncio.wait(self._running, timeout=ABORT_AGAIN)
        for task in self._running:
            task.cancel()

    async def resume_generation(self) -> None:
        """Admit requests again."""
        self._rejects = False
        self._admits.set()

    async def _followed(self) -> Follower:
        """Wait until the server follows a fleet."""
        if self._fleet is None:
            try:
                await asyncio.wait_for(self._follows.wait(), self._serving.timeout)
            except TimeoutError:
                waited = f"{self._serving.timeout:g} s"
                raise NoEngineError(
                    f"the actor's rank 0 opened no fleet within {waited}; it does when weights are sent for the first "
                    "time, and its log says what failed"
                ) from None
        assert self._fleet is not None
        return self._fleet

    async def _complete(self, fleet: Follower, request: GenerateRequest, end: float) -> Generation:
        """Generate, with retries. A request that failed or was cancelled while it was aborted has no tokens."""
        attempts = Attempts(self._serving.retries, fleet.event_log)

        async def send(rest: GenerateRequest) -> Generation:
            return await fleet.generate(rest, deadline=end - time.monotonic())

        task = asyncio.ensure_future(generate_whole(request, send, attempts))
        self._running[task] = attempts
        try:
            await asyncio.wait([task])
        finally:
            del self._running[task]
            task.cancel()
        failed = None if task.cancelled() else task.exception()
        if task.cancelled() or (isinstance(failed, EngineError) and not self._admits.is_set()):
            return Continuation(request).result
        return task.result()


async def _abort(engine: Any) -> None:
    try:
        await engine.abort()
    except EngineError as error:
        logger.warning("requests could not be aborted: %s", error)
