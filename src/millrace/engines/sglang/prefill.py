"""The decode server of a replica that computes prompts on other servers.

A request goes to a prefill server and to a decode server at the same time. Both know it by the same random number, its
room. The decode server waits at the prefill server's bootstrap port, the prefill server computes the prompt and the
first token, and writes the KV cache into the decode server's. The decode server answers with all tokens.

Both must hold the same version: an update begins only after both halves of all requests have ended.
"""

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any
from urllib.parse import urlsplit

from millrace.continuation import Continuation
from millrace.engines.sglang.adapter import SGLangEngine, encode
from millrace.engines.sglang.facts import SGLangFacts
from millrace.engines.sglang_wire import PROMPT_LOGPROBS, decode_generate
from millrace.engines.stock.pair import completed, least
from millrace.engines.stock.state import require
from millrace.errors import EngineFailed
from millrace.http import HttpClient
from millrace.types import GenerateRequest, Generation, PauseMode

ROOMS = 63  # bits
MOST_TOP_LOGPROBS = 128  # of the first token, for which SGLang's buffer between the servers has room
PATH = "/generate"
# In SGLang's error for a half of a request that another process aborted before the KV cache was transferred.
ABORTED = re.compile(r"KVTransferError\(bootstrap_room=\d+\): Aborted by")


class Prefill(SGLangEngine):
    """A prefill server. requests: how many it has now."""

    requests = 0
    _bootstrap_port: int | None = None

    async def meeting(self) -> Mapping[str, object]:
        """Return the fields of a new request by which its two halves find each other."""
        if self._bootstrap_port is None:
            server = await self._ask("/server_info")
            self._bootstrap_port = self._decode("/server_info", lambda: int(server["disaggregation_bootstrap_port"]))
        host = str(urlsplit(self.url).hostname)
        room = secrets.randbits(ROOMS)  # a trainer's seed must not repeat them
        return {"bootstrap_host": host, "bootstrap_port": self._bootstrap_port, "bootstrap_room": room}

    async def compute(self, body: Mapping[str, object], deadline: float) -> Mapping[str, Any]:
        """Compute the prompt of a request. Returns when the decode server has the KV cache."""
        self.requests += 1
        try:
            answer: Mapping[str, Any] = await self._http.generate(PATH, {**body, "stream": False}, deadline=deadline)
        finally:
            self.requests -= 1
        return answer

    async def _pause_server(self, mode: PauseMode) -> None:  # noqa: ARG002
        """End the server's requests, and pause it. The decode servers, which are paused before, have ended theirs."""
        await super()._pause_server(PauseMode.ABORT)


