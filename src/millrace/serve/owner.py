"""The HTTP server of a fleet's owner, for its followers (`millrace.fleet.follower`).

Followers authenticate with a key. They get the state of the engines, and their addresses and API keys.
"""

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

SHUTDOWN_GRACE = 0.5  # seconds for responses in flight when the run ends


@asynccontextmanager
async def own(replicas: ReplicaSet, sock: socket.socket, key: str) -> AsyncIterator[None]:
    """Serve the fleet's state on a bound socket while the block runs."""
    owner = _Owner(replicas, key)
    app = web.Application(middlewares=[owner.guard])
    app.add_routes([web.get("/state", owner.get_state), web.post("/failure", owner.post_failure)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_GRACE)
    try:
        await runner.setup()
        await web.SockSite(runner, sock).start()
        yield
    finally:
        await runner.cleanup()


class _Owner:
    """The handlers of the routes."""

    def __init__(self, replicas: ReplicaSet, key: str) -> None:
        self._replicas, self._key = replicas, key
        self._state, self._failure = TypeAdapter(FleetState), TypeAdapter(Failure)

    @web.middleware
    async def guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Refuse requests without the fleet's key."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(token.encode(), self._key.encode()):
            return web.Response(text="this route needs the fleet's key", status=401)
        return await handler(request)

    async def get_state(self, http: web.Request) -> web.Response:
        """Return the fleet's state when it differs from snapshot `after`, or after POLL_SECONDS."""
        try:
            after = int(http.query.get("after", "-1"))
        except ValueError:
            return web.Response(text="`after` is the number of a snapshot", status=400)
        await self._replicas.changed_since(after, deadline=POLL_SECONDS)
        return web.Response(body=self._state.dump_json(state_of(self._replicas)), content_type="application/json")

    async def post_failure(self, http: web.Request) -> web.Response:
        """Suspect an engine that failed a follower's request."""
        try:
            failure = self._failure.validate_json(await http.read())
        except ValidationError as error:
            return web.Response(text=str(error.errors()[0]["msg"]), status=400)
        await self._replicas.suspect(failure.engine, EngineFailed(failure.engine, failure.reason))
        return web.Response(status=204)


def state_of(replicas: ReplicaSet) -> FleetState:
    """Return the state that followers get."""
    snapshot = replicas.snapshot
    addresses = (address_of(replica) for replica in replicas.by_name.values())
    return FleetState(
        snapshot.number,
        snapshot.replicas,
        tuple(sorted(replicas.coming)),
        tuple(sorted(replicas.asleep)),
        tuple(address for address in addresses if address is not None),
    )
