"""The HTTP server: SGLang's native routes, served by one model thread."""

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from millrace import __version__
from millrace.engines.embedded.auth import Keys, allowed
from millrace.engines.embedded.core import Core, Refused
from millrace.engines.embedded.faults import HttpFaults, StepFaults, crash
from millrace.engines.embedded.generate import Generate
from millrace.engines.embedded.peers import OFFERED
from millrace.engines.embedded.protocol import AbortBody, BadRequest, EmptyBody, FaultBody, PauseBody, parse
from millrace.engines.embedded.replies import done, refusal
from millrace.engines.embedded.runner import ModelInfo
from millrace.engines.embedded.text import TOKENIZER
from millrace.engines.embedded.thread import Loaded, ModelThread
from millrace.engines.embedded.updates import Handler, Updates
from millrace.engines.embedded.weights import UpdateRefused
from millrace.http.replies import reply
from millrace.http.serving import serving
from millrace.types import Capability, PauseMode

BODY_LIMIT = 256 * 1024 * 1024  # bytes; a prompt of a million tokens takes about 8 MB
PROBE_DEADLINE = 20.0  # seconds for the token of /health_generate, as in SGLang
PAUSE_MODES = {"abort": PauseMode.ABORT, "retract": PauseMode.RETRACT, "in_place": PauseMode.KEEP}
CAPABILITIES = frozenset(
    {
        Capability.VERSION_SPANS,
        Capability.UPDATE_SESSION,
        Capability.ROLLBACK,
        Capability.STAGED_UPDATE,
        Capability.SLEEP,
        Capability.UPDATE_FROM_DISK,
        Capability.UPDATE_FROM_PROCESS_GROUP,
        Capability.UPDATE_FROM_SHARED_MEMORY,
        Capability.UPDATE_FROM_PEER,
        Capability.CHECKSUMS,
        Capability.PENALTIES,
        Capability.STOP_TEXTS,
        Capability.PROMPT_PENALTY,
        Capability.LORA,
        Capability.PAUSE_ABORT,
        Capability.PAUSE_RETRACT,
        Capability.PAUSE_KEEP,
    }
)

log = logging.getLogger("millrace.embedded")