class Decode(SGLangEngine):
    """A decode server. prefills: those that compute its prompts."""

    prefills: Sequence[Prefill] = ()

    def __init__(self, *place: Any, **keys: Any) -> None:
        super().__init__(*place, **keys)
        self._aborted: dict[str, bool] = {}  # whether each request that the server has was aborted from here
        self._controls_it = False

    async def initialize(self, version: int | None = None) -> None:
        await super().initialize(version)
        self._controls_it = True

    async def _generate(
        self, by: HttpClient, request: GenerateRequest, deadline: float, headers: Mapping[str, str] | None = None
    ) -> Generation:
        prefill = self._least_busy()
        body = {**encode(request), **await prefill.meeting()}
        with self._in_flight(request):
            try:
                prompt, answer = await both(
                    prefill.compute(body, deadline), by.generate(PATH, body, deadline=deadline, headers=headers)
                )
            except EngineFailed as error:
                self._require_abort(request, error)
                prompt = answer = None
            return Continuation(request).result if answer is None else self._made(request, prompt, answer)

    async def _stream(self, request: GenerateRequest, deadline: float) -> AsyncIterator[tuple[Generation, bool]]:
        prefill = self._least_busy()
        body = {**encode(request, stream=True), **await prefill.meeting()}
        events = self._events(PATH, body, deadline)
        assert isinstance(events, AsyncGenerator)
        with self._in_flight(request):
            try:
                async with aclosing(events):
                    prompt, event = await both(prefill.compute(body, deadline), anext(events, None))
                    if event is None and is_aborted(prompt):
                        yield Continuation(request).result, True
                    while event is not None:
                        finish = event["meta_info"]["finish_reason"]
                        if (finish or {}).get("status_code") is not None:
                            raise EngineFailed(self.name, f"{PATH}: {finish['message']}")
                        yield self._made(request, prompt, event), finish is not None
                        event = await anext(events, None)
            except EngineFailed as error:
                self._require_abort(request, error)
                yield Continuation(request).result, True

    def _require_abort(self, request: GenerateRequest, error: EngineFailed) -> None:
        """Raise the error of a half, unless it says that the request was aborted, here or by another process."""
        if not self._aborted[request.request_id] and not ABORTED.search(str(error)):
            raise error

    def _made(
        self, request: GenerateRequest, prompt: Mapping[str, Any] | None, answer: Mapping[str, Any]
    ) -> Generation:
        """Decode an answer. The prompt's logprobs are in the prefill server's, unless it was aborted before."""

        def decode() -> Generation:
            scored: dict[str, Any] = {}
            if request.prompt_logprobs and prompt is not None:
                scored = {PROMPT_LOGPROBS: prompt["meta_info"].get(PROMPT_LOGPROBS)}
            return decode_generate(request, {**answer, "meta_info": {**answer["meta_info"], **scored}})

        return self._decode_generation(PATH, decode)

    def _least_busy(self) -> Prefill:
        return least(self.prefills, lambda one: one.requests)

    @contextmanager
    def _in_flight(self, request: GenerateRequest) -> Iterator[None]:
        """Notice whether a request is aborted from here. SGLang answers with an error if a half has not begun yet."""
        self._aborted[request.request_id] = False
        try:
            yield
        finally:
            del self._aborted[request.request_id]

    async def _abandon(self, name: str) -> None:
        """Abort both halves of a request, if this process controls the servers.

        Another process does not know whether one of them is paused. There, the half waits, and after an abort that it
        has missed SGLang would not end it when it notices the closed connection: it would wait for the other half.
        """
        if self._controls_it:
            await super()._abandon(name)

    async def _abort(self, names: Sequence[str]) -> None:
        self._note(names)
        await completed(super()._abort(names), *(prefill._abort(names) for prefill in self.prefills))

    async def _abort_all(self, names: Sequence[str]) -> None:
        self._note(names)
        # By name on the prefill servers, which also have halves of other decode servers' requests.
        await completed(super()._abort_all(names), *(prefill._abort(names) for prefill in self.prefills))

    def _note(self, names: Sequence[str]) -> None:
        self._aborted |= dict.fromkeys(self._aborted.keys() & set(names), True)

    def _check(self, request: GenerateRequest, facts: SGLangFacts) -> None:
        for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key"):
            require(name not in request.extra, f"extra.{name} is set by Millrace")
        super()._check(request, facts)
        top = request.extra.get("top_logprobs_num", 0)
        assert isinstance(top, int)
        require(
            top <= MOST_TOP_LOGPROBS,
            f"extra.top_logprobs_num must be at most {MOST_TOP_LOGPROBS}; more end a prefill server",
        )

    async def _pause_server(self, mode: PauseMode) -> None:
        """End the server's requests, and pause it. Unless the mode is ABORT, the requests begin again afterwards, as
        their prompts must be computed again on a prefill server."""
        if mode is not PauseMode.ABORT:
            self._calls.interrupt()
        await self._abort_until_ended(self._calls.sent, self._abort)
        await super()._pause_server(PauseMode.ABORT)


async def both(prompt: Awaitable[Any], answer: Awaitable[Any]) -> tuple[Any, Any]:
    """Wait for the answers to both halves of a request. If one fails, raise its error at once, and cancel the other. If
    one answers that it was aborted, cancel the other too, whose answer is then None."""
    halves = [asyncio.ensure_future(prompt), asyncio.ensure_future(answer)]
    try:
        while waiting := [half for half in halves if not half.done()]:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if any(is_aborted(half.result()) for half in done):
                break
        first, second = (half.result() if half.done() else None for half in halves)
        return first, second
    finally:
        for half in halves:
            half.cancel()
        await asyncio.gather(*halves, return_exceptions=True)


def is_aborted(answer: Mapping[str, Any] | None) -> bool:
    """Whether this answer is that to a request that was aborted."""
    finish = None if answer is None else answer["meta_info"]["finish_reason"]
    return finish is not None and finish["type"] == "abort"
