"""The generate route: passes a call's requests to the model thread, and answers whole or as a stream."""

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from millrace.engines.embedded.core import Refused
from millrace.engines.embedded.faults import HttpFaults
from millrace.engines.embedded.protocol import BadRequest, GenerateBody, SamplingBody, answer, parse, to_requests
from millrace.engines.embedded.runner import ModelInfo
from millrace.engines.embedded.scheduler import Output, Request
from millrace.engines.embedded.text import load_tokenizer
from millrace.engines.embedded.thread import ModelThread
from millrace.errors import DataError
from millrace.http.replies import reply


class Sink:
    """The outputs of one call.

    An output is cumulative, so only the newest one of a request is kept. A slow reader of a stream costs no memory.
    """

    def __init__(self) -> None:
        self._newest: dict[str, Output] = {}
        self._changed = asyncio.Event()
        self._ended = False

    def put(self, request_id: str, output: Output) -> None:
        self._newest[request_id] = output
        self._changed.set()

    def end(self) -> None:
        """Record that the model thread has ended, so that no more outputs arrive."""
        self._ended = True
        self._changed.set()

    async def get(self) -> dict[str, Output]:
        """Wait for new outputs and return them. Empty: the model thread has ended."""
        while not self._newest and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        newest, self._newest = self._newest, {}
        return newest


class Generate:
    """The generate calls in flight. Used in the event loop only."""

    def __init__(self, thread: ModelThread, faults: HttpFaults, *, seed: int) -> None:
        self._thread, self._faults = thread, faults
        self._seeds = random.Random(seed)  # noqa: S311  # sampling, not cryptography
        self._sinks: dict[str, Sink] = {}
        self._loaded: Any = None  # the model's tokenizer

    def deliver(self, outputs: list[tuple[str, Output]]) -> None:
        for request_id, output in outputs:
            sink = self._sinks.get(request_id)
            if sink is not None:
                sink.put(request_id, output)

    def fail(self) -> None:
        """Fail every call in flight, because the model thread has ended."""
        for sink in self._sinks.values():
            sink.end()

    async def handle(self, http: web.Request, info: ModelInfo) -> web.StreamResponse:
        begun = time.monotonic()
        body = parse(GenerateBody, await http.read())
        tokenizer = await self._tokenizer(info) if body.sampling_params.stop else None
        requests = to_requests(body, info, self._seeds.getrandbits(63), tokenizer)
        if body.stream:
            return await self._stream(http, requests, body, begun)
        ends = {request_id: output async for request_id, output in self._outputs(requests)}
        if self._faults.drops_answer() and http.transport is not None:
            http.transport.abort()
        seconds = time.monotonic() - begun
        answers = [
            answer(r.id, ends[r.id], prompt=body.input_ids, logprobs=body.return_logprob, seconds=seconds)
            for r in requests
        ]
        return reply(answers[0] if body.sampling_params.n == 1 else answers)

    async def probe(self, info: ModelInfo, deadline: float) -> None:
        """Generate one token. Raises Refused if that takes longer than the deadline."""
        body = GenerateBody(
            input_ids=[0], sampling_params=SamplingBody(max_new_tokens=1), rid=f"probe-{secrets.token_hex(8)}"
        )
        try:
            async with asyncio.timeout(deadline):
                async for _ in self._outputs(to_requests(body, info, 0)):
                    pass
        except TimeoutError:
            raise Refused(f"no token was generated within {deadline:.0f} s", status=503) from None

    async def _outputs(self, requests: list[Request]) -> AsyncIterator[tuple[str, Output]]:
        """Submit the requests and yield their outputs, up to the last output of each.

        If the generator is closed early, for example because the caller disconnected, the requests are aborted.
        """
        taken = [request.id for request in requests if request.id in self._sinks]
        if taken:
            raise BadRequest(f"rid: {taken[0]} is in flight already")
        sink = Sink()
        going = {request.id for request in requests}
        self._sinks.update(dict.fromkeys(going, sink))
        try:
            await self._thread.call(lambda core: core.submit(requests))
            while going:
                newest = await sink.get()
                if not newest:
                    raise Refused("the model thread has ended; the reason is in the server's log", status=500)
                for request_id, output in newest.items():
                    if output.finish is not None:
                        going.discard(request_id)
                        del self._sinks[request_id]
                    yield request_id, output
        finally:
            for request_id in going:
                del self._sinks[request_id]
            if going:
                self._thread.post(lambda core: core.abort(lambda request: request.id in going, "the caller has left"))

    async def _tokenizer(self, info: ModelInfo) -> Any:
        """Return the model's tokenizer, which is loaded once. Raises BadRequest if the model's folder has none."""
        if self._loaded is None:
            try:
                self._loaded = await asyncio.to_thread(load_tokenizer, Path(info.path))
            except DataError as error:
                raise BadRequest(str(error)) from error
        return self._loaded

    async def _stream(
        self, http: web.Request, requests: list[Request], body: GenerateBody, begun: float
    ) -> web.StreamResponse:
        """Answer with server-sent events, each with the cumulative output. An event may add several tokens."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        index = {request.id: number for number, request in enumerate(requests)}
        async for request_id, output in self._outputs(requests):
            if not response.prepared:
                await response.prepare(http)
            seconds = time.monotonic() - begun
            event = answer(request_id, output, prompt=body.input_ids, logprobs=body.return_logprob, seconds=seconds)
            if len(requests) > 1:
                event["index"] = index[request_id]
            if self._faults.drops_answer() and http.transport is not None:
                http.transport.abort()
            await response.write(b"data: " + orjson.dumps(event) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response