class Server:
    """The HTTP server. Used in the event loop only."""

    def __init__(self, build: Callable[[], Core], *, keys: Keys, faults: bool, max_running: int, seed: int) -> None:
        self._keys = keys
        self._faults = HttpFaults()
        self._allow_faults = faults
        self._max_running = max_running
        self._thread = ModelThread(
            build,
            asyncio.get_running_loop(),
            deliver=lambda outputs: self._generate.deliver(outputs),
            ended=self._thread_ended,
        )
        self._generate = Generate(self._thread, self._faults, seed=seed)
        self._updates = Updates(self._thread, self._faults)

    @asynccontextmanager
    async def serving(self, sock: socket.socket) -> AsyncIterator[None]:
        """Serve on a bound socket while the block runs. Every route answers 503 until the model is loaded."""
        app = web.Application(client_max_size=BODY_LIMIT, middlewares=[self._guard])
        app.add_routes(self._routes())
        async with serving(app, sock, cancel=True):
            self._thread.start()
            yield

    @property
    def ready(self) -> asyncio.Future[Loaded]:
        """Done when the model is loaded or loading has failed."""
        return self._thread.ready

    def stop(self) -> None:
        self._thread.stop()

    def _routes(self) -> list[web.RouteDef]:
        post: dict[str, Handler] = {
            "/generate": lambda http: self._generate.handle(http, self._info),
            "/abort_request": self._abort,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/flush_cache": self._flush_cache,
            **self._updates.routes(),
        }
        if self._allow_faults:
            post["/inject_fault"] = self._inject_fault
        get: dict[str, Handler] = {
            "/health": self._health,
            "/health_generate": self._health_generate,
            "/model_info": self._model_info,
            "/server_info": self._server_info,
            "/v1/loads": self._loads,
            "/flush_cache": self._flush_cache,
            OFFERED: self._updates.give,
        }
        return [web.post(path, handler) for path, handler in post.items()] + [
            web.get(path, handler) for path, handler in get.items()
        ]

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the key, then whether the model is loaded. Turn a handler's refusal into an answer."""
        if not allowed(request.path, request.headers.get("Authorization"), self._keys):
            return refusal("this route needs a key, as in: Authorization: Bearer KEY", 401)
        if not self.ready.done():
            return refusal("the model is still loading", 503)
        if self.ready.exception() is not None or not self._thread.alive:
            return refusal("the model thread has ended; the reason is in the server's log", 503)
        try:
            return await handler(request)
        except (BadRequest, UpdateRefused) as error:
            return refusal(str(error), 400)
        except Refused as error:
            return refusal(str(error), error.status)

    @property
    def _info(self) -> ModelInfo:
        return self.ready.result().info

    @property
    def _capabilities(self) -> frozenset[Capability]:
        has_tokenizer = (Path(self._info.path) / TOKENIZER).is_file()
        return CAPABILITIES if has_tokenizer else CAPABILITIES - {Capability.STOP_TEXTS}

    def _thread_ended(self) -> None:
        log.info("the model thread has ended")
        self._generate.fail()

    # Requests

    async def _abort(self, http: web.Request) -> web.Response:
        body = parse(AbortBody, await http.read())
        if not body.rid and not body.abort_all:
            raise BadRequest("rid: set it to a request's id, or set abort_all")
        count = await self._thread.call(
            lambda core: core.abort(lambda r: body.abort_all or r.id.startswith(body.rid), "aborted on request")
        )
        return done(f"{count} requests were aborted")

    async def _pause(self, http: web.Request) -> web.Response:
        mode = parse(PauseBody, await http.read()).mode
        await self._thread.call(lambda core: core.pause(PAUSE_MODES[mode]))
        log.info("paused, mode %s", mode)
        return reply({"status": "ok", "message": f"generation is paused, mode {mode}"})

    async def _continue(self, http: web.Request) -> web.Response:
        parse(EmptyBody, await http.read())
        await self._thread.call(Core.resume)
        log.info("continued")
        return reply({"status": "ok", "message": "generation continues"})

    async def _flush_cache(self, http: web.Request) -> web.Response:  # noqa: ARG002
        await self._thread.call(Core.flush_cache)
        return done("the cache is flushed")

    # State. These routes answer at once, because they do not wait for the model thread.

    async def _health(self, http: web.Request) -> web.Response:  # noqa: ARG002
        return reply({"status": "ok"})

    async def _health_generate(self, http: web.Request) -> web.Response:  # noqa: ARG002
        status = self._thread.current()
        if status.paused or status.asleep:
            raise Refused("generation is paused" if status.paused else "memory is released", status=503)
        await self._generate.probe(self._info, PROBE_DEADLINE)
        return reply({"status": "ok"})

    async def _model_info(self, http: web.Request) -> web.Response:  # noqa: ARG002
        info = self._info
        return reply(
            {
                "model_path": info.path,
                "weight_version": self._thread.current().version,
                "vocab_size": info.vocab_size,
                "context_length": info.context_length,
                "dtype": info.dtype,
                "unusual_dtypes": info.unusual_dtypes,
                "model_type": info.model_type,
                "architectures": info.architectures,
                "eos_token_ids": sorted(info.eos_token_ids),
                "is_generation": True,
            }
        )

    async def _server_info(self, http: web.Request) -> web.Response:  # noqa: ARG002
        status = self._thread.current()
        return reply(
            {
                "engine": "millrace-embedded",
                "version": __version__,
                "max_running_requests": self._max_running,
                "is_paused": status.paused,
                "asleep": sorted(status.asleep),
                "weights_ready": status.weights_ready,
                "weight_version": status.version,
                "capabilities": sorted(self._capabilities),
            }
        )

    async def _loads(self, http: web.Request) -> web.Response:  # noqa: ARG002
        status = self._thread.current()
        load = {
            "dp_rank": 0,
            "num_running_reqs": status.running,
            "num_waiting_reqs": status.waiting,
            "num_used_tokens": status.used_tokens,
            "max_total_num_tokens": status.max_tokens,
            "gen_throughput": status.tokens_per_second,
            "cache_hit_rate": status.cache_hit_rate,
        }
        return reply({"loads": [load]})

    # Faults

    async def _inject_fault(self, http: web.Request) -> web.Response:
        body = parse(FaultBody, await http.read())
        match body.kind:
            case "crash" if body.after_tokens is None:
                crash()
            case "hang" if body.where == "http":
                # After this answer is sent.
                asyncio.get_running_loop().call_later(0.05, threading.Event().wait)
            case "drop_connection":
                self._faults.drop_answers = body.count
            case "refuse_update":
                self._faults.refuse_load = body.count
            case _:
                await self._thread.call(lambda core: _inject(core.faults, body))
        log.warning("fault injected: %s", body.kind)
        return done(f"{body.kind} is on")


def _inject(faults: StepFaults, body: FaultBody) -> None:
    match body.kind:
        case "crash":
            faults.crash_after_tokens = body.after_tokens
        case "poison":
            faults.poison = body.tokens
        case "slow":
            faults.seconds_per_step = body.seconds
        case "hang":
            faults.hang = True
