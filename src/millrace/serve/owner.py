"""A fleet's owner answers those that follow it (`millrace.fleet.follower`), who know the key: how the engines stand,
and where they are. An engine's keys are part of that."""

import hmac
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from pydantic import TypeAdapter, ValidationError

from millrace.engines.reach import address_of
from millrace.errors import EngineFailed
from millrace.fleet.follower import POLL_SECONDS, Failure, FleetState
from millrace.fleet.replicas import ReplicaSet

SHUTDOWN_GRACE = 0.5  # seconds for answers that are on their way when the run ends


@asynccontextmanager
async def own(replicas: ReplicaSet, sock: socket.socket, key: str) -> AsyncIterator[None]:
    """Answers at the bound socket as long as the block runs."""
    owner = _Owner(replicas, key)
    app = web.Application(middlewares=[owner.guard])
    app.add_routes([web.get("/state", owner.tell), web.post("/failure", owner.hear)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_GRACE)
    try:
        await runner.setup()
        await web.SockSite(runner, sock).start()
        yield
    finally:
        await runner.cleanup()


class _Owner:
    """The routes."""

    def __init__(self, replicas: ReplicaSet, key: str) -> None:
        self._replicas, self._key = replicas, key
        self._state, self._failure = TypeAdapter(FleetState), TypeAdapter(Failure)

    @web.middleware
    async def guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._key.encode()):
            return web.Response(text="this route needs the fleet's key", status=401)
        return await handler(request)

    async def tell(self, http: web.Request) -> web.Response:
        try:
            after = int(http.query.get("after", "-1"))
        except ValueError:
            return web.Response(text="`after` is the number of a snapshot", status=400)
        await self._replicas.changed_since(after, deadline=POLL_SECONDS)
        return web.Response(body=self._state.dump_json(state_of(self._replicas)), content_type="application/json")

    async def hear(self, http: web.Request) -> web.Response:
        try:
            failure = self._failure.validate_json(await http.read())
        except ValidationError as error:
            return web.Response(text=str(error.errors()[0]["msg"]), status=400)
        await self._replicas.suspect(failure.engine, EngineFailed(failure.engine, failure.reason))
        return web.Response(status=204)


def state_of(replicas: ReplicaSet) -> FleetState:
    snapshot = replicas.snapshot
    addresses = (address_of(replica) for replica in replicas.by_name.values())
    return FleetState(
        snapshot.number,
        snapshot.replicas,
        tuple(sorted(replicas.coming)),
        tuple(sorted(replicas.asleep)),
        tuple(address for address in addresses if address is not None),
    )
