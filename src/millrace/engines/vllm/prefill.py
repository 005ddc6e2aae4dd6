"""The decode server of a replica that computes prompts on other servers.

A request goes to a prefill server first, which generates one token and keeps the KV cache of the prompt. Its answer
says where that is. The decode server fetches it through vLLM's NixlConnector and generates. Both must hold the same
version: an update begins only after all requests have ended on both, so no KV cache of one version reaches another.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from millrace.engines.stock.pair import completed, least
from millrace.engines.stock.state import require
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.engines.vllm.facts import VLLMFacts
from millrace.engines.vllm.metrics import read_metrics
from millrace.engines.vllm.wire import encode
from millrace.http import HttpClient
from millrace.types import EngineLoad, GenerateRequest, Generation, PauseMode, SamplingParams

TRANSFER = "kv_transfer_params"
ONE_TOKEN = SamplingParams(1, temperature=0.0, ignore_eos=True)
NEVER = 2**30  # as an interval in tokens: a stream has an event for the first token, and one for all
EXPIRED = "nixl_num_kv_expired_reqs_total"
# Seconds for which a prefill server keeps the KV cache of a request that no decode server has asked for. A decode
# server renews them while a request waits there. An update waits for the rest of them, if a request was cancelled
# between its two servers. It must be below the deadline of a pause.
LEASE = 15
# What asks a prefill server to keep the KV cache for another one. vLLM fills the other fields in.
KEEP: Mapping[str, object] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Prefill(VLLMEngine):
    """A prefill server.

    requests: how many it has now. expired: how often, when it was last asked, KV cache had expired before a decode
    server fetched it.
    """

    requests = 0
    expired = 0.0

    async def count_expired(self) -> float:
        text = await self._ask("/metrics")
        self.expired = self._decode("/metrics", lambda: dict(read_metrics(text))[EXPIRED])
        return self.expired

    async def compute(self, path: str, request: GenerateRequest, deadline: float) -> Mapping[str, Any] | None:
        """Compute the prompt of a request. Return what the decode server needs; None if it was aborted."""
        body = {**encode(path, replace(request, sampling=ONE_TOKEN)), TRANSFER: KEEP}
        self.requests += 1
        try:
            answer = await self._http.generate(path, body, deadline=deadline)
        finally:
            self.requests -= 1
        aborted = self._decode(path, lambda: answer["choices"][0]["finish_reason"]) == "abort"
        return None if aborted else self._decode(path, lambda: dict(answer[TRANSFER] or {}))


class Decode(VLLMEngine):
    """A decode server. prefills: those that compute its prompts; without any, it computes them itself."""

    prefills: Sequence[Prefill] = ()
    _computing = 0  # requests whose prompts are being computed
    _stops = 0  # a request whose prompt was computed before the last one must not go on

    async def _body(
        self, path: str, request: GenerateRequest, _deadline: float, *, stream: bool = False
    ) -> Mapping[str, object] | None:
        """Have the prompt computed, and return what to send."""
        body = encode(path, request, stream=stream)
        if self._computes(request):
            return body
        before = self._stops
        prefill = least(self.prefills, lambda one: one.requests)
        self._computing += 1
        try:
            params = await prefill.compute(path, request, _deadline)
        finally:
            self._computing -= 1
        if params is None or self._stops != before:
            return None
        return {**body, TRANSFER: params} if params else body

    def _computes(self, request: GenerateRequest) -> bool:
        """Whether this server computes the prompt itself: one with images, or one whose logprobs are wanted."""
        return not self.prefills or bool(request.images) or request.prompt_logprobs

    async def loads(self) -> EngineLoad:
        load = await super().loads()
        return replace(load, waiting_requests=load.waiting_requests + self._computing)

    async def _abort(self, names: Sequence[str]) -> None:
        await completed(super()._abort(names), *(prefill._abort(names) for prefill in self.prefills))

    async def _abort_all(self, names: Sequence[str]) -> None:
        await completed(super()._abort_all(names), *(prefill._abort_all(names) for prefill in self.prefills))

    def _check(self, request: GenerateRequest, facts: VLLMFacts) -> None:
        require(TRANSFER not in request.extra, f"extra.{TRANSFER} is set by Millrace")
        super()._check(request, facts)

    async def _generate(
        self, by: HttpClient, request: GenerateRequest, deadline: float, headers: Mapping[str, str] | None = None
    ) -> Generation:
        """Generate by a stream of two events, since the first one shows that the KV cache has been fetched."""
        if self._computes(request):
            return await super()._generate(by, request, deadline, headers)
        further = dict(request.extra.get("sampling_params") or {})  # type: ignore[call-overload]
        seldom = {**request.extra, "sampling_params": {**further, "stream_interval": NEVER}}
        async for made, _ in self._stream(replace(request, extra=seldom), deadline):
            last = made
        return last

    async def _stream(self, request: GenerateRequest, deadline: float) -> AsyncIterator[tuple[Generation, bool]]:
        """Stream one request. Begin again if the KV cache of its prompt may have expired before it was fetched: vLLM
        does not notice that, and may have fetched the KV cache of another prompt."""
        end, fetched = time.monotonic() + deadline, self._computes(request)
        while True:
            began, before = time.monotonic(), [one.expired for one in self.prefills]
            parts = super()._stream(request, end - time.monotonic())
            assert isinstance(parts, AsyncGenerator)
            async with aclosing(parts):
                async for made, finished in parts:
                    if made.output_ids and not fetched:
                        if time.monotonic() - began > LEASE and await self._count_expired() != before:
                            break
                        fetched = True
                    yield made, finished
                else:
                    return

    async def _count_expired(self) -> Sequence[float]:
        return await completed(*(one.count_expired() for one in self.prefills))

    async def _pause_server(self, mode: PauseMode) -> None:
        """End the server's requests, and pause it. Unless the mode is ABORT, the requests begin again afterwards,
        because a prefill server keeps their KV cache for seconds only.

        The requests end before the pause. A server that is not paused tells the prefill server at once which KV cache
        it no longer needs. Otherwise the prefill server would keep this KV cache, and would not pause before it
        expires.
        """
        if mode is not PauseMode.ABORT:
            self._calls.interrupt()
        await self._abort_until_ended(self._calls.sent, self._abort)
        self._stops += 1
        await super()._pause_server(PauseMode.ABORT)
