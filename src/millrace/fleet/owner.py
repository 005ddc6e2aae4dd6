"""The HTTP server of a fleet's owner, for its followers (`millrace.fleet.follower`).

Followers authenticate with a key. They get the state of the engines, and their addresses and API keys.
"""

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web
from pydantic import TypeAdapter, ValidationError

from millrace import arguments
from millrace.engines.reach import address_of
from millrace.errors import ArgumentError, ConfigError, EngineFailed
from millrace.fleet.follower import POLL_SECONDS, Demand, Failure, FleetState
from millrace.http.auth import has_key
from millrace.http.replies import reply
from millrace.http.serving import serving
from millrace.launch.ports import bound, unbracketed, url_of, why_not_bound

if TYPE_CHECKING:
    from millrace.fleet.fleet import Fleet


@dataclass(frozen=True, slots=True)
class SharedFleet:
    """The access to a shared fleet. Other processes pass both values to `millrace.follow_fleet`.

    url: where the owner answers. key: gives access to the engines, so it is secret and left out of the repr.
    """

    url: str
    key: str = field(repr=False)


@asynccontextmanager
async def serve_followers(fleet: "Fleet", host: str, port: int, key: str | None) -> AsyncIterator[SharedFleet]:
    """Answer the followers of a fleet while the block runs. See `Fleet.share`."""
    host, port = arguments.text("host", host), arguments.whole("port", port)
    key = secrets.token_urlsafe(24) if key is None else checked_key(key)
    try:
        sock = bound(unbracketed(host), port)
    except (OSError, OverflowError) as error:
        reason = why_not_bound(host, error) if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"the fleet can't be shared at {host}:{port} ({reason}); share it at another port, or at port 0 for any "
            "free one"
        ) from error
    with sock:
        owner = _Owner(fleet, key)
        app = web.Application(middlewares=[owner.guard])
        app.add_routes([
            web.get("/state", owner.get_state),
            web.post("/failure", owner.post_failure),
            web.post("/demand", owner.post_demand),
        ])  # fmt: skip
        async with serving(app, sock):
            yield SharedFleet(url_of(host, sock.getsockname()[1]), key)


def checked_key(key: object) -> str:
    """Return the key. Raises ArgumentError if an HTTP header can't carry it."""
    key = arguments.text("key", key)
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise ArgumentError("key must be ASCII text without line breaks, and not empty; leave it out to get a new one")
    return key


class _Owner:
    """The handlers of the routes. `id` distinguishes this owner from an earlier one at the same URL."""

    def __init__(self, fleet: "Fleet", key: str) -> None:
        self._fleet, self._key, self._id = fleet, key, secrets.token_hex(8)
        self._state, self._failure = TypeAdapter(FleetState), TypeAdapter(Failure)
        self._demand = TypeAdapter(Demand)
        self._shown: tuple[object, ...] = ()  # what `_body` was made of
        self._body = b""

    @web.middleware
    async def guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Refuse requests without the fleet's key."""
        if not has_key(request.headers.get("Authorization"), [self._key]):
            return web.Response(text="this route needs the fleet's key", status=401)
        return await handler(request)

    async def get_state(self, http: web.Request) -> web.Response:
        """Return the fleet's state when it differs from snapshot `after` of owner `owner`, or after POLL_SECONDS."""
        try:
            after = int(http.query.get("after", "-1"))
        except ValueError:
            return web.Response(text="`after` is the number of a snapshot", status=400)
        if http.query.get("owner") == self._id:
            await self._fleet.replicas.changed_since(after, deadline=POLL_SECONDS)
        return web.Response(body=self._current(), content_type="application/json")

    async def post_failure(self, http: web.Request) -> web.Response:
        """Suspect an engine that failed a follower's request."""
        try:
            failure = self._failure.validate_json(await http.read())
        except ValidationError as error:
            return web.Response(text=str(error.errors()[0]["msg"]), status=400)
        await self._fleet.replicas.suspect(failure.engine, EngineFailed(failure.engine, failure.reason))
        return reply({})

    async def post_demand(self, http: web.Request) -> web.Response:
        """Remember how many requests wait in a follower."""
        try:
            demand = self._demand.validate_json(await http.read())
        except ValidationError as error:
            return web.Response(text=str(error.errors()[0]["msg"]), status=400)
        self._fleet.replicas.note_demand(demand.process, demand.waiting)
        return reply({})

    def _current(self) -> bytes:
        """Return the state in JSON. It is made once, however many followers ask for it."""
        replicas = self._fleet.replicas
        shown = (
            replicas.snapshot.number,
            self._fleet.version,
            dict(replicas.labels),
            tuple(sorted(replicas.coming)),
            tuple(sorted(replicas.asleep)),
            replicas.elastic,
        )
        if shown != self._shown:
            number, version, labels, coming, asleep, elastic = self._shown = shown
            addresses = (address_of(replica) for replica in replicas.by_name.values())
            state = FleetState(
                owner=self._id,
                number=number,
                version=version,
                labels=labels,
                members=replicas.snapshot.replicas,
                coming=coming,
                asleep=asleep,
                engines=tuple(address for address in addresses if address is not None),
                elastic=elastic,
                last_info=None if replicas.by_name else replicas.infos[0],
            )
            self._body = self._state.dump_json(state)
        return self._body
